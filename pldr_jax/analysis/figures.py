"""What the figures of several sections share."""

from typing import Any

import numpy as np

from pldr_jax.analysis.section import Picture
from pldr_jax.plots import Axes, new_figure, png

SMALLEST_SHARE = 1e-9
"""Singular values are drawn down to this share of the largest."""

SMALLEST_ORDER = 1e-12
"""Order parameters and spreads are drawn down to this."""


def heat_map(axis: Axes, x_HJ: np.ndarray, title: str = "", center: bool = True) -> Any:
    """Draws a matrix; with `center`, zero is white and both signs have the same scale. Entries that
    are not finite are left white.
    """
    finite = np.isfinite(x_HJ)
    shown = np.where(finite, x_HJ, np.nan)
    low, high = (x_HJ[finite].min(), x_HJ[finite].max()) if finite.any() else (0.0, 1.0)
    if center:
        high = float(max(-low, high)) or 1.0
        low = -high
    colors = "RdBu_r" if center else "viridis"
    image = axis.imshow(shown, interpolation="nearest", cmap=colors, vmin=low, vmax=high)
    axis.set_title(title, fontsize=9)
    axis.grid(False)
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def panel_grid(count: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """A figure with `count` panels of `size` inches each, in rows of at most `columns`; and its
    axes, as many as panels.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = max(size[0] * columns, 3.4), size[1] * rows
    figure, axes = new_figure(rows, columns, width, height, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def shares_of_largest(values_LNH: np.ndarray) -> np.ndarray:
    """Singular values [..., H] over the largest, as they are drawn."""
    largest = np.maximum(values_LNH[..., :1], np.finfo(np.float64).tiny)
    return np.maximum(values_LNH / largest, SMALLEST_SHARE)


def legend_above(figure: Any, axis: Axes) -> None:
    """The legend of one axis, for all of the figure."""
    lines, labels = axis.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def picture(name: str, caption: str, figure: Any) -> Picture:
    """The figure, drawn."""
    return Picture(name, caption, png(figure))
