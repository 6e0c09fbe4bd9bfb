"""Causality in words, tables and figures."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pldr_jax.analysis.figures import legend_above, picture
from pldr_jax.analysis.section import Cell, Picture, Table
from pldr_jax.plots import COLORS, GREY, new_figure

NO_GAP = 1e-3
"""Nats a token. A smaller gap is below the spread of the loss between seeds of a training run: the
ordinary loss can be quoted.
"""

SMALL_GAP = 1e-2
"""Nats a token, the default of `Training.gap_threshold`. With a larger gap the ordinary
loss is that of another task than next-token prediction.
"""

TOKEN_DIFFERENCE = 1e-2
"""Nats. A larger difference of a single token's log-probability is named even where the mean gap
vanishes. The authors' audit found 2.8e-3 on a model that they call invariant.
"""

CURVE_POINTS = 128
"""Of a curve, at most: longer rows are drawn as means of neighbouring positions."""

SMALLEST_NATS = 1e-9
"""Differences below it are drawn in the first bar."""

KINDS = {
    "full": "whole row",
    "prefix": "prefix",
    "other": "another row",
    "calibrated": "calibration mean",
}
"""The G_LMs, and their names for a reader."""


def causality_verdict(gap: float) -> str:
    """In words, of a gap in nats a token; by its magnitude."""
    if not math.isfinite(gap):
        return "not finite"
    if abs(gap) <= NO_GAP:
        return "causal"
    return "nearly causal" if abs(gap) <= SMALL_GAP else "not causal"


def causality_words(numbers: dict[str, Any]) -> tuple[str, ...]:
    """The verdict first."""
    if "prefix_rows" not in numbers:
        return (
            "Causal by construction: G_LM is the same whatever the input, so nothing of a row's "
            "future can reach a position through it, and the gap is 0. "
            f"The held-out loss is {numbers['loss']['full']:.4f} nats a token.",
        )
    gap, loss, difference = numbers["gap"], numbers["loss"], numbers["logprob_difference"]
    prefix = gap["prefix"]
    meaning = {
        "causal": "the ordinary held-out loss is the loss of next-token prediction.",
        "nearly causal": "the ordinary held-out loss is off by a little.",
        "not causal": "the ordinary held-out loss is not that of next-token prediction; quote the "
        "loss with G_LM of the prefix.",
        "not finite": "nothing can be said of such a loss.",
    }[numbers["verdict"]]
    first = (
        f"{numbers['verdict'].capitalize()}: {meaning} With G_LM of the prefix alone "
        f"(sequential) the loss is {loss['prefix']:.4f} nats a token, in one pass over the same "
        f"tokens (block) {loss['full_at_prefix']:.4f}: a gap of {_with_error(prefix)}. Up to "
        f"{NO_GAP:g} in magnitude counts as causal, up to {SMALL_GAP:g} as nearly causal."
    )
    if abs(prefix["mean"]) > NO_GAP and prefix["first_half_share"] is not None:
        first += f" {prefix['first_half_share']:.0%} of it arises in the first half of a row."
    second = (
        f"Log-probabilities of single tokens differ between the two by {difference['mean']:.1e} in "
        f"the mean and {difference['max']:.1e} at most ({difference['tokens']} tokens of "
        f"{numbers['prefix_rows']} rows, {numbers['dtype']})."
    )
    if numbers["verdict"] == "causal" and difference["max"] > TOKEN_DIFFERENCE:
        second += " The gap vanishes only in the mean: single tokens differ."
    third = (
        f"Over {numbers['rows']} rows the loss is {loss['full']:.4f} nats a token with G_LM of the "
        f"whole row. With G_LM of another row the gap to it is {_with_error(gap['other'])}, with "
        f"the mean of {numbers['calibration_rows']} calibration rows "
        f"{_with_error(gap['calibrated'])}."
    )
    return first, second, third


def causality_tables(numbers: dict[str, Any]) -> tuple[Table, ...]:
    """Losses by G_LM, and the differences of single tokens; none of a predefined G_LM."""
    if "prefix_rows" not in numbers:
        return ()
    loss, gap, difference = numbers["loss"], numbers["gap"], numbers["logprob_difference"]
    rows: list[tuple[Cell, ...]] = [("whole row", numbers["rows"], loss["full"], None, None, None)]
    for name in list(KINDS)[1:]:
        entry = gap[name]
        scored = numbers["prefix_rows"] if name == "prefix" else numbers["rows"]
        share = entry["first_half_share"] if abs(entry["mean"]) > NO_GAP else None
        rows.append(
            (KINDS[name], scored, loss[name], entry["mean"], entry["standard_error"], share)
        )
    columns = (
        "G_LM of",
        "rows",
        "loss, nats a token",
        "gap to the whole row",
        "standard error",
        "share of the gap in the first half",
    )
    quantiles = [(f"quantile {q}", value) for q, value in difference["quantiles"].items()]
    spread = (("mean", difference["mean"]), *quantiles, ("max", difference["max"]))
    title = "|Difference| of a token's log-probability, whole row and prefix"
    return (
        Table("Held-out loss by where G_LM comes from", columns, tuple(rows)),
        Table(title, ("", "nats"), spread),
    )


def causality_figures(tensors: dict[str, np.ndarray]) -> tuple[Picture, ...]:
    """The figures.

    Args:
      tensors: of the section: `loss_<kind>`, `gap_<kind>` by position, `prefix_positions`,
        `logprob_difference`; of a predefined G_LM there is `loss_full` alone.
    """
    curves = [_curves(tensors, "loss", _cumulative_mean)]
    if "logprob_difference" in tensors:
        curves += [_curves(tensors, "gap", _cumulative_share), _histogram(tensors)]
    return tuple(curves)


CAPTIONS = {
    "loss": "Held-out loss by position in the row, and its mean up to there, with G_LM of the "
    "whole row, of the prefix alone (fewer rows; the grey line is of the same tokens), of another "
    "row, and the mean of calibration rows.",
    "gap": "Loss minus the loss with G_LM of the whole row, by position, and what the positions up "
    "to there add to the gap: the curves end at it.",
}
Cumulative = Callable[[np.ndarray], np.ndarray]
LABELS = {
    "loss": ("loss", "mean up to the position"),
    "gap": ("gap", "gap from the positions so far"),
}


def _curves(tensors: dict[str, np.ndarray], quantity: str, cumulative: Cumulative) -> Picture:
    figure, axes = new_figure(1, 2, 9.0, 3.6)
    style: dict[str, Any]
    if quantity == "loss" and "loss_full_at_prefix" in tensors:
        x_P, y_P = tensors["prefix_positions"], tensors["loss_full_at_prefix"]
        style = {"color": "#bbbbbb", "label": "whole row, tokens of the prefix", "linewidth": 3.5}
        axes[0, 0].plot(_thinned(x_P), _thinned(y_P), **style)
        axes[0, 1].plot(_thinned(x_P), _thinned(cumulative(y_P)), **style)
    for color, (kind, label) in zip(COLORS, KINDS.items(), strict=False):
        y_T = tensors.get(f"{quantity}_{kind}")
        if y_T is None:
            continue
        x_T = tensors["prefix_positions"] if kind == "prefix" else np.arange(len(y_T))
        style = {"color": color, "label": label, "linewidth": 1.3}
        if kind == "full":
            style["linewidth"] = 3.0
        if kind == "prefix":
            style |= {"marker": "o", "markersize": 3.0, "linestyle": "--", "zorder": 3}
        axes[0, 0].plot(_thinned(x_T), _thinned(y_T), **style)
        axes[0, 1].plot(_thinned(x_T), _thinned(cumulative(y_T)), **style)
    for axis, label in zip(axes[0], LABELS[quantity], strict=True):
        axis.set_xlabel("position in the row")
        axis.set_ylabel(f"{label}, nats")
        if quantity == "gap":
            axis.axhline(0, color="black", linewidth=0.8)
    legend_above(figure, axes[0, 0])
    return picture(f"causality_{quantity}", CAPTIONS[quantity], figure)


def _histogram(tensors: dict[str, np.ndarray]) -> Picture:
    differences = np.abs(tensors["logprob_difference"]).ravel()
    finite = np.maximum(differences[np.isfinite(differences)], SMALLEST_NATS)
    figure, axes = new_figure(1, 1, 6.5, 3.6)
    axis = axes[0, 0]
    if len(finite):
        mean, largest = finite.mean(), finite.max()
        low = np.floor(np.log10(finite.min()))
        edges = np.logspace(low, max(np.ceil(np.log10(largest)), low + 1), 49)
        axis.hist(finite, bins=edges, color=COLORS[0])
        axis.axvline(mean, color=COLORS[1], label=f"mean {mean:.1e}")
        axis.axvline(largest, color=GREY, linestyle="--", label=f"largest {largest:.1e}")
        axis.set_xscale("log")
        axis.legend(frameon=False)
    axis.set_xlabel("|difference of log-probability|, nats")
    axis.set_ylabel("tokens")
    caption = (
        "How much the log-probability of a token differs between one pass over the row and the row "
        f"cut behind it; below {SMALLEST_NATS:g} in the first bar."
    )
    if missing := differences.size - finite.size:
        caption += f" {missing} differences are not finite and are left out."
    return picture("causality_difference", caption, figure)


def _cumulative_mean(y_T: np.ndarray) -> np.ndarray:
    return np.cumsum(y_T) / np.arange(1, len(y_T) + 1)


def _cumulative_share(y_T: np.ndarray) -> np.ndarray:
    return np.cumsum(y_T) / len(y_T)


def _thinned(x_T: ArrayLike) -> np.ndarray:
    """Means of neighbours, at most `CURVE_POINTS` of them."""
    x = np.asarray(x_T, np.float64)
    return np.array([piece.mean() for piece in np.array_split(x, min(len(x), CURVE_POINTS))])


def _with_error(gap: dict[str, Any]) -> str:
    error = gap["standard_error"]
    mean = f"{gap['mean']:.2g}"
    return mean if error is None else f"{mean} (standard error {error:.1g})"
