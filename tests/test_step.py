"""The train step in parts: accumulated batches, chunked losses, updates that are left out."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import QUICK, corpus_of, flags, run_program

from pldr_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.partition import build_mesh
from pldr_jax.training.health import FEWEST, Health
from pldr_jax.training.losses import PAD_ID
from pldr_jax.training.step import TrainState, accumulated_gradients, create_state, train_step

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=64,
        num_layers=1,
        num_heads=2,
        head_dim=8,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=15,
        unroll=False,
    ),
    loss=LossConfig(dag_a_lm=0.01, dag_g_lm=0.01),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
    data=DataConfig(batch_size=8),
    training=TrainingConfig(steps=10),
)


@functools.cache
def state() -> TrainState:
    born = create_state(CONFIG, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    # Away from A_LM = 0, where rounding decides gradients (test_parity.py).
    plga = born.params["layers"]["attention"]["plga"]
    plga["b_W"] = plga["b_W"] + 2.0
    return born


@functools.cache
def rows() -> np.ndarray:
    """Rows with padding targets, and not as many in each."""
    made = np.random.default_rng(0).integers(1, 64, (8, 15)).astype(np.int32)
    for i in range(8):
        made[i, 15 - i :] = PAD_ID
    return made


@functools.cache
def gradients(config: ExperimentConfig) -> tuple[Any, ...]:
    compute = jax.jit(functools.partial(accumulated_gradients, config))
    return compute(state().params, None, rows())


def changed(group: str, **fields: Any) -> ExperimentConfig:
    return dataclasses.replace(
        CONFIG, **{group: dataclasses.replace(getattr(CONFIG, group), **fields)}
    )


@pytest.mark.parametrize(
    "config",
    [changed("training", grad_accumulation=k) for k in (2, 4, 8)]
    + [changed("loss", chunk=k) for k in (1, 4, 5, 14, 100)],
    ids=["2 parts", "4 parts", "8 parts", "chunk 1", "chunk 4", "chunk 5", "chunk 14", "chunk 100"],
)
def test_parts_change_no_number(config: ExperimentConfig) -> None:
    """Loss, accuracy, DAG losses and every gradient, to 1e-6 of the largest entry."""
    whole, parts = gradients(CONFIG), gradients(config)
    assert float(whole[1].count) == (rows()[:, 1:] != PAD_ID).sum()
    leaves = jax.tree.leaves_with_path(whole)
    for (path, expected), actual in zip(leaves, jax.tree.leaves(parts), strict=True):
        scale = max(float(jnp.abs(expected).max()), 1e-3)
        name = jax.tree_util.keystr(path)
        assert float(jnp.abs(actual - expected).max()) < 1e-6 * scale, name
    assert float(whole[0]) > float(whole[1].loss)  # the regulariser is in it


def test_chunks_never_hold_all_logits() -> None:
    for config, whole in ((changed("loss", chunk=2), False), (CONFIG, True)):
        compute = jax.jit(functools.partial(accumulated_gradients, config))
        program = compute.lower(state().params, None, rows()).compile().as_text()
        assert ("f32[8,14,64]" in program or "f32[112,64]" in program) == whole


def test_an_update_that_is_not_finite_is_left_out() -> None:
    config = changed("training", skip_nonfinite=True)
    step = jax.jit(functools.partial(train_step, config))
    good, metrics = step(state(), rows())
    expected, _ = jax.jit(functools.partial(train_step, CONFIG))(state(), rows())
    assert np.isfinite(float(metrics["train/loss"]))
    jax.tree.map(np.testing.assert_array_equal, good.params, expected.params)
    broken = state().replace(params=jax.tree.map(lambda x: x, state().params))
    broken.params["head"]["bias"] = broken.params["head"]["bias"].at[0].set(jnp.inf)
    after, metrics = step(broken, rows())
    assert not np.isfinite(float(metrics["train/loss"]))
    jax.tree.map(np.testing.assert_array_equal, after.params, broken.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, broken.opt_state)
    assert int(after.step) == 1  # the batch is passed over, not tried again


@pytest.mark.parametrize(
    "optimizer",
    [{"learning_rate": 3e38, "eps": 1e-30}, {"learning_rate": 1e30, "weight_decay": 1e30}],
    ids=["the update", "the decay"],
)
def test_an_update_that_makes_parameters_infinite_is_left_out(optimizer: dict[str, float]) -> None:
    """Loss and gradient are finite; the message that it is left out is true."""
    config = changed("training", skip_nonfinite=True)
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0, clip="none", **optimizer),
    )
    before = create_state(config, build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    after, metrics = jax.jit(functools.partial(train_step, config))(before, rows())
    assert np.isfinite(float(metrics["train/loss"])) and np.isfinite(metrics["train/grad_norm"])
    broken = [name for name, value in metrics.items() if not np.isfinite(value)]
    assert broken, metrics
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_the_learning_rate_is_that_of_the_updates_made() -> None:
    """Also after some were left out: an update is the same whenever it is made."""
    config = changed("training", skip_nonfinite=True)
    step = jax.jit(functools.partial(train_step, config))
    expected, rates = state(), []
    for _ in range(3):
        expected, metrics = step(expected, rows())
        rates.append(float(metrics["train/learning_rate"]))
    assert len(set(rates)) == 3
    actual, _ = step(state(), rows())
    bias = actual.params["head"]["bias"]
    broken = actual.replace(params=jax.tree.map(lambda x: x, actual.params))
    broken.params["head"]["bias"] = bias.at[0].set(jnp.inf)
    broken, metrics = step(broken, rows())
    assert not np.isfinite(metrics["train/loss"])
    broken.params["head"]["bias"] = bias
    again, metrics = step(broken, rows())
    assert float(metrics["train/learning_rate"]) == rates[1] and int(again.step) == 3
    second, _ = step(actual, rows())
    jax.tree.map(np.testing.assert_array_equal, again.params, second.params)


def test_health_counts_and_notes(tmp_path: Path) -> None:
    config = TrainingConfig(skip_nonfinite=True, max_nonfinite=2, spike_nats=0.5)
    health = Health(tmp_path, config)
    for step in range(FEWEST):
        assert health.check(step, {"train/loss": 2.0 + 0.01 * (step % 2)}, step) == []
    assert health.check(20, {"train/loss": 2.4}, 20) == [] and health.spikes == 0
    health.check(21, {"train/loss": 2.7}, 21)
    assert health.spikes == 1
    bad = {"train/loss": float("nan"), "train/grad_norm": float("inf")}
    assert health.check(22, bad, 122) == ["train/loss", "train/grad_norm"] and not health.stops
    other = Health(tmp_path, config)
    other.state = json.loads(json.dumps(health.state))
    other.check(23, bad, 123)
    assert other.stops and other.metrics() == {"train/nonfinite": 2, "train/spikes": 1}
    noted = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(row["step"], row["batch"]) for row in noted] == [(22, 122), (23, 123)]
    health.check(23, {"train/loss": 2.0}, 123)
    assert health.in_a_row == 0
    strict = Health(tmp_path, TrainingConfig())
    strict.check(1, bad, 0)
    assert strict.stops


def test_a_run_of_skipped_updates_ends(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = corpus_of(tmp_path_factory.getbasetemp())
    fields = {**QUICK, "Training.steps": 9, "Training.skip_nonfinite": True}
    fields |= {"Optimizer.learning_rate": 1e30, "Optimizer.clip": "none"}
    fields |= {"Training.max_nonfinite": 3, "Model.g_source": "identity"}
    run_dir = tmp_path / "run"
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(text, fields))
    assert result.returncode == 1 and result.stderr.startswith("error: step "), result.stderr
    assert "is left out" in result.stdout
    noted = [json.loads(line) for line in (run_dir / "nonfinite.jsonl").read_text().splitlines()]
    assert len(noted) == 3 and noted[0]["batch"] == noted[0]["step"] - 1


def test_accumulate_must_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers import tiny_config, train_here

    text = corpus_of(tmp_path)
    with pytest.raises(ConfigError, match=r"^Data\.batch_size = 8: .*3 parts of Training"):
        train_here(tiny_config(text, {"Training.grad_accumulation": 3}), tmp_path / "run")
