"""Figures as PNG, in one look. The only file that imports matplotlib."""

import contextlib
import io
import os
from typing import Any

import numpy as np

# A notebook names a backend here that its subprocesses may not have; none is needed to write PNG.
_BACKEND = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, SymLogNorm, TwoSlopeNorm
    from matplotlib.figure import Figure
finally:
    if _BACKEND is not None:
        os.environ["MPLBACKEND"] = _BACKEND
        with contextlib.suppress(ValueError):  # pyplot of a notebook draws where it always does
            matplotlib.rcParams["backend"] = _BACKEND

__all__ = [
    "COLORS",
    "GREY",
    "OUTPUT_COLORS",
    "Axes",
    "Figure",
    "Normalize",
    "ScalarMappable",
    "SymLogNorm",
    "TwoSlopeNorm",
    "new_figure",
    "png",
]

COLORS = ("#2a6fbb", "#d9541e", "#3a923a", "#8a4fa3", "#777777", "#b8860b")
"""Of lines, in their order: blue, orange, green, purple, grey, ochre."""

GREY = COLORS[4]

OUTPUT_COLORS = dict(zip(("A", "A_LM", "A_P", "G_LM"), COLORS, strict=False))
"""Of the deductive outputs."""


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


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
