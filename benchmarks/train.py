"""Times training: one table from one run.

    python benchmarks/train.py                                         # nano and the 110M model
    python benchmarks/train.py --models 110m --batch 2 --context 256 1024 --rounds 5

For each model and context: the step with PLGA and that of the identity model of the same size
(SDPA), timed in turn, round after round, and beside them the rate of a large matrix product, so
that a change of the machine's speed meets all of them alike; each after one of its own that is not
timed, since memory that others had is slow at first. Utilisation is the floating point
operations of the model (`model/counts/flops.py`) over the time of a step, over that rate; times
are medians over rounds, ratios medians of each round's ratio. `forward` and `forward + backward`
are compiled by themselves: what the step takes beyond them is the optimiser and the metrics.
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

import jax
import jax.numpy as jnp

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.config import ExperimentConfig
from pldr_jax.config.load import load_config
from pldr_jax.model.counts.flops import forward_flops, training_flops
from pldr_jax.partition import build_mesh
from pldr_jax.training.step import create_state, jit_train_step, loss_fn

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = {"nano": CONFIGS / "nano.gin", "110m": CONFIGS / "pldr_110m.gin"}
PRODUCT = 4096


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def matmul(dtype: str) -> Callable[[], Any]:
    """A large square product; its rate is what utilisation is measured against."""
    x = jnp.ones((PRODUCT, PRODUCT), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    return lambda: product(x, x)


class Variant:
    """The step of one model, compiled, and its state."""

    def __init__(self, config: ExperimentConfig, g_source: str) -> None:
        model = dataclasses.replace(config.model, g_source=g_source)
        self.config = dataclasses.replace(config, model=model)
        mesh = build_mesh(config.mesh)
        self.rows = jnp.ones((config.data.batch_size, model.context_length + 1), jnp.int32)
        with jax.set_mesh(mesh):
            self.state = create_state(self.config, mesh)
            lowered = jit_train_step(self.config, mesh, self.state).lower(self.state, self.rows)
            start = time.perf_counter()
            self.compiled = lowered.compile()
            self.compile_seconds = time.perf_counter() - start
        loss = functools.partial(loss_fn, self.config)
        self._forward = jax.jit(lambda params, rows: loss(params, None, rows)[0])
        self._backward = jax.jit(jax.grad(lambda params, rows: loss(params, None, rows)[0]))

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.compiled(self.state, self.rows)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def forward(self) -> float:
        """Seconds of the loss alone."""
        return seconds(lambda: self._forward(self.state.params, self.rows))

    def backward(self) -> float:
        """Seconds of the loss and its gradient."""
        return seconds(lambda: self._backward(self.state.params, self.rows))

    def flops(self) -> float:
        """Of a step."""
        return training_flops(self.config.model, *self.tokens())

    def tokens(self) -> tuple[int, int]:
        """Rows, and input tokens of each."""
        return self.rows.shape[0], self.rows.shape[1] - 1

    def memory(self) -> float:
        """MiB that the compiled step needs: state, batch and temporaries."""
        analysis = self.compiled.memory_analysis()
        return (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes) / 2**20


def measure(config: ExperimentConfig, rounds: int, parts: bool) -> list[dict[str, Any]]:
    """The rows of the table of one model and context."""
    variants = {"PLGA": Variant(config, "learned"), "SDPA": Variant(config, "identity")}
    product = matmul(config.model.dtype)
    times: dict[str, list[float]] = {name: [] for name in ("product", *variants)}
    shares: dict[str, list[float]] = {f"{n} {p}": [] for n in variants for p in ("f", "b")}
    for variant in variants.values():
        variant.step()
        if parts:
            variant.forward(), variant.backward()
    for _ in range(rounds):
        times["product"].append(seconds(product))
        for name, variant in variants.items():
            variant.step()  # after another step, as in training
            times[name].append(variant.step())
            if parts:
                variant.backward()
                shares[f"{name} f"].append(variant.forward())
                shares[f"{name} b"].append(variant.backward())
    rows = []
    for name, variant in variants.items():
        batch, context = variant.tokens()
        step = statistics.median(times[name])
        rate = [2 * PRODUCT**3 / taken for taken in times["product"]]
        used = [variant.flops() / taken for taken in times[name]]
        row = {
            "batch": batch,
            "context": context,
            "attention": name,
            "step_ms": step * 1e3,
            "tokens_s": batch * context / step,
            "GFLOP_s": variant.flops() / step / 1e9,
            "product": statistics.median(rate) / 1e9,
            "utilised": statistics.median(u / r for u, r in zip(used, rate, strict=True)),
            "to_sdpa": statistics.median(
                a / b for a, b in zip(times[name], times["SDPA"], strict=True)
            ),
            "memory_MiB": variant.memory(),
            "compile_s": variant.compile_seconds,
        }
        if parts:
            row["forward"] = statistics.median(shares[f"{name} f"]) / step
            row["+backward"] = statistics.median(shares[f"{name} b"]) / step
        rows.append(row)
    return rows


COLUMNS = {
    "batch": "5d",
    "context": "7d",
    "attention": ">9s",
    "step_ms": "9.1f",
    "tokens_s": "9.0f",
    "GFLOP_s": "8.0f",
    "product": "8.0f",
    "utilised": "8.2f",
    "to_sdpa": "8.3f",
    "memory_MiB": "10.0f",
    "compile_s": "9.1f",
    "forward": "8.2f",
    "+backward": "9.2f",
}


def main() -> None:
    """Parses the command line and prints the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--batch", type=int, help="rows; default: 16 (nano), 2 (110m)")
    parser.add_argument("--context", type=int, nargs="+", help="input tokens; default: 127, 256")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no_parts", action="store_true", help="do not time the parts")
    parser.add_argument("--json", help="also write the rows to this file", metavar="PATH")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.platform} ({device.device_kind}), {options.dtype}, {options.rounds} rounds")
    rows = []
    for name in options.models:
        config = load_config([FILES[name]], [f"Model.dtype={options.dtype}"])
        for context in options.context or [127 if name == "nano" else 256]:
            model = dataclasses.replace(config.model, context_length=context)
            batch = options.batch or (16 if name == "nano" else 2)
            data = dataclasses.replace(config.data, batch_size=batch)
            case = dataclasses.replace(config, model=model, data=data)
            parts = forward_flops(case.model, context)
            total = sum(parts.values())
            shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
            print(f"\n{name}: operations of the forward pass: {shares}")
            print(" ".join(f"{c:>{f.strip('>dfs').split('.')[0]}}" for c, f in COLUMNS.items()))
            for row in measure(case, options.rounds, not options.no_parts):
                rows.append({"model": name, **row})
                print(
                    " ".join(format(row[c], f) for c, f in COLUMNS.items() if c in row), flush=True
                )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    use_huge_pages()
    main()
