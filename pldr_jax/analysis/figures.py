"""Figures of the analysis: one look for all of them. The only file here that knows matplotlib."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#2a6fbb", "#d9541e", "#3a923a", "#8a4fa3", "#777777", "#b8860b")
"""Of lines, in their order."""

OUTPUT_COLORS = dict(zip(("A", "A_LM", "A_P", "G_LM"), COLORS, strict=False))


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 4.0, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches and its axes [rows, columns].

    Args:
      options: for `Figure.subplots`, such as sharex.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def heat_map(axis: Axes, x_HJ: np.ndarray, title: str = "", center: bool = True) -> Any:
    """Draws a matrix; with `center`, zero is white and both signs have the same scale."""
    limit = float(np.nanmax(np.abs(x_HJ))) or 1.0
    bounds = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if center else {"cmap": "viridis"}
    image = axis.imshow(x_HJ, interpolation="nearest", **bounds)
    axis.set_title(title, fontsize=9)
    axis.grid(False)
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
