"""Comparison: the numbers of several runs side by side."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from pldr_jax.analysis.figures import SMALLEST_ORDER, panel_grid, picture
from pldr_jax.analysis.report.files import RunReport
from pldr_jax.analysis.section import Cell, Picture, Section, Table
from pldr_jax.model.low_rank import singular_values
from pldr_jax.plots import COLORS

COMPARED_NUMBERS = ("order_parameter", "causal_gap", "gap", "loss", "relative_rmse", "rank")
"""Numbers of which figures are made: the last part of their path, in this order."""
MOST_PANELS = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Section):
    """The numbers of the sections of two runs or more, as tables and figures.

    Attributes:
      runs: with `g_lm`, the spectra of G_LM are drawn too.
    """

    key = "comparison"
    title = "Comparison"
    runs: Sequence[RunReport]

    @classmethod
    def of_runs(cls, runs: Sequence[RunReport]) -> Self:
        """Compares runs."""
        numbers: dict[str, Any] = {
            "numbers": {
                key: {run.label: _numbers_of(run, key) for run in runs}
                for key in dict.fromkeys(section.key for run in runs for section in run.sections)
            }
        }
        spectra = {
            run.label: median_spectrum(run.g_lm).tolist() for run in runs if run.g_lm is not None
        }
        return cls(numbers=numbers | ({"singular_values": spectra} if spectra else {}), runs=runs)

    def words(self) -> tuple[str, ...]:
        words = [
            f"{run.label}: {run.sections[0].words[0]}"
            for run in self.runs
            if run.sections and run.sections[0].words
        ]
        if len({str(run.facts.get("text")) for run in self.runs}) > 1:
            words.append("The runs were measured on different texts: losses cannot be compared.")
        return tuple(words)

    def tables(self) -> tuple[Table, ...]:
        return tuple(
            _table(key, by_run)
            for key, by_run in self.numbers["numbers"].items()
            if any(map(len, by_run.values()))
        )

    def figures(self) -> tuple[Picture, ...]:
        spectra = self.numbers.get("singular_values", {})
        figures = list(_dots(self.numbers["numbers"], [run.label for run in self.runs]))
        return (*figures, _spectra(spectra)) if spectra else tuple(figures)


def flat_numbers(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """The single values of nested dicts by their dotted paths; lists are left out."""
    values: dict[str, Cell] = {}
    for key, value in numbers.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            values |= flat_numbers(value, f"{path}.")
        elif isinstance(value, np.generic):
            values[path] = value.item()
        elif value is None or isinstance(value, (str, int, float)):
            values[path] = value
    return values


def median_spectrum(g_lm_LNHJ: np.ndarray) -> np.ndarray:
    """Singular values of G_LM over the largest one, the median over the heads of a layer [L,H]."""
    values_LNH = singular_values(g_lm_LNHJ)
    largest_LN1 = np.maximum(values_LNH[..., :1], np.finfo(np.float64).tiny)
    return np.median(values_LNH / largest_LN1, axis=1)


def _numbers_of(run: RunReport, key: str) -> dict[str, Cell]:
    return next((flat_numbers(s.numbers) for s in run.sections if s.key == key), {})


def _table(key: str, by_run: Mapping[str, Mapping[str, Cell]]) -> Table:
    paths = dict.fromkeys(path for values in by_run.values() for path in values)
    rows = tuple((path, *(values.get(path) for values in by_run.values())) for path in paths)
    return Table(f"Section {key}", ("number", *by_run), rows)


def _dots(
    numbers: Mapping[str, Mapping[str, Mapping[str, Cell]]], labels: Sequence[str]
) -> Iterator[Picture]:
    """A panel for each number of `COMPARED_NUMBERS`, a dot for each run."""
    panels: list[tuple[int, str, list[float]]] = []
    for by_run in numbers.values():
        for path in dict.fromkeys(path for values in by_run.values() for path in values):
            last = path.rpartition(".")[2]
            values = [_number(by_run[label].get(path)) for label in labels]
            if last in COMPARED_NUMBERS and _about_g_lm(path) and np.isfinite(values).any():
                panels.append((COMPARED_NUMBERS.index(last), path, values))
    panels = sorted(panels, key=lambda panel: panel[0])[:MOST_PANELS]
    if not panels:
        return
    figure, axes = panel_grid(len(panels), 3, (3.0, 2.8))
    for axis, (_, path, values) in zip(axes, panels, strict=True):
        for i, value in enumerate(values):
            axis.plot([i], [value], "o", color=COLORS[i % len(COLORS)])
        finite = [value for value in values if np.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
            axis.set_yscale("log")
        axis.set_title(path, fontsize=8)
        axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(labels) - 0.5)
    yield picture("comparison_numbers", "Numbers of each run.", figure)


def _about_g_lm(path: str) -> bool:
    """Of the four deductive outputs, G_LM is drawn."""
    return not {"A", "A_LM", "A_P", "float64"} & set(path.split("."))


def _number(value: Cell) -> float:
    """NaN for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return np.nan
    return float(value)


def _spectra(spectra: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """A panel a layer, a line a run."""
    figure, axes = panel_grid(max(map(len, spectra.values())), 3, (3.0, 2.8), sharey=True)
    for i, (label, x_LH) in enumerate(spectra.items()):
        for axis, values_H in zip(axes, x_LH, strict=False):
            shown = np.maximum(values_H, SMALLEST_ORDER)
            place = np.arange(1, len(shown) + 1)
            axis.plot(place, shown, color=COLORS[i % len(COLORS)], label=label)
    for layer, axis in enumerate(axes):
        axis.set_yscale("log")
        axis.set_title(f"layer {layer}", fontsize=9)
    axes[0].legend(fontsize=8)
    caption = (
        "Singular values of the mean G_LM over the largest one, the median over the heads of a "
        "layer."
    )
    return picture("comparison_spectra", caption, figure)
