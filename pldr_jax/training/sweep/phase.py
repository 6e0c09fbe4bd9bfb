"""`phase.png`: what became of each learning rate and warm-up of a sweep."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.files import write_whole
from pldr_jax.plots import (
    GREY,
    Axes,
    Figure,
    Normalize,
    ScalarMappable,
    SymLogNorm,
    TwoSlopeNorm,
    new_figure,
    png,
)
from pldr_jax.runs.curves import CONDENSED
from pldr_jax.training.sweep.points import SEED_FIELDS, label
from pldr_jax.training.sweep.runs import Outcome

FILE_NAME = "phase.png"
LEARNING_RATE, WARMUP = "Optimizer.learning_rate", "Optimizer.warmup_steps"
_DECADES = (-9.0, math.log10(CONDENSED), 1.0)
"""log10 of the order parameter: the ends of the colours, and the invariant's limit between them."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One quantity of the diagram: its metric, colours and the text of a value."""

    title: str
    metric: str
    colors: str
    form: str
    logarithmic: bool = False


PANELS = (
    Panel("order parameter of G$_{LM}$", "eval/order_parameter/G_LM", "coolwarm", ".0e", True),
    Panel("causal gap (nats/token)", "eval/causal_gap", "PuOr_r", "+.1e"),
    Panel("held-out loss (nats/token)", "eval/loss", "viridis_r", ".3f"),
)


def write_phase_diagram(folder: Path, outcomes: Sequence[Outcome]) -> Path | None:
    """Draws learning rate against warm-up, a cell a point, with the median over its seeds.

    A row of panels is drawn for each combination of the other fields that vary. A point without a
    finished run is crossed out. None, and nothing is drawn, where neither of the two varies.
    """
    places = [(one.run.config.optimizer, one) for one in outcomes]
    rates = sorted({optimizer.learning_rate for optimizer, _ in places})
    warmups = sorted({optimizer.warmup_steps for optimizer, _ in places})
    if len(rates) == len(warmups) == 1:
        return None
    keys = list(outcomes[0].run.settings)
    others = [key for key in keys if key not in (LEARNING_RATE, WARMUP, *SEED_FIELDS)]
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        values = (f"{label(key, keys)} = {one.run.settings[key]}" for key in others)
        groups.setdefault(", ".join(values), []).append(one)
    width, height = 2.0 + 1.1 * len(warmups), 1.5 + 0.75 * len(rates)
    size = (3 * max(width, 3.6), len(groups) * height)
    figure, grid = new_figure(len(groups), len(PANELS), *size)
    for row, (name, members) in zip(grid, groups.items(), strict=True):
        for axis, panel in zip(row, PANELS, strict=True):
            _draw(axis, figure, panel, members, outcomes, rates, warmups)
            axis.set_title(panel.title, fontsize=12, fontweight="bold")
        row[0].set_ylabel(f"{name}\nlearning rate" if name else "learning rate", fontsize=11)
    path = folder / FILE_NAME
    write_whole(path, png(figure, dpi=130))
    return path


def _draw(
    axis: Axes,
    figure: Figure,
    panel: Panel,
    members: Sequence[Outcome],
    everywhere: Sequence[Outcome],
    rates: Sequence[float],
    warmups: Sequence[int],
) -> None:
    """One panel: cells coloured on the scale of all runs, with their values."""
    norm = _scale(panel, [value for one in everywhere for value in _value(panel, one)])
    colors = ScalarMappable(norm, panel.colors)
    for y, rate in enumerate(rates):
        for x, warmup in enumerate(warmups):
            here = [one for one in members if _is_at(one, rate, warmup)]
            values = [value for one in here for value in _value(panel, one)]
            if values:
                middle = statistics.median(values)
                color = colors.to_rgba(np.asarray(_position(panel, middle)))
                axis.fill_between([x - 0.5, x + 0.5], y - 0.5, y + 0.5, color=color, linewidth=0)
                ink = "white" if np.dot(color[:3], (0.3, 0.59, 0.11)) < 0.5 else "black"
                text = format(middle, panel.form)
                if len(values) > 1:
                    text += f"\n{min(values):{panel.form}} to\n{max(values):{panel.form}}"
                axis.text(x, y, text, ha="center", va="center", color=ink, fontsize=10)
            elif any(one.status == "failed" for one in here):
                axis.text(x, y, "failed", ha="center", va="center", color=GREY, fontsize=10)
            elif here:
                axis.text(x, y, "-", ha="center", va="center", color=GREY, fontsize=10)
    axis.set_xlim(-0.5, len(warmups) - 0.5)
    axis.set_ylim(-0.5, len(rates) - 0.5)
    axis.set_xticks(range(len(warmups)), [str(warmup) for warmup in warmups])
    axis.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axis.set_xlabel("warm-up (steps)", fontsize=11)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(False)
    bar = figure.colorbar(colors, ax=axis, shrink=0.9)
    if panel.logarithmic:
        bar.set_ticks(ticks := list(range(int(_DECADES[0]), int(_DECADES[2]) + 1, 2)))
        bar.set_ticklabels([f"10$^{{{tick}}}$" for tick in ticks])


def _is_at(one: Outcome, rate: float, warmup: int) -> bool:
    optimizer = one.run.config.optimizer
    return (optimizer.learning_rate, optimizer.warmup_steps) == (rate, warmup)


def _value(panel: Panel, one: Outcome) -> list[float]:
    """The value of a finished run; nothing where it has none that is finite."""
    value = one.evaluation.get(panel.metric) if one.status == "finished" else None
    return [value] if isinstance(value, (int, float)) and math.isfinite(value) else []


def _position(panel: Panel, value: float) -> float:
    """Where a value lies on the colour scale."""
    if not panel.logarithmic:
        return value
    return min(max(math.log10(max(value, 1e-300)), _DECADES[0]), _DECADES[2])


def _scale(panel: Panel, values: Sequence[float]) -> Any:
    if panel.logarithmic:
        low, middle, high = _DECADES
        return TwoSlopeNorm(middle, low, high)
    if panel.metric == "eval/causal_gap":
        largest = max([0.01, *map(abs, values)])
        return SymLogNorm(1e-3, vmin=-largest, vmax=largest)
    low, high = min(values, default=0.0), max(values, default=1.0)
    return Normalize(low, high if high > low else low + 1e-3)
