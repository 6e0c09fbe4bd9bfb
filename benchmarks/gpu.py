"""A GPU in one command: rates, training, decoding, numerics and memory of the 110M model.

    python benchmarks/gpu.py --minutes 6 --output results
    python benchmarks/gpu.py --minutes 4 --sections rates grid     # rates first: shares need them

Runs from the repository with nothing but JAX, Flax, Optax and NumPy. The most important cases come
first; a case begins only if the time for one like it is left. After every row `gpu.json` and
`gpu.md` are written anew; a case that fails is a row with its error. `kernels.txt` says which
kernels and which parts of the model the step spends its time in, `hlo_summary.txt` what it was
compiled to, `step.hlo.gz` is that itself.
"""

import argparse
import dataclasses
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from benchmarks import gpu_memory, gpu_numerics, gpu_profile
from benchmarks.gpu_cases import (
    GIB,
    PRODUCTS,
    Step,
    bandwidth,
    changed,
    decoding,
    parts,
    prefilling,
    product_rate,
)
from benchmarks.gpu_report import Report, Row
from pldr_jax.config.load import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pldr_110m.gin"
TINY = ("Model.vocab_size=64", "Model.num_layers=2", "Model.num_heads=2", "Model.head_dim=8",
        "Model.num_residual_layers=2")  # fmt: skip
SECTIONS = ("rates", "training", "decode", "prefill", "numerics", "grid", "memory", "more")

Case = tuple[str, Row, Callable[[], Row]]
"""Section, what the row begins with, and what measures the rest."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the cases."""

    product: int = 8192
    copied: int = 2**28
    inputs: int = 1024
    batch: int = 16
    batches: tuple[int, ...] = (32, 64, 8)
    rows: tuple[tuple[int, int], ...] = ((32, 1024), (1, 1024), (128, 1024))
    more_rows: tuple[tuple[int, int], ...] = (
        (8, 1024), (256, 256), (32, 256), (1, 256), (128, 256), (8, 256), (256, 1024)
    )  # fmt: skip
    steps: int = 64
    prompts: tuple[tuple[int, int], ...] = ((1, 512), (8, 1024), (32, 512))
    checked: int = 256


SMALL = Sizes(64, 2**10, 16, 2, (4,), ((2, 32),), ((1, 32),), 8, ((1, 16),), 16)


class Cases:
    """All cases, in the order of their importance."""

    def __init__(
        self, report: Report, settings: list[str], sizes: Sizes, plan: Path | None
    ) -> None:
        self.report, self.settings, self.sizes = report, settings, sizes
        self.config = load_config([CONFIG], settings)
        self.plan = json.loads(plan.read_text()) if plan else {}
        self.steps: dict[int, Step] = {}

    def rates(self) -> Iterator[Case]:
        """What the device does at best."""
        report, sizes = self.report, self.sizes
        for name in PRODUCTS:
            yield "rates", {"of": name}, partial(product_rate, report, name, sizes.product)
        for name in ("copy", "read"):
            yield "rates", {"of": name}, partial(bandwidth, report, name, sizes.copied)

    def rows(self, section: str) -> list[Row]:
        """The rows of a section so far."""
        return self.report.sections.get(section, [])

    def step(self, section: str, name: str, batch: int = 0, inputs: int = 0, **model: Any) -> Case:
        """A training step with other fields of `Model`."""
        batch, inputs = batch or self.sizes.batch, inputs or self.sizes.inputs
        config = changed(self.config, batch, context_length=inputs, **model)

        def measure() -> Row:
            row = Step(config, inputs).measured(self.report.rates)
            for other in (*self.rows("training"), *self.rows("grid")):
                if other["step"] == "PLGA" and other["batch"] == batch and "queued_ms" in other:
                    row["to_plga"] = row["queued_ms"] / other["queued_ms"]
            return row

        return section, {"step": name, "batch": batch, "inputs": inputs}, measure

    def training(self) -> Iterator[Case]:
        """The step as configured, its kernels, the identity model, and what parts take."""
        config = changed(self.config, self.sizes.batch, context_length=self.sizes.inputs)
        inputs = self.sizes.inputs
        row = {"step": "PLGA", "batch": self.sizes.batch, "inputs": inputs}

        def first() -> Row:
            self.steps[0] = Step(config, inputs)
            return self.steps[0].measured(self.report.rates)

        yield "training", row, first
        yield "profile", {"step": "PLGA"}, self.profile
        yield self.step("training", "SDPA", g_source="identity")
        yield self.step("training", "PLGA, inputs as train.py has", inputs=inputs - 1)
        yield self.step("training", "PLGA unrolled", unroll=True)

    def profile(self) -> Row:
        """Traces the first step, and writes what it is compiled to."""
        step, folder = self.steps.pop(0), self.report.folder
        hlo = step.compiled.as_text()
        (folder / "step.hlo.gz").write_bytes(gzip.compress(hlo.encode()))
        (folder / "hlo_summary.txt").write_text(gpu_profile.hlo_summary(hlo))
        kernels = gpu_profile.traced_kernels(step)
        (folder / "kernels.txt").write_text(gpu_profile.kernel_tables(kernels, hlo))
        share, note = gpu_profile.attributed(kernels, hlo), ""
        if share < 0.7:
            step = Step(step.config, step.inputs, {"xla_gpu_enable_command_buffer": ""})
            step(), jax.block_until_ready(step())
            hlo, kernels = step.compiled.as_text(), gpu_profile.traced_kernels(step)
            (folder / "kernels_no_graphs.txt").write_text(gpu_profile.kernel_tables(kernels, hlo))
            share, note = gpu_profile.attributed(kernels, hlo), "without command buffers"
        spent = sum(kernel["us"] for kernel in kernels) / 1e3
        return {"kernels": len(kernels), "device_ms": spent, "attributed": share, "note": note}

    def grid(self) -> Iterator[Case]:
        """The step in other ways."""
        first, *others = self.sizes.batches
        model = self.config.model
        aligned = {
            "ffn_dim": -(-model.ffn_width // 128) * 128,
            "metric_dim": -(-model.metric_width // 64) * 64,
        }
        yield self.step("grid", "PLGA", first)
        yield self.step("grid", f"PLGA, {aligned}", **aligned)
        yield self.step("grid", "PLGA, xla attention", attention_kernel="xla")
        yield self.step("grid", "PLGA, R=0", num_residual_layers=0)
        yield self.step("grid", "PLGA, plga_precision=default", plga_precision="default")
        yield self.step("grid", "SDPA", first, g_source="identity")
        for batch in others:
            yield self.step("grid", "PLGA", batch)
        yield self.parts("PLGA")
        yield self.parts("SDPA", g_source="identity")
        yield self.step("grid", "PLGA, plga_precision=highest", plga_precision="highest")
        yield self.step("grid", "PLGA, R=1", num_residual_layers=1)
        for batch in others:
            yield self.step("grid", "SDPA", batch, g_source="identity")
        yield self.step("grid", "SDPA unrolled", g_source="identity", unroll=True)

    def more(self) -> Iterator[Case]:
        """What is left of the sections above."""
        yield from self.decode(rest=True)
        yield from self.prefill(rest=True)
        yield from self.numerics(rest=True)
        for remat in ("dots", "full"):
            for batch in (self.sizes.batch, self.sizes.batches[0]):
                yield self.step("more", f"PLGA, remat={remat}", batch, remat=remat)
        yield self.step("more", "PLGA float32", dtype="float32")
        yield self.step("more", "SDPA float32", dtype="float32", g_source="identity")
        yield self.step("more", "SDPA, xla attention", attention_kernel="xla", g_source="identity")
        for batch in self.sizes.batches:
            yield self.step("more", "PLGA unrolled", batch, unroll=True)
            yield self.step("more", "PLGA, xla attention", batch, attention_kernel="xla")

    def parts(self, name: str, **model: Any) -> Case:
        """What the forward and the backward pass take of a step."""
        config = changed(self.config, self.sizes.batch, context_length=self.sizes.inputs, **model)
        row = {"step": name, "batch": self.sizes.batch, "inputs": self.sizes.inputs}
        return "parts", row, partial(parts, config, self.sizes.inputs)

    def decoding(self, variant: str, dtype: str, batch: int, context: int) -> Case:
        """Decode steps."""
        model = dataclasses.replace(self.config.model, dtype=dtype)
        row = {"variant": variant, "dtype": dtype, "batch": batch, "context": context}
        steps = self.sizes.steps
        return "decode", row, partial(decoding, self.report, model, variant, batch, context, steps)

    def decode(self, rest: bool = False) -> Iterator[Case]:
        """Decode steps: the first few sizes, or the others, other variants and float32."""
        if not rest:
            for size in self.sizes.rows:
                yield self.decoding("KV+G", "bfloat16", *size)
            yield self.decoding("SDPA", "bfloat16", *self.sizes.rows[0])
            return
        for variant in ("frozen", "KV"):
            yield self.decoding(variant, "bfloat16", *self.sizes.rows[0])
        for size in self.sizes.rows:
            yield self.decoding("KV+G", "float32", *size)
        for dtype in ("bfloat16", "float32"):
            for size in self.sizes.more_rows:
                yield self.decoding("KV+G", dtype, *size)

    def prefill(self, rest: bool = False) -> Iterator[Case]:
        """Prompts in bfloat16, or the others of float32."""
        model = dataclasses.replace(self.config.model, dtype="float32" if rest else "bfloat16")
        for batch, tokens in self.sizes.prompts:
            row = {"dtype": model.dtype, "batch": batch, "tokens": tokens}
            yield "prefill", row, partial(prefilling, self.report, model, batch, tokens)

    def numerics(self, rest: bool = False) -> Iterator[Case]:
        """Differences from a CPU, of this model or of a small one."""
        tokens = self.sizes.checked
        model = dataclasses.replace(self.config.model, context_length=tokens)
        if rest:
            sizes = {"vocab_size": 512, "num_layers": 2, "num_heads": 2, "head_dim": 32}
            model = dataclasses.replace(model, **sizes)
        for variant in gpu_numerics.VARIANTS:
            row = {"model": "small" if rest else "110M", "variant": variant}
            yield "numerics", row, partial(gpu_numerics.compare, model, tokens, variant)

    def memory(self) -> Iterator[Case]:
        """What was measured beside what `train.py --plan` predicts."""
        measured = [
            row
            for row in (*self.rows("training"), *self.rows("grid"))
            if row["step"] == "PLGA" and "temp_GiB" in row
        ]
        for row in measured:
            case = {name: row[name] for name in ("step", "batch", "state_GiB", "temp_GiB")}
            yield "memory", case, partial(self.predicted, row["batch"])

    def predicted(self, batch: int) -> Row:
        """The prediction for one batch."""
        if str(batch) not in self.plan:
            settings = [*self.settings, f"Model.context_length={self.sizes.inputs}"]
            found = gpu_memory.planned([batch], settings, max(self.report.left(), 10))
            self.plan.update(found)
        plan = self.plan[str(batch)]
        row = {f"plan_{x}_GiB": plan[f"{x}_bytes"] / GIB for x in ("state", "step", "saved")}
        return row | {f"h100_{name}": value for name, value in plan.get("h100", {}).items()}


def facts() -> Row:
    """The device and the versions."""
    import flax
    import optax

    device, client = jax.devices()[0], jax.devices()[0].client
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": f"{device.platform}, {client.platform_version}".splitlines()[0],
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "memory_GiB": round(stats.get("bytes_limit", 0) / GIB, 1),
    }


def main() -> None:
    """Parses the command line and runs the cases."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--plan", type=Path, help="what benchmarks/gpu_memory.py printed")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    options = parser.parse_args()
    report = Report(options.output, options.minutes)
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        report.facts = facts()
        print(report.facts, flush=True)
        settings = list(TINY) if options.tiny else []
        cases = Cases(report, settings, SMALL if options.tiny else Sizes(), options.plan)
        for section in options.sections:
            for case in getattr(cases, section)():
                report.case(*case)
    report.write()


if __name__ == "__main__":
    main()
