"""Sections to files: `report.html`, `report.json`, figures, and tensors on request."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.analysis.report.html import page
from pldr_jax.analysis.section import RenderedSection, Table

HTML, JSON, FIGURES, TENSORS = "report.html", "report.json", "figures", "tensors"
G_LM = "G_LM"
"""Key of the mean G_LM in the file of tensors, as `Model.g_file` takes it."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The report on one checkpoint.

    Attributes:
      label: names it in the report and in names of files; see `labels`.
      facts: about the checkpoint and the text, for people and programs.
      sections: in the order of the report.
      g_lm: mean over the rows, [L,N,H,J]; None where it was not computed.
    """

    label: str
    facts: dict[str, Any]
    sections: tuple[RenderedSection, ...]
    g_lm: np.ndarray | None = None


def write_report(
    folder: Path,
    runs: Sequence[RunReport],
    across: Sequence[RenderedSection] = (),
    tensors: bool = False,
) -> None:
    """Writes all files into a folder.

    Args:
      runs: at least one.
      across: sections about all of them together.
      tensors: also writes `tensors.npz` (`tensors_LABEL.npz` where there are several runs): `G_LM`,
        [L,N,H,J], is the mean over the rows in float32; tensors of a section are `section.key`.
    """
    several = len(runs) > 1
    figures = folder / FIGURES
    figures.mkdir()
    for run in runs:
        for section in run.sections:
            _write_figures(figures, section, _prefix(run, several))
        if tensors:
            name = f"{TENSORS}_{run.label}.npz" if several else f"{TENSORS}.npz"
            _write_tensors(folder / name, run)
    for section in across:
        _write_figures(figures, section, "")
    content = {
        "format": 1,
        "runs": {
            run.label: run.facts | {"sections": _sections(run.sections, _prefix(run, several))}
            for run in runs
        },
        "across": _sections(across),
    }
    text = json.dumps(json_values(content), indent=1, allow_nan=False)
    (folder / JSON).write_text(text + "\n", encoding="utf-8")
    chapters = [("All runs", across)] if across else []
    chapters += [(run.label, run.sections) for run in runs]
    title = "Deductive outputs of " + ", ".join(run.label for run in runs)
    (folder / HTML).write_text(page(title, _facts(runs), chapters), encoding="utf-8")


def json_values(value: Any) -> Any:
    """Plain values for JSON, which knows no NumPy and no infinities: numbers that are not finite
    become the strings "NaN", "Infinity" and "-Infinity".

    Raises:
      TypeError: something that JSON cannot hold.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return json_values(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} in a report")


def run_labels(paths: Sequence[str | Path]) -> list[str]:
    """A short name of each path that files can be named by, no two the same."""
    labels: list[str] = []
    for path in paths:
        name = re.sub(r"[^A-Za-z0-9.=-]+", "_", Path(path).resolve().name) or "run"
        numbered = (f"{name}_{k}" for k in range(2, len(paths) + 2))
        labels.append(name if name not in labels else next(n for n in numbered if n not in labels))
    return labels


def _prefix(run: RunReport, several: bool) -> str:
    """Of the names of its figures."""
    return f"{run.label}_" if several else ""


def _write_figures(folder: Path, section: RenderedSection, prefix: str) -> None:
    for picture in section.figures:
        (folder / f"{prefix}{picture.name}.png").write_bytes(picture.png)


def _write_tensors(path: Path, run: RunReport) -> None:
    assert run.g_lm is not None
    tensors = {G_LM: np.asarray(run.g_lm, np.float32)}
    for section in run.sections:
        tensors |= {f"{section.key}.{name}": x for name, x in section.tensors.items()}
    np.savez_compressed(path, **tensors)  # type: ignore[arg-type]


def _sections(sections: Sequence[RenderedSection], prefix: str = "") -> dict[str, Any]:
    return {
        section.key: {
            "title": section.title,
            "words": section.words,
            "numbers": section.numbers,
            "figures": [f"{FIGURES}/{prefix}{picture.name}.png" for picture in section.figures],
        }
        for section in sections
    }


def _facts(runs: Sequence[RunReport]) -> Table:
    """What was measured: a column a run."""
    names = dict.fromkeys(name for run in runs for name in run.facts)
    return Table(
        "What was measured",
        ("", *(run.label for run in runs)),
        tuple(
            (name.replace("_", " "), *(_cell(run.facts.get(name)) for run in runs))
            for name in names
            if not any(isinstance(run.facts.get(name), Mapping) for run in runs)
        ),
    )


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float)) else str(value)
