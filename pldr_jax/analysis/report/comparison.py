"""Comparison: what was measured of several runs, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pldr_jax.analysis.figures import COLORS, new_figure, png
from pldr_jax.analysis.report.write import RunReport
from pldr_jax.analysis.section import Cell, Picture, Section, Table

DRAWN = ("order_parameter", "causal_gap", "gap", "loss", "relative_rmse", "rank")
"""Numbers of which figures are made: the last part of their path, in this order."""
MAX_DRAWN = 9
_FLOOR = 1e-12


def compare(runs: Sequence[RunReport]) -> Section:
    """The numbers of the sections of two runs or more, as tables and figures.

    Args:
      runs: with `g_lm`, the spectra of G_LM are drawn too.
    """
    numbers = {
        name: {run.label: _numbers_of(run, name) for run in runs}
        for name in dict.fromkeys(section.name for run in runs for section in run.sections)
    }
    tables = [
        _table(name, by_run) for name, by_run in numbers.items() if any(map(len, by_run.values()))
    ]
    found: dict[str, Any] = {"numbers": numbers}
    pictures = list(_dots(numbers, [run.label for run in runs]))
    spectra = {run.label: spectrum(run.g_lm) for run in runs if run.g_lm is not None}
    if spectra:
        pictures.append(_spectra(spectra))
        found["singular_values"] = {label: x_LH.tolist() for label, x_LH in spectra.items()}
    return Section(
        "comparison",
        "Comparison",
        tuple(_words(runs)),
        tuple(tables),
        tuple(pictures),
        found,
    )


def flat(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """The single values of nested dicts by their dotted paths; lists are left out."""
    values: dict[str, Cell] = {}
    for key, value in numbers.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            values |= flat(value, f"{path}.")
        elif isinstance(value, np.generic):
            values[path] = value.item()
        elif value is None or isinstance(value, (str, int, float)):
            values[path] = value
    return values


def spectrum(g_lm_LNHJ: np.ndarray) -> np.ndarray:
    """Singular values of G_LM over the largest one, the median over the heads of a layer [L,H]."""
    values_LNH = np.linalg.svd(np.asarray(g_lm_LNHJ, np.float64), compute_uv=False)
    largest_LN1 = np.maximum(values_LNH[..., :1], np.finfo(np.float64).tiny)
    return np.median(values_LNH / largest_LN1, axis=1)


def _numbers_of(run: RunReport, name: str) -> dict[str, Cell]:
    return next((flat(s.numbers) for s in run.sections if s.name == name), {})


def _words(runs: Sequence[RunReport]) -> Iterator[str]:
    for run in runs:
        for section in run.sections[:1]:
            yield f"{run.label}: {section.words[0] if section.words else ''}"
    texts = {str(run.facts.get("text")) for run in runs}
    if len(texts) > 1:
        yield "The runs were measured on different texts: losses cannot be compared."


def _table(name: str, by_run: Mapping[str, Mapping[str, Cell]]) -> Table:
    paths = dict.fromkeys(path for values in by_run.values() for path in values)
    rows = tuple((path, *(values.get(path) for values in by_run.values())) for path in paths)
    return Table(f"Section {name}", ("number", *by_run), rows)


def _dots(
    numbers: Mapping[str, Mapping[str, Mapping[str, Cell]]], labels: Sequence[str]
) -> Iterator[Picture]:
    """A panel for each number of `DRAWN`, a dot for each run."""
    panels: list[tuple[int, str, list[float]]] = []
    for by_run in numbers.values():
        for path in dict.fromkeys(path for values in by_run.values() for path in values):
            last = path.rpartition(".")[2]
            values = [_number(by_run[label].get(path)) for label in labels]
            if last in DRAWN and _about_g_lm(path) and np.isfinite(values).any():
                panels.append((DRAWN.index(last), path, values))
    panels = sorted(panels, key=lambda panel: panel[0])[:MAX_DRAWN]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, width=9.0, height=2.8 * rows)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (_, path, values) in zip(axes.flat, panels, strict=False):
        for i, value in enumerate(values):
            axis.plot([i], [value], "o", color=COLORS[i % len(COLORS)])
        finite = [value for value in values if np.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
            axis.set_yscale("log")
        axis.set_title(path, fontsize=8)
        axis.set_xticks(range(len(labels)), labels, rotation=20, ha="right", fontsize=8)
        axis.set_xlim(-0.5, len(labels) - 0.5)
    yield Picture("comparison_numbers", "Numbers of each run.", png(figure))


def _about_g_lm(path: str) -> bool:
    """Of the four deductive outputs, G_LM is drawn."""
    return not {"A", "A_LM", "A_P", "float64"} & set(path.split("."))


def _number(value: Cell) -> float:
    """NaN for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        return np.nan
    return float(value)


def _spectra(spectra: Mapping[str, np.ndarray]) -> Picture:
    n_layers = max(len(x_LH) for x_LH in spectra.values())
    columns = min(3, n_layers)
    rows = -(-n_layers // columns)
    figure, axes = new_figure(rows, columns, width=9.0, height=2.8 * rows, sharey=True)
    for axis in axes.flat[n_layers:]:
        axis.set_visible(False)
    for i, (label, x_LH) in enumerate(spectra.items()):
        for layer, values_H in enumerate(x_LH):
            place = np.arange(1, len(values_H) + 1)
            shown = np.maximum(values_H, _FLOOR)
            axes.flat[layer].plot(place, shown, color=COLORS[i % len(COLORS)], label=label)
    for layer, axis in enumerate(axes.flat[:n_layers]):
        axis.set_yscale("log")
        axis.set_title(f"layer {layer}", fontsize=9)
    axes.flat[0].legend(fontsize=8)
    return Picture(
        "comparison_spectra",
        "Singular values of the mean G_LM over the largest one, the median over the heads of a "
        "layer.",
        png(figure),
    )
