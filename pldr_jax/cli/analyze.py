"""`pldr-analyze`: a report on the deductive outputs of one checkpoint or several."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr_jax.cli.common import STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict, load_config

if TYPE_CHECKING:
    import jax
    import numpy as np

    from pldr_jax.analysis.report.progress import ReportProgress
    from pldr_jax.analysis.report.write import RunReport
    from pldr_jax.analysis.section import Section
    from pldr_jax.analysis.sections import Measurement
    from pldr_jax.api import LanguageModel

DESCRIPTION = (
    "Measures the deductive outputs A, A_LM, A_P and G_LM of trained models, and writes a report: "
    "report.html, report.json and figures. Several RUNs are measured alike and compared."
)
OPTIONS = (
    Option(
        "run",
        "run folder, or folder with config.json and model.safetensors; several are compared",
        metavar="RUN",
        place=True,
        repeat=True,
    ),
    Option(
        "prompts",
        "text, a document a line, or JSONL with prompt or text; default: the run's held-out text",
        metavar="FILE",
    ),
    Option("out", "folder of the report; default: RUN/analysis, of the first RUN", metavar="DIR"),
    Option("rows", "rows of text to measure on; 0 takes all", type=int, default=32, metavar="ROWS"),
    Option(
        "length", "tokens of a row; default: the context of the model", type=int, metavar="TOKENS"
    ),
    Option("batch_size", "rows at once; no result depends on it", type=int, default=8, metavar="N"),
    STEP,
    Option("sections", "comma-separated; default: all", metavar="LIST"),
    Option(
        "other_g",
        "another G_LM to try in place of the model's: an NPZ or safetensors file, or another run",
        repeat=True,
        metavar="PATH",
    ),
    Option("tensors", "also write tensors.npz; its G_LM is one for Model.g_file", type=bool),
    Option("float64", "also compute the deductive outputs in float64, in NumPy: slow", type=bool),
    Option(
        "over_checkpoints", "also measure every checkpoint that the run folder holds", type=bool
    ),
)
DEFAULT_FOLDER = "analysis"


def analyze_main(argv: list[str]) -> None:
    """Parses the command line, measures, and writes the report: all of it or nothing."""
    options = parse_args(argv, "pldr-analyze", DESCRIPTION, OPTIONS)
    config = load_config(options.gin_files, options.overrides)
    _check(options)
    keep_compiled_programs(config.data.cache_dir)

    from pldr_jax.analysis.report.comparison import compare
    from pldr_jax.analysis.report.progress import ReportProgress
    from pldr_jax.analysis.report.write import HTML, JSON, labels, write_report
    from pldr_jax.analysis.sections import chosen
    from pldr_jax.files import new_folder

    measurements = chosen(options.sections)
    output = Path(options.out or Path(options.run[0]) / DEFAULT_FOLDER)
    steps = [_steps(folder) if options.over_checkpoints else [] for folder in options.run]
    total = len(options.run) * len(measurements) + sum(map(bool, steps))
    with new_folder(output, "--out", JSON) as folder, ReportProgress(total) as progress:
        runs = []
        for path, label, kept in zip(options.run, labels(options.run), steps, strict=True):
            runs.append(_measure(Path(path), label, options, config, measurements, kept, progress))
        across = [compare(runs)] if len(runs) > 1 else []
        write_report(folder, runs, across, options.tensors)
    for report in runs:
        for section in report.sections:
            print(f"{report.label}, {section.name}: {section.words[0]}")
    print(f"report: {output / HTML}")


def _check(options: Options) -> None:
    for name, low in (("rows", 0), ("batch_size", 1), ("length", 2)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name}={value}: must be at least {low}")
    if options.rows == 1:
        raise ConfigError("--rows=1: texts are compared with each other; give 2 or more")
    for folder in options.run:
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder!r}: no such folder; give a run folder")
    if options.prompts is not None and not Path(options.prompts).is_file():
        raise ConfigError(f"--prompts={options.prompts}: no such file")
    if options.over_checkpoints and options.step is not None:
        raise ConfigError("--over_checkpoints: cannot be given together with --step; choose one")


def _steps(folder: str) -> list[int]:
    """The checkpoints of a run folder."""
    from pldr_jax.runs.checksums import complete_steps

    found = complete_steps(Path(folder) / "checkpoints")
    if not found:
        raise ConfigError(f"--over_checkpoints: {folder} holds no checkpoints of a training run")
    return found


def _measure(
    folder: Path,
    label: str,
    options: Options,
    config: ExperimentConfig,
    measurements: "dict[str, Measurement]",
    steps: list[int],
    progress: "ReportProgress",
) -> "RunReport":
    """Everything of one run."""
    from pldr_jax.analysis.batches import mean_g_lm
    from pldr_jax.analysis.report.write import RunReport
    from pldr_jax.analysis.sections import run_section

    stored, step, lm = _open(folder, options.step, config)
    rows_RC = _rows(folder, stored, lm, options, progress)
    others = _others(options.other_g, lm, config)
    sections = []
    for name, measurement in measurements.items():
        progress.start(f"{label}: {name}", len(rows_RC))
        settings = {"float64": options.float64, "others": others}
        sections.append(
            run_section(measurement, lm, rows_RC, options.batch_size, settings, progress.advance)
        )
    needed = options.tensors or len(options.run) > 1
    g_lm = mean_g_lm(lm, rows_RC, options.batch_size) if needed else None
    facts = _facts(folder, step, stored, lm, rows_RC, options)
    del lm
    if steps:
        progress.start(f"{label}: checkpoints", len(rows_RC) * len(steps))
        sections.append(_emergence(folder, steps, config, rows_RC, options, progress))
    return RunReport(label, facts, tuple(sections), g_lm)


def _open(
    folder: Path, step: int | None, config: ExperimentConfig
) -> "tuple[ExperimentConfig, int, LanguageModel]":
    """The config a checkpoint was trained by, its step, and the model on the mesh of `config`."""
    import jax

    from pldr_jax.api import LanguageModel
    from pldr_jax.interop.weights import open_checkpoint
    from pldr_jax.partition import build_mesh

    opened = open_checkpoint(folder, step)
    mesh = build_mesh(config.mesh) if jax.device_count() > 1 else None
    # The same numbers, and a fraction of the time to compile.
    model = dataclasses.replace(opened.config.model, unroll=False)
    lm = LanguageModel(model, opened.params, opened.g_lm, opened.tokenizer, mesh=mesh)
    return opened.config, opened.step or 0, lm


def _others(
    paths: list[str], lm: "LanguageModel", config: ExperimentConfig
) -> "dict[str, jax.Array | LanguageModel]":
    """What `--other_g` names, by the names of the files and folders."""
    from pldr_jax.analysis.alteration import NAMES
    from pldr_jax.analysis.report.write import labels
    from pldr_jax.model.deductive import read_g_lm

    names = labels([*NAMES, *paths])[len(NAMES) :]
    return {
        label: _open(Path(path), None, config)[2]
        if Path(path).is_dir()
        else read_g_lm(path, lm.config, "--other_g")[:, 0]
        for path, label in zip(paths, names, strict=True)
    }


def _rows(
    folder: Path,
    stored: ExperimentConfig,
    lm: "LanguageModel",
    options: Options,
    progress: "ReportProgress",
) -> "np.ndarray":
    """The text to measure on, int32 [R,C]."""
    from pldr_jax.analysis.texts import rows_of_file, rows_of_stores
    from pldr_jax.interop.weights import held_out_text

    length = options.length or lm.config.context_length
    if length > lm.config.context_length:
        raise ConfigError(
            f"--length={length}: {folder} has a context of {lm.config.context_length} tokens"
        )
    if options.prompts is not None:
        if lm.tokenizer is None:
            raise ConfigError(f"--prompts: {folder} has no tokenizer.model to read text with")
        return rows_of_file(options.prompts, lm.tokenizer, options.rows, length)
    text = held_out_text(folder, stored, "--prompts", progress.print)
    stores = [part.validation for part in text.parts]
    return rows_of_stores(stores, options.rows, length, f"the held-out text of {folder}")


def _emergence(
    folder: Path,
    steps: list[int],
    config: ExperimentConfig,
    rows_RC: "np.ndarray",
    options: Options,
    progress: "ReportProgress",
) -> "Section":
    from pldr_jax.analysis import emergence
    from pldr_jax.runs.metrics import FILE_NAME, read_metrics

    def models() -> "Iterator[tuple[int, LanguageModel]]":
        for step in steps:
            yield step, _open(folder, step, config)[2]

    evaluations = read_metrics(folder) if (folder / FILE_NAME).is_file() else []
    return emergence.measure(models(), rows_RC, evaluations, options.batch_size, progress.advance)


def _facts(
    folder: Path,
    step: int,
    stored: ExperimentConfig,
    lm: "LanguageModel",
    rows_RC: "np.ndarray",
    options: Options,
) -> dict[str, Any]:
    """Of checkpoint and text."""
    import jax

    return {
        "checkpoint": str(folder),
        "step": step,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(lm.params)),
        "g_source": lm.config.g_source,
        "dtype": lm.config.dtype,
        "rows": len(rows_RC),
        "tokens_of_a_row": rows_RC.shape[1],
        "text": options.prompts or "held-out text of the run",
        "model": config_to_dict(stored)["Model"],
    }


def main() -> None:
    """Entry point."""
    run(analyze_main)
