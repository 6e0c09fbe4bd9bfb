"""What `Generation.weights` costs and saves: a certificate of a trained model, and the decode step.

    python benchmarks/weights.py runs/nano              # on the held-out text of the run
    python benchmarks/weights.py runs/nano --rounds 15  # and the step of the 110M shape, by dtype

The certificate compares the logits of each dtype with those of the weights as they were trained, at
every position of held-out rows: KL divergence (float32 || dtype), error of the logits, tokens whose
largest logit is the same, held-out loss, bytes of the weights. The step is timed as
`benchmarks/decode.py` does, all dtypes in turn, with random weights; ratios are medians of each
round's ratio to float32.
"""

import argparse
import statistics
import typing
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from decode import Compilations, Variant

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.load import load_config
from pldr_jax.data.rows import join_rows
from pldr_jax.interop.weights import held_out_text, open_checkpoint
from pldr_jax.model.decoder import Params, forward, init_params
from pldr_jax.model.weights import WeightsDtype, rounded

DTYPES = typing.get_args(WeightsDtype)


def megabytes(params: Params) -> float:
    """Size of the weights in MB."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6


def compare(exact: jax.Array, other: jax.Array, next_BT: jax.Array) -> list[jax.Array]:
    """Mean KL, its largest value, mean and largest error of logits, equal tokens, loss."""
    log_p, log_q = jax.nn.log_softmax(exact), jax.nn.log_softmax(other)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    error = jnp.abs(other - exact)
    equal = exact.argmax(-1) == other.argmax(-1)
    loss = -jnp.take_along_axis(log_q, next_BT[..., None], -1)
    return [kl.mean(), kl.max(), error.mean(), error.max(), equal.mean(), loss.mean()]


def certify(checkpoint: str, rows: int) -> None:
    """Prints the certificate."""
    opened = open_checkpoint(checkpoint)
    text = held_out_text(Path(checkpoint), opened.config, "RUN", print)
    length = opened.config.model.context_length
    held_out = join_rows(text.rows("validation", length, opened.config.data))
    if isinstance(held_out[0], dict):
        raise ConfigError("RUN: its rows are packed; take one whose Data.packing is 'concat'")
    chosen = np.stack([np.asarray(held_out[i]) for i in range(min(rows, len(held_out)))])
    inputs, targets = jnp.asarray(chosen[:, :-1]), jnp.asarray(chosen[:, 1:])
    logits = jax.jit(lambda p: forward(opened.config.model, p, inputs, opened.g_lm).logits)
    exact = logits(opened.params)
    print(f"{checkpoint}: {len(chosen)} held-out rows, {targets.size:,} tokens")
    print("weights        MB  share   KL mean    KL max  |logit| mean     max  same token    loss")
    for dtype in DTYPES:
        params = rounded(opened.params, dtype)
        kl, most, mean, largest, equal, loss = map(float, compare(exact, logits(params), targets))
        share = megabytes(params) / megabytes(opened.params)
        print(
            f"{dtype:<10} {megabytes(params):6.2f} {share:6.2f} {kl:9.1e} {most:9.1e} "
            f"{mean:13.1e} {largest:7.1e} {equal:11.4%} {loss:7.4f}"
        )


def time_steps(config: ModelConfig, batches: list[int], rounds: int) -> None:
    """Prints the decode step of each dtype."""
    params = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))
    variants = {d: Variant("KV+G", config, rounded(params, d)) for d in DTYPES}
    device = jax.devices()[0]
    print(f"\n{device.platform} ({device.device_kind}), {config.dtype}, {rounds} rounds")
    print("batch  weights     step ms  to float32   quartiles")
    for batch in batches:
        times: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        for variant in variants.values():
            variant.make_slots(batch, config.context_length, Compilations())
        for _ in range(rounds):
            for dtype, variant in variants.items():
                times[dtype].append(1e3 * variant.decode())
        for dtype in DTYPES:
            ratios = np.divide(times[dtype], times["float32"])
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            step = statistics.median(times[dtype])
            print(f"{batch:5d}  {dtype:<10} {step:8.2f} {middle:11.3f}  {low:.3f}-{high:.3f}")


def main() -> None:
    """Parses the command line and prints the tables."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="RUN", nargs="?")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=0, help="0: no speeds")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--config", default="pldr_110m.gin", help="of the shape that is timed")
    parser.add_argument("--dtype", default="float32", help="that it computes in")
    options = parser.parse_args()
    try:
        if options.checkpoint:
            certify(options.checkpoint, options.rows)
        config = load_config([options.config], [f"Model.dtype={options.dtype}"]).model
    except ConfigError as error:
        parser.error(str(error))
    if options.rounds:
        time_steps(config, options.batches, options.rounds)


if __name__ == "__main__":
    use_huge_pages()
    main()
