"""Times decoding: one table from one run.

    python benchmarks/decode.py                     # the 110M model
    python benchmarks/decode.py --layers 3 --heads 2 --head_dim 32 --vocab 512 --contexts 64

For each batch and context it times the prefill and the decode step of:

    no cache   everything recomputed from all tokens at every token
    KV         keys, values and the metric tensor A cached; the last steps of PLGA run at every
    token KV+G       keys, values and each row's own G_LM cached
    frozen     one G_LM for all rows, no PLGA network in the model
    SDPA       the identity model of the same size: ordinary attention

The floor is the bytes that a decode step must read (weights of the step, keys, values, G_LM) over
the read bandwidth measured in the same run: the best of a few kernels that read a large array once.
Variants of a case are timed in turn, round after round, so that a change of the machine's speed
meets all of them; ratios are medians over rounds. Parameters are random: times do not depend on
them.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import decode_step, full_step, prefill
from pldr_jax.model.cache import Cache
from pldr_jax.model.decoder import init_params, unstack_layers
from pldr_jax.model.deductive import random_g_lm

VARIANTS = ("KV", "KV+G", "frozen", "SDPA")


def read_bandwidth(rounds: int = 10) -> float:
    """Bytes a second read from memory: the faster of a sum and a matrix-vector product."""
    matrix = jnp.ones((8192, 8192), jnp.float32)
    vector = jnp.ones((1, 8192), jnp.float32)
    kernels: list[Callable[[], jax.Array]] = [
        functools.partial(jax.jit(jnp.sum), matrix),
        functools.partial(jax.jit(jnp.matmul), vector, matrix),
    ]
    return max(matrix.nbytes / min(times(kernel, rounds)) for kernel in kernels)


def times(call: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls, after one that is not counted."""
    jax.block_until_ready(call())
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        measured.append(time.perf_counter() - start)
    return measured


class Variant:
    """One way of decoding, with its model, its prefilled cache and its compiled step."""

    def __init__(self, name: str, config: ModelConfig, batch: int, context: int) -> None:
        self.name = name
        self.config = dataclasses.replace(
            config,
            g_source={"SDPA": "identity", "frozen": "external"}.get(name, "learned"),
            g_file="given" if name == "frozen" else None,
        )
        self.params = jax.jit(lambda key: nn.unbox(init_params(self.config, key)))(
            jax.random.key(0)
        )
        g_lm = random_g_lm(self.config, 0) if name == "frozen" else None
        self.unstacked = jax.jit(functools.partial(unstack_layers, self.config))(self.params)
        prompt = context // 2
        tokens = jnp.ones((batch, prompt), jnp.int32)
        lengths = jnp.full((batch,), prompt, jnp.int32)
        keep = "A" if name == "KV" else "G_LM"
        run_prefill = jax.jit(
            functools.partial(prefill, self.config, slots=context, keep=keep),
        )
        self.prefill = lambda: run_prefill(self.params, tokens, lengths, g_lm)
        start = time.perf_counter()
        _, self.cache = jax.block_until_ready(self.prefill())
        self.token = jnp.ones((batch,), jnp.int32)
        step = jax.jit(functools.partial(decode_step, self.config), donate_argnums=2)
        self.compiled = step.lower(self.unstacked, self.token, self.cache).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> float:
        """Seconds of one decode step."""
        start = time.perf_counter()
        logits, self.cache = self.compiled(self.unstacked, self.token, self.cache)
        jax.block_until_ready(logits)
        return time.perf_counter() - start

    def bytes_read(self) -> int:
        """Bytes a decode step cannot avoid reading: weights but the embedding table, and the
        cache.
        """
        used = {name: tree for name, tree in self.unstacked.items() if name != "embedding"}
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(used))
        if self.config.g_source == "learned":
            plga = [layer["attention"]["plga"] for layer in self.unstacked["layers"]]
            total -= sum(leaf.nbytes for leaf in jax.tree.leaves(plga))
        return total + self.cache.nbytes


def no_cache_step(config: ModelConfig, params: Any, batch: int, context: int) -> float:
    """Seconds a token without any cache, at a context half full."""
    step = jax.jit(functools.partial(full_step, config))
    tokens = jnp.ones((batch, context), jnp.int32)
    lengths = jnp.full((batch,), context // 2, jnp.int32)
    return statistics.median(times(lambda: step(params, tokens, lengths, None), 3))


def cache_megabytes(cache: Cache) -> float:
    """Size of a cache in MiB."""
    return cache.nbytes / 2**20


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    config = ModelConfig(
        vocab_size=options.vocab,
        num_layers=options.layers,
        num_heads=options.heads,
        head_dim=options.head_dim,
        context_length=max(options.contexts),
        dtype=options.dtype,
        unroll=False,
    )
    bandwidth = read_bandwidth()
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), reads {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{'batch':>5} {'context':>7} {'variant':>8} {'prefill ms':>10} {'step ms':>8} "
        f"{'tokens/s':>9} {'x floor':>8} {'x SDPA':>7} {'compile s':>9} {'cache MiB':>9}"
    )
    for context in options.contexts:
        for batch in options.batches:
            row(config, batch, context, options.rounds, bandwidth)


def row(config: ModelConfig, batch: int, context: int, rounds: int, bandwidth: float) -> None:
    """Times all variants at one batch and context and prints their lines."""
    variants = [Variant(name, config, batch, context) for name in VARIANTS]
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds + 1):
        for variant in variants:
            taken = variant.step()
            if number:
                seconds[variant.name].append(taken)
    for variant in variants:
        step = statistics.median(seconds[variant.name])
        prefill_step = statistics.median(times(variant.prefill, 3))
        against = [a / b for a, b in zip(seconds[variant.name], seconds["SDPA"], strict=True)]
        floor = variant.bytes_read() / bandwidth
        print(
            f"{batch:5d} {context:7d} {variant.name:>8} {prefill_step * 1e3:10.1f} "
            f"{step * 1e3:8.1f} {batch / step:9.1f} {step / floor:8.2f} {statistics.median(against):7.3f} "
            f"{variant.compile_seconds:9.1f} {cache_megabytes(variant.cache):9.1f}",
            flush=True,
        )
    if batch == 1:
        learned = variants[0]
        slow = no_cache_step(learned.config, learned.params, batch, context)
        print(
            f"{batch:5d} {context:7d} {'no cache':>8} {'':10} {slow * 1e3:8.1f} "
            f"{batch / slow:9.1f} {'':8} {slow / statistics.median(seconds['SDPA']):7.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
