"""A GPU in one command: rates, training, decoding, numerics and prefill of the 110M model.

    python benchmarks/gpu.py --minutes 6 --output results
    python benchmarks/gpu.py --minutes 4 --sections rates grid     # rates first: shares need them

Runs from the repository with nothing but JAX, Flax, Optax and NumPy. The most important cases come
first. Those of a wave are compiled side by side on all cores, and measured one after the other
when all are; what is not compiled while time is left is skipped. After every row `gpu.json` and
`gpu.md` are written anew; a case that fails is a row with its error. `kernels.txt` says which
kernels and which parts of the model the step spends its time in, `hlo_summary.txt` what it was
compiled to, `step.hlo.gz` is that itself.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax

from benchmarks import gpu_profile
from benchmarks.gpu_cases import (
    FLAGS,
    GIB,
    PRODUCTS,
    Case,
    Compiled,
    Decoding,
    Prefill,
    Step,
    changed,
    copy_rate,
    product_rate,
)
from benchmarks.gpu_numerics import VARIANTS, Numerics
from benchmarks.gpu_report import Report, Row
from pldr_jax.config.load import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pldr_110m.gin"
TINY = ("Model.vocab_size=64", "Model.num_layers=2", "Model.num_heads=2", "Model.head_dim=8",
        "Model.num_residual_layers=2")  # fmt: skip
WAVES = (
    ("rates",),
    ("step",),
    ("decode", "numerics"),
    ("batches",),
    ("grid",),
    ("prefill", "more"),
)
SECTIONS = tuple(section for wave in WAVES for section in wave)

SPARE = 15
"""Seconds that are left for measuring what has been compiled."""

PLAIN_WIDTHS = {
    "pldr_jax.model.layers.aligned": lambda axis, width: width,
    "pldr_jax.model.layers.on_gpu": lambda: False,
}
RESIDUAL_SCANNED = {"pldr_jax.model.plga.residual_unroll": lambda config: 1}
"""What stands in for functions of the package while a step is traced."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the cases."""

    product: int = 8192
    copied: int = 2**28
    row: int = 1024
    batch: int = 16
    batches: tuple[int, int, int] = (32, 64, 8)
    slots: tuple[int, int, int] = (1, 32, 128)
    steps: int = 64
    prompts: tuple[tuple[int, int], ...] = ((1, 512), (8, 1024), (32, 512))
    checked: int = 128


SMALL = Sizes(64, 2**10, 18, 2, (4, 3, 1), (1, 2, 3), 8, ((1, 16),), 16)


class Cases:
    """All cases; a method a wave."""

    def __init__(self, report: Report, settings: list[str], sizes: Sizes) -> None:
        self.report, self.sizes = report, sizes
        self.config = load_config([CONFIG], settings)

    def rates(self) -> list[Case]:
        """What the device does at best."""
        report, sizes = self.report, self.sizes
        cases = [
            Case(
                "rates",
                {"of": name},
                dict,
                lambda _, n=name: product_rate(report, n, sizes.product),
            )
            for name in PRODUCTS
        ]
        return [
            *cases, Case("rates", {"of": "copy"}, dict, lambda _: copy_rate(report, sizes.copied))
        ]  # fmt: skip

    def training(
        self,
        name: str,
        batch: int = 0,
        patches: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        **model: Any,
    ) -> Case:
        """A training step, with rows as `train.py` has them, another `Model` or other options."""
        batch, length = batch or self.sizes.batch, model.pop("row", self.sizes.row)
        step = Step(self.report, changed(self.config, batch, context_length=length, **model))

        def lower() -> dict[str, Any]:
            with contextlib.ExitStack() as stack:
                for target, stand_in in (patches or {}).items():
                    stack.enter_context(mock.patch(target, stand_in))
                return step.lower()

        def measure(compiled: Compiled) -> Row:
            try:
                return step.measure(compiled)
            finally:
                step.release()

        row = {"step": name, "batch": batch, "inputs": length - 1}
        return Case("training", row, lower, measure, options, step.prepare)

    def step(self) -> list[Case]:
        """The step as configured, and its kernels."""
        case = self.training("PLGA")
        config = changed(self.config, self.sizes.batch, context_length=self.sizes.row)
        step = Step(self.report, config)
        traced = Case(
            "profile", {"step": "PLGA"}, step.lower, partial(self.profile, step), FLAGS["no graphs"]
        )
        return [case, traced]

    def profile(self, step: Step, compiled: Compiled) -> Row:
        """Traces the step without command buffers, whose kernels would have no names."""
        folder, hlo = self.report.folder, compiled["step"].as_text()
        (folder / "step.hlo.gz").write_bytes(gzip.compress(hlo.encode()))
        (folder / "hlo_summary.txt").write_text(gpu_profile.hlo_summary(hlo))
        step.start(compiled["step"])
        jax.block_until_ready([step(), step()])
        kernels = gpu_profile.traced_kernels(step)
        step.release()
        (folder / "kernels.txt").write_text(gpu_profile.kernel_tables(kernels, hlo))
        spent = sum(kernel["us"] for kernel in kernels) / 1e3
        share = gpu_profile.attributed(kernels, hlo)
        return {"kernels": len(kernels), "device_ms": spent, "attributed": share}

    def decoding(self, variant: str, batch: int, flags: str = "", **model: Any) -> Case:
        """Decode steps."""
        config = changed(self.config, 1, context_length=self.sizes.row, **model)
        made = Decoding(self.report, config, variant, batch, self.sizes.steps)
        row = {"variant": variant, "dtype": config.model.dtype, "batch": batch, "flags": flags}
        return Case("decode", row, made.lower, made.measure, FLAGS[flags] if flags else None)

    def decode(self) -> list[Case]:
        """One slot with each set of flags, and more slots."""
        one, some, many = self.sizes.slots
        cases = [self.decoding("KV+G", one), self.decoding("KV+G", one, "loops in graphs")]
        cases += [self.decoding("KV+G", batch, "loops in graphs") for batch in (some, many)]
        cases += [self.decoding("KV+G", batch) for batch in (some, many)]
        cases.append(self.decoding("KV+G", one, "small graphs"))
        return [*cases, self.decoding("SDPA", one, "loops in graphs")]

    def numerics(self) -> list[Case]:
        """Differences from a CPU."""
        return [self.numbers(variant) for variant in list(VARIANTS)[:3]]

    def numbers(self, variant: str) -> Case:
        """Those of one variant."""
        made = Numerics(self.config, self.sizes.checked, variant)
        return Case("numerics", {"variant": variant}, made.lower, made.measure)

    def batches(self) -> list[Case]:
        """Larger batches, the identity model, and what is likely to be fastest."""
        first, second, _ = self.sizes.batches
        fast: dict[str, Any] = {"unroll": True, "remat_plga": False, "patches": RESIDUAL_SCANNED}
        return [
            self.training("PLGA, layers unrolled, no remat_plga", **fast),
            self.training("PLGA", first),
            self.training("SDPA", g_source="identity"),
            self.training("SDPA, layers unrolled", g_source="identity", unroll=True),
            self.training("PLGA, layers unrolled, no remat_plga", first, **fast),
            self.training("PLGA", second),
        ]

    def grid(self) -> list[Case]:
        """What each change brings."""
        first, second, _ = self.sizes.batches
        return [
            self.training("PLGA, plain widths", patches=PLAIN_WIDTHS),
            self.training("PLGA, no remat_plga", remat_plga=False),
            self.training("PLGA, layers unrolled", unroll=True, patches=RESIDUAL_SCANNED),
            self.training("PLGA, no triton gemm", options=FLAGS["no triton gemm"]),
            self.training("SDPA", first, g_source="identity"),
            self.training("PLGA, 1024 inputs", row=self.sizes.row + 1),
            self.training("PLGA, unrolled", unroll=True),
        ]

    def prefill(self) -> list[Case]:
        """Prompts."""
        cases = []
        for batch, tokens in self.sizes.prompts:
            made = Prefill(self.report, self.config, batch, tokens)
            row = {"dtype": "bfloat16", "batch": batch, "tokens": tokens}
            cases.append(Case("prefill", row, made.lower, made.measure))
        return cases

    def more(self) -> list[Case]:
        """What else is of interest."""
        one, some, _ = self.sizes.slots
        first, second, small = self.sizes.batches
        return [
            self.training("PLGA, xla attention", attention_kernel="xla"),
            self.training("PLGA, R=0", num_residual_layers=0),
            self.training("PLGA, plga_precision=default", plga_precision="default"),
            self.training("PLGA, unrolled, no remat_plga", unroll=True, remat_plga=False),
            self.training("PLGA float32", dtype="float32"),
            self.training("PLGA", small),
            self.training("SDPA", second, g_source="identity"),
            self.decoding("frozen", some),
            self.decoding("KV", some),
            self.decoding("KV+G", one, dtype="float32"),
            *(self.numbers(variant) for variant in list(VARIANTS)[3:]),
        ]


def compiled(lowered: dict[str, Any], options: dict[str, Any] | None) -> Compiled:
    """What a case asked for, compiled."""
    if jax.default_backend() == "cpu":
        options = None
    start = time.perf_counter()
    programs = {name: program.compile(options) for name, program in lowered.items()}
    return {**programs, "seconds": time.perf_counter() - start}


def run_wave(report: Report, cases: list[Case], pool: concurrent.futures.Executor) -> None:
    """Traces the cases, compiles them in the pool, and measures them in turn."""
    jobs: list[Any] = []
    for case in cases:
        try:
            if case.section != "rates" and report.left() < SPARE:
                raise TimeoutError("no time")
            jobs.append(pool.submit(compiled, case.lower(), case.options))
        except Exception as error:
            jobs.append(failed(error))
    for case in cases if report.left() > SPARE else []:
        with contextlib.suppress(Exception):  # measuring says what is wrong
            case.prepare()
    concurrent.futures.wait(jobs, timeout=max(report.left() - SPARE, 1))
    for case, job in zip(cases, jobs, strict=True):
        if job.done() and isinstance(job.exception(), TimeoutError):
            report.add(case.section, {**case.row, "skipped": "no time"})
        elif job.done():
            report.case(case.section, case.row, lambda c=case, j=job: c.measure(j.result()))
        else:
            report.add(case.section, {**case.row, "skipped": "not compiled in time"})
        jobs[jobs.index(job)] = None  # frees the program


def failed(error: Exception) -> Any:
    """A job that ended with an error."""
    job: concurrent.futures.Future[Any] = concurrent.futures.Future()
    job.set_exception(error)
    return job


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
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    options = parser.parse_args()
    report = Report(options.output, options.minutes)
    report.facts = facts()
    print(report.facts, flush=True)
    cases = Cases(report, list(TINY) if options.tiny else [], SMALL if options.tiny else Sizes())
    pool = concurrent.futures.ThreadPoolExecutor(max(os.cpu_count() or 2, 2))
    for wave in WAVES:
        sections = [section for section in wave if section in options.sections]
        run_wave(report, [case for x in sections for case in getattr(cases, x)()], pool)
    report.write()
    sys.stdout.flush()
    os._exit(0)  # without waiting for what is still being compiled


if __name__ == "__main__":
    main()
