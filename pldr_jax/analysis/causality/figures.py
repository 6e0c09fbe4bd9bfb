"""Figures of the measurement of causality."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pldr_jax.analysis.figures import COLORS, new_figure, png
from pldr_jax.analysis.section import Picture

DRAWN = 128
"""Points of a curve, at most: longer rows are drawn as means of neighbouring positions."""

SMALLEST = 1e-9
"""Nats; differences below it are drawn in the first bar."""


def pictures_of(tensors: dict[str, np.ndarray], kinds: dict[str, str]) -> tuple[Picture, ...]:
    """The pictures.

    Args:
      tensors: of the section: `loss_<kind>`, `gap_<kind>` by position, `prefix_positions`,
        `logprob_difference`; what is not there is not drawn.
      kinds: the G_LMs, and their names for a reader.
    """
    pictures = [_curves(tensors, kinds, "loss", _cumulative_mean)]
    if "logprob_difference" in tensors:
        pictures += [_curves(tensors, kinds, "gap", _cumulative_share), _histogram(tensors)]
    return tuple(pictures)


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


def _curves(
    tensors: dict[str, np.ndarray], kinds: dict[str, str], quantity: str, cumulative: Cumulative
) -> Picture:
    figure, axes = new_figure(1, 2, 9.0, 3.6)
    style: dict[str, Any]
    if quantity == "loss" and "loss_full_at_prefix" in tensors:
        x_P, y_P = tensors["prefix_positions"], tensors["loss_full_at_prefix"]
        style = {"color": "#bbbbbb", "label": "whole row, tokens of the prefix", "linewidth": 3.5}
        axes[0, 0].plot(_thinned(x_P), _thinned(y_P), **style)
        axes[0, 1].plot(_thinned(x_P), _thinned(cumulative(y_P)), **style)
    for color, (kind, label) in zip(COLORS, kinds.items(), strict=False):
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
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return Picture(f"causality_{quantity}", CAPTIONS[quantity], png(figure))


def _histogram(tensors: dict[str, np.ndarray]) -> Picture:
    differences = np.nan_to_num(np.abs(tensors["logprob_difference"]).ravel())
    differences = np.maximum(differences, SMALLEST)
    low, high = np.log10(differences.min()), np.log10(differences.max())
    edges = np.logspace(np.floor(low), max(np.ceil(high), np.floor(low) + 1), 49)
    figure, axes = new_figure(1, 1, 6.5, 3.6)
    axis = axes[0, 0]
    axis.hist(differences, bins=edges, color=COLORS[0])
    axis.axvline(differences.mean(), color=COLORS[1], label=f"mean {differences.mean():.1e}")
    axis.axvline(
        differences.max(), color=COLORS[4], linestyle="--", label=f"largest {differences.max():.1e}"
    )
    axis.set_xscale("log")
    axis.set_xlabel("|difference of log-probability|, nats")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False)
    caption = (
        "How much the log-probability of a token differs between one pass over the row and the row "
        f"cut behind it; below {SMALLEST:g} in the first bar."
    )
    return Picture("causality_difference", caption, png(figure))


def _cumulative_mean(y_T: np.ndarray) -> np.ndarray:
    return np.cumsum(y_T) / np.arange(1, len(y_T) + 1)


def _cumulative_share(y_T: np.ndarray) -> np.ndarray:
    return np.cumsum(y_T) / len(y_T)


def _thinned(x_T: ArrayLike) -> np.ndarray:
    """Means of neighbours, at most `DRAWN` of them."""
    x = np.asarray(x_T, np.float64)
    return np.array([part.mean() for part in np.array_split(x, min(len(x), DRAWN))])
