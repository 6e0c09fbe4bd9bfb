"""What a search for critical values has come to: a table, `critical.csv` and `critical.png`."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pldr_jax.files import write_whole
from pldr_jax.plots import COLORS, Axes, new_figure, png
from pldr_jax.training.sweep.critical import Line, Search
from pldr_jax.training.sweep.points import label

TABLE, FIGURE = "critical.csv", "critical.png"
_BLUE, _ORANGE = COLORS[0], COLORS[1]


def estimate(line: Line, state: Search, threshold: float) -> tuple[float | None, ...]:
    """The critical value and its interval: (value, low, high).

    The value is the geometric mean of the neighbours between which most seeds change sides. The
    interval reaches, on either side, to the nearest value at which all seeds agree. None is what
    lies beyond the ends of the search, or is not known yet.
    """
    inside = state.following is None and 0 <= state.above and state.below < state.size
    value = math.sqrt(line.values[state.above] * line.values[state.below]) if inside else None
    low, high = state.unanimous(threshold)
    ends = (
        line.values[low] if low >= 0 else None,
        line.values[high] if high < state.size else None,
    )
    if line.values[0] > line.values[-1]:
        ends = ends[::-1]
    return value, *ends


def status(state: Search) -> str:
    """`found`, or why there is no value."""
    if state.following is not None:
        return "unfinished"
    return (
        "below at A"
        if state.below == 0
        else "above at B"
        if state.above + 1 == state.size
        else "found"
    )


def runs_made(state: Search) -> int:
    """Finished runs that the search has used."""
    return sum(map(len, state.finished.values()))


def write_table(
    folder: Path, lines: Sequence[Line], states: Sequence[Search], threshold: float
) -> Path:
    """Writes `critical.csv`, one row a line; its path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*lines[0].settings, "status", "critical", "low", "high", "runs"])
    for line, state in zip(lines, states, strict=True):
        numbers = ("" if x is None else format(x, ".4g") for x in estimate(line, state, threshold))
        writer.writerow([*line.settings.values(), status(state), *numbers, runs_made(state)])
    path = folder / TABLE
    write_whole(path, text.getvalue().encode())
    return path


def table_text(lines: Sequence[Line], states: Sequence[Search], threshold: float) -> str:
    """The same as text."""
    table = Table(box=SIMPLE_HEAD)
    keys = list(lines[0].settings)
    for name in (*(label(key, keys) for key in keys), "critical", "interval", "runs", "status"):
        table.add_column(name, justify="right", overflow="fold")
    for line, state in zip(lines, states, strict=True):
        value, low, high = (
            "-" if x is None else f"{x:.3g}" for x in estimate(line, state, threshold)
        )
        settings = map(str, line.settings.values())
        table.add_row(*settings, value, f"{low} to {high}", str(runs_made(state)), status(state))
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(table, markup=False)
    lines_ = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines_ if line.strip())


def write_figure(
    folder: Path, key: str, lines: Sequence[Line], states: Sequence[Search], threshold: float
) -> Path:
    """Draws the line with its intervals, and a mark for each run: filled where it ended below the
    threshold.

    Args:
      key: the searched field.
    """
    figure, grid = new_figure(1, 1, 2.5 + 1.3 * max(2, len(lines)), 4.5)
    axis: Axes = grid[0, 0]
    for x, (line, state) in enumerate(zip(lines, states, strict=True)):
        for index, found in state.finished.items():
            for seed, order in enumerate(found):
                place = x + 0.07 * (seed - (len(line.runs[0]) - 1) / 2)
                face = _BLUE if order < threshold else "white"
                axis.plot(
                    [place], [line.values[index]], "o", markersize=6, color=_BLUE,
                    markerfacecolor=face,
                )  # fmt: skip
        value, low, high = estimate(line, state, threshold)
        edges = sorted((line.values[0], line.values[-1]))
        axis.plot(
            [x + 0.25] * 2, [low or edges[0], high or edges[1]], color=_ORANGE, linewidth=2,
            linestyle="-" if low and high else ":",
        )  # fmt: skip
        if value is not None:
            axis.plot([x + 0.15, x + 0.35], [value] * 2, color=_ORANGE, linewidth=3)
    axis.set_yscale("log")
    axis.set_xlim(-0.5, len(lines) - 0.3)
    names = [", ".join(map(str, line.settings.values())) for line in lines]
    axis.set_xticks(range(len(lines)), names)
    axis.set_xlabel(", ".join(lines[0].settings), fontsize=11)
    axis.set_ylabel(key, fontsize=11)
    axis.set_title(f"order parameter of G$_{{LM}}$ below {threshold:g}: filled", fontsize=11)
    path = folder / FIGURE
    write_whole(path, png(figure, dpi=130))
    return path
