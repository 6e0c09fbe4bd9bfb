"""`pldr-analyze` as a function: checkpoints to a report folder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pldr_jax.analysis.alteration import ALTERED_NAMES
from pldr_jax.analysis.batches import mean_g_lm
from pldr_jax.analysis.emergence import Emergence
from pldr_jax.analysis.report.comparison import Comparison
from pldr_jax.analysis.report.files import HTML, JSON, RunReport, run_labels, write_report
from pldr_jax.analysis.section import RenderedSection, Section, Settings
from pldr_jax.analysis.sections import chosen_sections
from pldr_jax.analysis.texts import rows_of_file, rows_of_stores
from pldr_jax.api import LanguageModel
from pldr_jax.bucket import bucket_url
from pldr_jax.config import ConfigError, MeshConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.copies import readable_path
from pldr_jax.files import new_folder, user_path
from pldr_jax.inference.intervention import parse_intervention
from pldr_jax.interop.weights import Checkpoint, held_out_text, open_checkpoint
from pldr_jax.model.deductive import read_g_lm
from pldr_jax.partition import build_mesh
from pldr_jax.runs.checksums import complete_steps
from pldr_jax.runs.hub import StepChoice, find_checkpoint
from pldr_jax.runs.metrics import FILE_NAME, read_metrics
from pldr_jax.terminal import Display, LiveBar

DEFAULT_FOLDER = "analysis"


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What to measure and where to write it.

    Attributes:
      runs: run folders, folders with `config.json` and weights, or names of the hub; several are
        compared.
      prompts: a file of text; None takes the held-out text of each run.
      output: the folder of the report; None is `analysis` in the first run.
      rows: of text, at most; 0 takes all.
      length: tokens of a row; None is the context of the model.
      batch_size: rows of one forward pass.
      step: of the checkpoint; None is the newest complete one.
      sections: comma-separated keys; None is all.
      intervention: a change of the deductive outputs of each model (`parse_intervention`).
      other_g: files with a G_LM, or runs, whose G_LM is tried in place of the model's.
      tensors: also write `tensors.npz`.
      float64: also compute the deductive outputs in float64.
      over_checkpoints: also measure every checkpoint of a run folder.
      mesh: of the devices.
    """

    runs: tuple[str, ...]
    prompts: str | None = None
    output: str | None = None
    rows: int = 32
    length: int | None = None
    batch_size: int = 8
    step: int | None = None
    sections: str | None = None
    intervention: str | None = None
    other_g: tuple[str, ...] = ()
    tensors: bool = False
    float64: bool = False
    over_checkpoints: bool = False
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        for name, low in (("rows", 0), ("batch_size", 1), ("length", 2)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"--{name}={value}: must be at least {low}")
        if self.rows == 1:
            raise ConfigError("--rows=1: texts are compared with each other; give 2 or more")
        kept: StepChoice = "all" if self.over_checkpoints else self.step
        found = tuple(str(find_checkpoint(run, "RUN", step=kept).folder) for run in self.runs)
        if self.output is None and (url := bucket_url(self.runs[0])):
            object.__setattr__(self, "output", f"{url}/{DEFAULT_FOLDER}")
        elif self.output is None and Path(found[0]) != user_path(self.runs[0], "RUN"):
            raise ConfigError(f"--out: {self.runs[0]} is of the hub; name a folder for the report")
        object.__setattr__(self, "runs", found)
        for folder in self.runs:
            if not Path(folder).is_dir():
                raise ConfigError(f"{folder!r}: no such folder; give a run folder")
        if self.prompts is not None and not readable_path(self.prompts, "--prompts").is_file():
            raise ConfigError(f"--prompts={self.prompts}: no such file")
        if self.over_checkpoints and self.step is not None:
            raise ConfigError(
                "--over_checkpoints: cannot be given together with --step; choose one"
            )


def analyze(options: ReportOptions) -> tuple[Path | str, list[RunReport]]:
    """Measures and writes the report: all of it or nothing. A section that cannot be measured is a
    line in the report.

    Returns:
      The path of `report.html`, or its URL in a bucket, and what it says of each run.

    Raises:
      ConfigError, CheckpointError: one line, for what cannot be read or written.
    """
    sections = chosen_sections(options.sections)
    folders = [Path(run) for run in options.runs]
    url = bucket_url(options.output or "")
    output = url or user_path(options.output or folders[0] / DEFAULT_FOLDER, "--out")
    steps = [_steps(folder) if options.over_checkpoints else [] for folder in folders]
    total = len(folders) * len(sections) + sum(map(bool, steps))
    with new_folder(output, "--out", JSON) as folder, ReportProgress(total) as progress:
        runs = []
        for run, label, kept in zip(folders, run_labels(folders), steps, strict=True):
            try:
                runs.append(_RunAnalysis(run, label, options, progress).report(kept))
            except OSError as error:  # of the run, not of the output
                raise ConfigError(f"{run}: cannot be read ({error})") from None
        across = [Comparison.of_runs(runs).rendered()] if len(runs) > 1 else []
        write_report(folder, runs, across, options.tensors)
    return f"{url}/{HTML}" if url else Path(output) / HTML, runs


class ReportProgress(LiveBar):
    """Counts the rows of one section after another, of `sections` in all."""

    def __init__(self, sections: int, display: Display | None = None) -> None:
        super().__init__("rows", total=0, display=display)
        self._sections, self._number, self._text = sections, 0, ""

    def start(self, name: str, rows: int) -> None:
        """The next section begins."""
        self._number += 1
        self._text = f"[{self._number}/{self._sections}] {name}"
        self.show(self._text, 0, rows, now=True)

    def advance(self, rows: int) -> None:
        """More rows are done."""
        self.show(self._text, self._completed + rows)


class _RunAnalysis:
    """One run: its model and its text."""

    def __init__(
        self, folder: Path, label: str, options: ReportOptions, progress: ReportProgress
    ) -> None:
        self._folder, self._label = folder, label
        self._options, self._progress = options, progress
        opened, model = _open(folder, options.step, options.mesh)
        if options.intervention is not None:
            model = model.intervened(parse_intervention(options.intervention, model.encode))
        self._model = model
        self._config, self._step = opened.config, opened.step or 0
        self._rows_RC = self._read_rows()

    def report(self, steps: list[int]) -> RunReport:
        """All sections; with `steps`, also over these checkpoints."""
        options, rows_RC = self._options, self._rows_RC
        settings = Settings(
            options.batch_size, options.float64, self._other_g(), self._progress.advance
        )
        rendered = []
        for section in chosen_sections(options.sections):
            self._progress.start(f"{self._label}: {section.key}", len(rows_RC))
            with self._progress.waiting(f"{self._label}: {section.key}, computed or compiled"):
                rendered.append(
                    attempt(section, lambda s=section: s.measure(self._model, rows_RC, settings))
                )
        needs_g_lm = options.tensors or len(options.runs) > 1
        g_lm = mean_g_lm(self._model, rows_RC, options.batch_size) if needs_g_lm else None
        if steps:
            self._progress.start(f"{self._label}: checkpoints", len(rows_RC) * len(steps))
            metrics = self._folder / FILE_NAME
            evaluations = read_metrics(self._folder) if metrics.is_file() else []
            rendered.append(
                attempt(
                    Emergence,
                    lambda: Emergence.measure(
                        self._checkpoints(steps), rows_RC, evaluations, settings
                    ),
                )
            )
        return RunReport(self._label, self._facts(), tuple(rendered), g_lm)

    def _checkpoints(self, steps: list[int]) -> Iterator[tuple[int, LanguageModel]]:
        for step in steps:
            yield step, _open(self._folder, step, self._options.mesh)[1]

    def _read_rows(self) -> np.ndarray:
        """The text to measure on, int32 [R,C]."""
        options, folder, model = self._options, self._folder, self._model
        length = options.length or model.config.context_length
        if length > model.config.context_length:
            raise ConfigError(
                f"--length={length}: {folder} has a context of {model.config.context_length} tokens"
            )
        if options.prompts is not None:
            if model.tokenizer is None:
                raise ConfigError(f"--prompts: {folder} has no tokenizer.model to read text with")
            return rows_of_file(options.prompts, model.tokenizer, options.rows, length)
        text = held_out_text(folder, self._config, "--prompts", self._progress.print)
        stores = [one.validation for one in text.texts]
        return rows_of_stores(stores, options.rows, length, f"the held-out text of {folder}")

    def _other_g(self) -> dict[str, Any]:
        """The G_LMs that `--other_g` names, by the names of the files and folders."""
        paths = [readable_path(path, "--other_g") for path in self._options.other_g]
        labels = run_labels([*ALTERED_NAMES, *paths])[len(ALTERED_NAMES) :]
        return {
            label: _open(path, None, self._options.mesh)[1]
            if path.is_dir()
            else read_g_lm(path, self._model.config, "--other_g")[:, 0]
            for path, label in zip(paths, labels, strict=True)
        }

    def _facts(self) -> dict[str, Any]:
        model = self._model
        return {
            "checkpoint": str(self._folder),
            "step": self._step,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
            "g_source": model.config.g_source,
            "dtype": model.config.dtype,
            "rows": len(self._rows_RC),
            "tokens_of_a_row": self._rows_RC.shape[1],
            "text": self._options.prompts or "held-out text of the run",
            "intervention": self._options.intervention or "none",
            "model": config_to_dict(self._config)["Model"],
        }


def attempt(section: type[Section], measure: Any) -> RenderedSection:
    """The section, measured and rendered; if that fails, one that says why.

    Its numbers are then `error` alone, and the other sections of the report stand.
    """
    try:
        rendered: RenderedSection = measure().rendered()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = (
            lines[0] if isinstance(error, ConfigError) else f"{type(error).__name__}: {lines[0]}"
        )
        words = (f"Could not be measured: {reason}",)
        return RenderedSection(section.key, section.title, words, numbers={"error": reason})
    return rendered


def _steps(folder: Path) -> list[int]:
    """The checkpoints of a run folder."""
    steps = complete_steps(folder / "checkpoints")
    if not steps:
        raise ConfigError(f"--over_checkpoints: {folder} holds no checkpoints of a training run")
    return steps


def _open(
    folder: Path, step: int | None, mesh_config: MeshConfig
) -> tuple[Checkpoint, LanguageModel]:
    """A checkpoint, and its model on the mesh."""
    mesh = build_mesh(mesh_config) if jax.device_count() > 1 else None
    opened = open_checkpoint(folder, step, mesh=mesh)
    # The same numbers, and a fraction of the time to compile.
    model = dataclasses.replace(opened.config.model, unroll=False)
    return opened, LanguageModel(model, opened.params, opened.g_lm, opened.tokenizer, mesh=mesh)
