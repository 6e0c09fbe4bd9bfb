"""Times decoding: one table from one run.

    python benchmarks/decode.py                                            # the 110M model
    python benchmarks/decode.py --batches 1 32 --contexts 256 --rounds 30
    python benchmarks/decode.py --layers 3 --heads 2 --head_dim 32 --vocab 512 --contexts 64

For each batch and context it times the decode step, as the engine runs it (`STEPS` greedy tokens of
every row a call, caches half full at the first), of:

    KV         keys, values and the metric tensor A cached; the last steps of PLGA run in every call
    KV+G       keys, values and each row's own G_LM cached
    frozen     one G_LM for all rows, no PLGA network in the model
    SDPA       the identity model of the same size: ordinary attention
    no cache   everything recomputed from as many tokens as the context has, at every token

and for each context the prefill of one prompt of half its length, which is how the engine admits
one. The floor is the bytes that a step must read (weights of the step, keys, values, G_LM) over the
read bandwidth: that of the fastest of a few kernels that read a large array once, timed beside the
steps. All are timed in turn, round after round, so that a change of the machine's speed meets all
of them alike; times and bandwidth are medians over rounds, ratios medians of each round's ratio.
Parameters are random: times do not depend on them.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import ModelConfig, SamplingConfig
from pldr_jax.config.sampling import MAX_STOP_IDS
from pldr_jax.inference.decode import full_step
from pldr_jax.inference.sampling import slot_sampling
from pldr_jax.inference.slots import Prompts, Slots, admit, decode_slots, empty_slots
from pldr_jax.model.decoder import Params, init_params, unstack_layers
from pldr_jax.model.deductive import random_g_lm
from pldr_jax.training.freeze.calibrate import without_plga

STEPS = 8
SOURCES = {"KV": "learned", "KV+G": "learned", "frozen": "external", "SDPA": "identity"}
"""Variant -> `Model.g_source`; of other variants, which are given their G_LM, it is "external"."""
NO_CACHE_TOKENS = 4096
"""Without a cache, only batches of so many tokens are timed: more would take minutes."""


class Compilations:
    """Counts what XLA compiles, and the seconds that takes."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count, self.seconds = self.count + 1, self.seconds + seconds


class Bandwidth:
    """Reads a large array once, with the kernel that was the fastest when this was made."""

    def __init__(self) -> None:
        self.array = jnp.ones((9216, 8192), jnp.float32)
        row, column = jnp.ones((1, 9216), jnp.float32), jnp.ones((8192,), jnp.float32)
        kernels: list[Callable[[], Any]] = [
            functools.partial(jax.jit(jnp.sum), self.array),
            functools.partial(jax.jit(jnp.matmul), row, self.array),
            functools.partial(jax.jit(jnp.matmul), self.array, column),
        ]
        self._kernel = min(kernels, key=lambda kernel: min(seconds(kernel) for _ in range(10)))

    def __call__(self) -> float:
        """Bytes a second, now."""
        return self.array.nbytes / seconds(self._kernel)


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def half_full(slots: Slots) -> Slots:
    """Slots whose rows are all at half of their length, with many tokens to go."""
    half = jnp.full_like(slots.cache.length_B, slots.cache.capacity // 2)
    return slots.replace(
        cache=slots.cache.replace(length_B=half),
        active_B=jnp.ones_like(slots.active_B),
        left_B=jnp.full_like(slots.left_B, 2**20),
    )


class Variant:
    """One way of decoding, and its model; `g_lm` is the one to decode with, if it is known."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        learned: Params,
        g_lm: Any = None,
        steps: int = STEPS,
    ) -> None:
        self.steps = steps
        self.name, self.keep = name, "A" if name == "KV" else "G_LM"
        source: Any = SOURCES.get(name, "external")
        self.config = dataclasses.replace(config, g_source=source)
        self.params = learned if source == "learned" else without_plga(learned)
        self.g_lm = g_lm
        if source == "external" and g_lm is None:
            self.g_lm = random_g_lm(self.config, 0)
        self.unstacked = jax.jit(functools.partial(unstack_layers, self.config))(self.params)
        self._decode = jax.jit(
            functools.partial(
                decode_slots, self.config, steps=steps, pieces=self.config.vocab_size
            ),
            donate_argnames="slots",
        )
        self._admit = jax.jit(
            functools.partial(admit, self.config, keep=self.keep), donate_argnames="slots"
        )
        self._rewind = jax.jit(half_full, donate_argnums=0)
        self.slots: Slots | None = None

    def make_slots(
        self, batch: int, context: int, compilations: "Compilations"
    ) -> tuple[int, float]:
        """Makes slots and decodes; returns how often that compiled the decode step, and seconds."""
        self.slots = self._rewind(
            empty_slots(self.config, batch, context, self.g_lm, self.keep, self.config.dtype)
        )
        count, seconds_before = compilations.count, compilations.seconds
        self.slots, _ = self._decode(self.unstacked, slots=self.slots)
        compiled = compilations.count - count, compilations.seconds - seconds_before
        self.decode()
        return compiled

    def decode(self) -> float:
        """Seconds a decode step, from caches that are half full."""
        assert self.slots is not None
        slots = jax.block_until_ready(self._rewind(self.slots))
        start = time.perf_counter()
        self.slots, emitted = jax.block_until_ready(self._decode(self.unstacked, slots=slots))
        taken = (time.perf_counter() - start) / self.steps
        assert np.all(emitted.valid_XB), "a text ended early: nothing was timed"
        return taken

    def prefill(self, tokens: int) -> float:
        """Seconds to admit a prompt."""
        assert self.slots is not None
        start = time.perf_counter()
        self.slots = self._admit(
            self.params,
            slots=self.slots,
            prompts=Prompts(
                slot_Q=np.zeros((1,), np.int32),
                tokens_QT=np.ones((1, tokens), np.int32),
                length_Q=np.array([tokens], np.int32),
                sampling=slot_sampling([SamplingConfig(1)]),
                stop_QZ=np.full((1, MAX_STOP_IDS), -1, np.int32),
            ),
            g_lm_LBNHJ=self.g_lm,
        )
        jax.block_until_ready(self.slots)
        return time.perf_counter() - start

    def bytes_read(self) -> int:
        """Bytes a decode step cannot avoid reading: weights but the embedding table, and the
        cache.
        """
        assert self.slots is not None
        used = {name: tree for name, tree in self.unstacked.items() if name != "embedding"}
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(used))
        if self.config.g_source == "learned":
            plga = [layer["attention"]["plga"] for layer in self.unstacked["layers"]]
            total -= sum(leaf.nbytes for leaf in jax.tree.leaves(plga))
        return total + self.slots.cache.nbytes


def no_cache_step(variant: Variant, batch: int, context: int) -> Callable[[], Any]:
    """A token without any cache, from as many tokens as the context has."""
    step = jax.jit(functools.partial(full_step, variant.config))
    tokens = jnp.ones((batch, context), jnp.int32)
    lengths = jnp.full((batch,), context, jnp.int32)
    return lambda: step(variant.params, tokens, lengths, None)


def measure(
    variants: list[Variant],
    batch: int,
    context: int,
    rounds: int,
    bandwidth: Bandwidth,
    compilations: Compilations,
    without_cache: bool = True,
) -> list[dict[str, Any]]:
    """The rows of the table of one batch and context; variants must have "SDPA" among them."""
    compiled = {v.name: v.make_slots(batch, context, compilations) for v in variants}
    few = without_cache and batch * context <= NO_CACHE_TOKENS
    slow = no_cache_step(variants[0], batch, context) if few else None
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    times |= {"no cache": [], "read": []}
    base = "frozen" if "frozen" in times else "SDPA"
    if slow is not None:
        seconds(slow)
    count = compilations.count
    for number in range(rounds):
        times["read"].append(1 / bandwidth())
        for variant in variants:
            times[variant.name].append(variant.decode())
        if slow is not None and number % max(1, rounds // 4) == 0:
            times["no cache"].append(seconds(slow))
    assert compilations.count == count, "something was compiled while the steps were timed"
    rows = []
    for variant in variants:
        floors = [variant.bytes_read() * x for x in times["read"]]
        assert variant.slots is not None
        rows.append(
            {
                "variant": variant.name,
                "step_ms": statistics.median(times[variant.name]) * 1e3,
                "to_floor": ratio(times[variant.name], floors),
                "to_sdpa": ratio(times[variant.name], times["SDPA"]),
                "to_frozen": ratio(times[variant.name], times[base]),
                "to_frozen_quartiles": quartiles(times[variant.name], times[base]),
                "compilations": compiled[variant.name][0],
                "compile_s": compiled[variant.name][1],
                "cache_MiB": variant.slots.cache.nbytes / 2**20,
            }
        )
    if slow is not None:
        step = statistics.median(times["no cache"])
        rows.append(
            {
                "variant": "no cache",
                "step_ms": step * 1e3,
                "to_sdpa": step / statistics.median(times["SDPA"]),
            }
        )
    for row in rows:
        row |= {"batch": batch, "context": context, "tokens_s": batch / row["step_ms"] * 1e3}
        row["read_GB_s"] = 1e-9 / statistics.median(times["read"])
    return rows


def ratio(numbers: list[float], others: list[float]) -> float:
    """Median over rounds of one over the other."""
    return statistics.median(x / y for x, y in zip(numbers, others, strict=True))


def quartiles(numbers: list[float], others: list[float]) -> tuple[float, float]:
    """Lower and upper quartile over rounds of one over the other."""
    ratios = [x / y for x, y in zip(numbers, others, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, high


COLUMNS = {
    "batch": "5d",
    "context": "7d",
    "variant": ">8s",
    "step_ms": "9.2f",
    "tokens_s": "9.1f",
    "to_floor": "8.2f",
    "to_sdpa": "8.3f",
    "read_GB_s": "9.1f",
    "compilations": "12d",
    "compile_s": "9.1f",
    "cache_MiB": "9.1f",
}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return " ".join(
        format(row[name], form) if name in row else " " * max(len(name), int(form.strip(">dfs")[0]))
        for name, form in COLUMNS.items()
    )


def main() -> None:
    """Parses the command line and prints the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=14)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the rows to this file", metavar="PATH")
    options = parser.parse_args()
    if min(options.contexts) < 4 * STEPS:
        parser.error(f"--contexts: at least {4 * STEPS}")
    config = ModelConfig(
        vocab_size=options.vocab,
        num_layers=options.layers,
        num_heads=options.heads,
        head_dim=options.head_dim,
        context_length=max(options.contexts),
        dtype=options.dtype,
        unroll=False,
    )
    params = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))
    variants = [Variant(name, config, params) for name in SOURCES]
    compilations, bandwidth = Compilations(), Bandwidth()
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), {options.dtype}, {options.rounds} rounds")
    rows = []
    print(
        "\ndecode\n"
        + " ".join(f"{name:>{form.strip('>dfs').split('.')[0]}}" for name, form in COLUMNS.items())
    )
    for context in options.contexts:
        for batch in options.batches:
            case = measure(variants, batch, context, options.rounds, bandwidth, compilations)
            rows += case
            print("\n".join(line(row) for row in case), flush=True)
    print("\nprefill of one prompt\ncontext tokens " + " ".join(f"{x:>8}" for x in SOURCES))
    for context in options.contexts:
        half = context // 2
        for variant in variants:
            variant.make_slots(1, context, compilations)
            variant.prefill(half)
        timed = {v.name: [v.prefill(half) for _ in range(5)] for v in variants}
        medians = {name: statistics.median(values) * 1e3 for name, values in timed.items()}
        rows.append({"context": context, "prompt": half, "prefill_ms": medians})
        print(f"{context:7d} {half:6d} " + " ".join(f"{x:6.1f}ms" for x in medians.values()))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    use_huge_pages()
    main()
