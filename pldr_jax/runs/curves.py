"""What runs leave to look at: `curves.png` from the metrics of one or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.files import write_whole
from pldr_jax.plots import COLORS, GREY, OUTPUT_COLORS, Axes, new_figure, png
from pldr_jax.runs.metrics import FILE_NAME, read_metrics

CONDENSED = 1e-3
"""Order parameter below which deductive outputs count as the same for all inputs."""

_BLUE, _ORANGE, _PURPLE = COLORS[0], COLORS[1], COLORS[3]
_STYLE: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 4}
_LINES = ("-", "--")
MOST_COMPARED = len(COLORS) * len(_LINES)
"""Runs that can be told apart in one picture."""


def write_curves(run_dir: str | Path) -> Path | None:
    """Draws losses, causal gap and order parameters over steps; None where there are no metrics.

    Raises:
      MetricsError: the metrics cannot be read.
    """
    run_dir = Path(run_dir)
    if not (run_dir / FILE_NAME).is_file() or not (rows := read_metrics(run_dir)):
        return None
    figure, grid = new_figure(3, 1, 9, 10, sharex=True, height_ratios=[1.25, 1, 1])
    axes = grid[:, 0]
    figure.suptitle(run_dir.resolve().name, fontsize=15, fontweight="bold")
    _draw_losses(axes[0], rows)
    _draw_gap(axes[1], rows)
    _draw_order_parameters(axes[2], rows)
    for axis in axes:
        axis.tick_params(labelsize=11)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(
                fontsize=11, frameon=False, ncols=5, loc="lower left",
                bbox_to_anchor=(-0.01, 0.99), borderaxespad=0.2, columnspacing=1.6,
            )  # fmt: skip
        else:
            axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color=GREY)
    axes[-1].set_xlabel("step", fontsize=12)
    figure.align_ylabels(axes)
    path = run_dir / "curves.png"
    write_whole(path, png(figure, dpi=130))
    return path


def write_comparison(folder: Path, runs: Mapping[str, Path]) -> Path | None:
    """Draws loss and accuracy of several runs over steps, thin in training and with marks on
    held-out text, in `curves.png` of `folder`; None where fewer than 2 runs, or more than
    `MOST_COMPARED`, have metrics.

    Args:
      runs: run folders by the names that the legend has.

    Raises:
      MetricsError: metrics that cannot be read.
    """
    read = {name: read_metrics(run) for name, run in runs.items() if (run / FILE_NAME).is_file()}
    read = {name: rows for name, rows in read.items() if rows}
    if not 2 <= len(read) <= MOST_COMPARED:
        return None
    columns = 2 if max(map(len, read)) < 40 else 1
    legend_rows = -(-len(read) // columns)
    figure, grid = new_figure(1, 2, 11, 4.4 + 0.28 * legend_rows)
    axes = grid[0]
    quantities = {"loss": "loss (nats/token)", "accuracy": "accuracy"}
    for axis, (quantity, title) in zip(axes, quantities.items(), strict=True):
        shown: list[np.ndarray] = []
        for number, (name, rows) in enumerate(read.items()):
            color = COLORS[number % len(COLORS)]
            line = _LINES[number // len(COLORS)]
            steps, values = _series(rows, f"train/{quantity}")
            if len(values):
                smooth = _smooth(values, max(1, min(25, len(values) // 20)))
                axis.plot(steps, smooth, color=color, linestyle=line, linewidth=0.9, alpha=0.5)
            held_out = f"eval/{quantity}"
            shown.append(_draw(axis, rows, held_out, color=color, linestyle=line, label=name))
        _crop(axis, np.concatenate(shown))
        axis.set_ylabel(title, fontsize=12)
        axis.set_xlabel("step", fontsize=12)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=columns,
        frameon=False, fontsize=11,
    )  # fmt: skip
    path = folder / "curves.png"
    write_whole(path, png(figure, dpi=80))
    return path


def _crop(axis: Axes, values: np.ndarray) -> None:
    """The range of the values that are finite, and as much on either side: not the first steps."""
    values = values[np.isfinite(values)]
    if len(values) and (room := values.max() - values.min()) > 0:
        axis.set_ylim(values.min() - 0.3 * room, values.max() + 0.5 * room)


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number for `name`."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, float), np.asarray(values, float)


def _draw(axis: Axes, rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> np.ndarray:
    """Draws one metric, where there is any of it, and returns its values."""
    steps, values = _series(rows, name)
    if len(values):
        axis.plot(steps, values, **{**_STYLE, **style})
    return values


def _draw_losses(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, values = _series(rows, "train/loss")
    if len(values):
        window = max(1, min(25, len(values) // 20))
        axis.plot(steps, values, color=GREY, alpha=0.35, linewidth=0.8)
        axis.plot(
            steps, _smooth(values, window), color=GREY, linewidth=1.6, label="train, smoothed",
            marker="o" if len(values) == 1 else None,
        )  # fmt: skip
    _draw(axis, rows, "eval/loss", color=_BLUE, label="held out")
    _draw(
        axis, rows, "eval/loss_frozen_g", color=_ORANGE, linestyle="--",
        label="held out, G$_{LM}$ frozen",
    )  # fmt: skip
    axis.set_ylabel("loss (nats/token)", fontsize=12)


def _draw_gap(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    values = _draw(axis, rows, "eval/causal_gap", color=_PURPLE, label="causal gap")
    axis.set_yscale("symlog", linthresh=1e-3)
    if len(values):
        axis.axhline(0, color=GREY, linewidth=1)
        axis.set_ylim(min(-1e-3, 2 * values.min()), max(1e-2, 2 * values.max()))
    axis.set_ylabel("causal gap (nats/token)", fontsize=12)


def _draw_order_parameters(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    drawn = False
    for output, color in OUTPUT_COLORS.items():
        steps, values = _series(rows, f"eval/order_parameter/{output}")
        positive = values > 0
        if positive.any():
            drawn = True
            symbol, _, index = output.partition("_")
            label = f"${symbol}_{{{index}}}$" if index else f"${symbol}$"
            axis.plot(steps[positive], values[positive], color=color, label=label, **_STYLE)
    if drawn:
        axis.set_yscale("log")
        axis.axhline(CONDENSED, color=GREY, linestyle=":", linewidth=1.5, label="10$^{-3}$")
    axis.set_ylabel("order parameter", fontsize=12)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` values around each point, of fewer at the ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    start, end = np.maximum(here - window // 2, 0), np.minimum(here + window // 2 + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)
