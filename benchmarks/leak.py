"""A text on which knowing the future through G_LM pays, and what each `Loss.g_from` makes of it.

    python benchmarks/leak.py [--steps 1000] [--seed 0]

A row is two different tokens a and b, then seven times the same one of them. From the third token
on, a model that does not know its future can at best lose log 2 once, where the choice falls, and
nothing after that: 0.0990 nats a token over the seven. A G_LM of the whole row tells the choice
beforehand. Measured on rows that were not trained on, over those seven tokens, with three G_LM: of
the whole row, of its first two tokens, and of another row.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.model.decoder import Params, forward
from pldr_jax.partition import build_mesh
from pldr_jax.training.losses import token_loss
from pldr_jax.training.step import create_state, train_step

VOCABULARY, REPEATS, BATCH = 65, 7, 64
FLOOR = math.log(2) / REPEATS
MODES = ("row", "random_prefix", "neighbour")


def make_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Rows [count, 2 + REPEATS] of a, b, and one of them repeated."""
    pairs = np.stack([rng.permutation(VOCABULARY - 1)[:2] + 1 for _ in range(count)])
    chosen = pairs[np.arange(count), rng.integers(0, 2, count)]
    repeated = np.repeat(chosen[:, None], REPEATS, axis=1)
    return np.concatenate([pairs, repeated], axis=1).astype(np.int32)


def experiment(g_from: str, steps: int, seed: int) -> ExperimentConfig:
    """A model of 30,000 parameters."""
    return ExperimentConfig(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            num_layers=2,
            num_heads=2,
            head_dim=16,
            num_residual_layers=1,
            num_gated_units=1,
            context_length=2 + REPEATS,
            unroll=False,
        ),
        loss=LossConfig(g_from=g_from),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100, weight_decay=0.01),
        data=DataConfig(batch_size=BATCH),
        training=TrainingConfig(steps=steps, seed=seed),
    )


def losses(model: ModelConfig, params: Params, rows: jax.Array) -> list[jax.Array]:
    """Over the repeated tokens: with G_LM of the row, of its first two tokens, of another row."""
    inputs, targets = rows[:, :-1], rows[:, 1:].at[:, 0].set(0)
    whole = forward(model, params, inputs)
    prefix = forward(model, params, inputs, g_length_B=jnp.full(len(rows), 2))
    other = jnp.roll(whole.deductive.G_LM, 1, axis=1)
    all_logits = (whole.logits, prefix.logits, forward(model, params, inputs, other).logits)
    return [token_loss(logits, targets).loss for logits in all_logits]


def main() -> None:
    """Trains a model a mode, on the same rows, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"without knowing the future, at best {FLOOR:.4f} nats a token")
    print(f"{'Loss.g_from':<16}{'G_LM of the row':>16}{'of its prefix':>16}{'of another row':>16}")
    mesh = build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    born = create_state(experiment("row", options.steps, options.seed), mesh)
    for mode in MODES:
        config = experiment(mode, options.steps, options.seed)
        rng, state = np.random.default_rng(options.seed), born
        step = jax.jit(functools.partial(train_step, config))
        for _ in range(options.steps):
            state, _ = step(state, make_rows(rng, BATCH))
        held_out = jnp.asarray(make_rows(np.random.default_rng(10**6), 2048))
        values = jax.jit(functools.partial(losses, config.model))(state.params, held_out)
        print(f"{mode:<16}" + "".join(f"{float(value):>16.4f}" for value in values), flush=True)


if __name__ == "__main__":
    use_huge_pages()
    main()
