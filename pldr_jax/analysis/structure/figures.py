"""The figures of structure."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pldr_jax.analysis.figures import (
    SMALLEST_SHARE,
    heat_map,
    legend_above,
    picture,
    shares_of_largest,
)
from pldr_jax.analysis.section import Picture
from pldr_jax.analysis.structure.distributions import EntryHistograms
from pldr_jax.plots import COLORS, new_figure

LAYERS_SHOWN, HEADS_SHOWN = 8, 8
"""In a grid, at most; of more, this many at even distances, and the caption says so."""

CLIPPED = 0.995
"""Heat maps with a sign saturate at this quantile of the magnitudes of their matrix: a few entries
are far larger than all others."""

DIM_WEIGHT = 1e-3
"""Attention weights below it are drawn like it."""


def structure_figures(
    tensors: dict[str, np.ndarray],
    histograms: Mapping[str, EntryHistograms],
    parameters: Mapping[str, Any],
    weights_LNTS: np.ndarray,
) -> tuple[Picture, ...]:
    """The figures.

    Args:
      tensors: of the section, `mean_<output>` and `singular_values_<output>`.
      histograms: of the deductive outputs, and of P and a.
      parameters: P and a, [L,N,H,J].
      weights_LNTS: attention weights of a prompt.
    """
    names = [name for name in ("A", "A_LM", "A_P", "G_LM") if f"mean_{name}" in tensors]
    pictures = [_spectra({name: tensors[f"singular_values_{name}"] for name in names})]
    outputs = {name: histograms[name] for name in names}
    caption = "Entries of the deductive outputs over all rows, by layer"
    pictures.append(_distributions("structure_distributions", caption, outputs))
    for name in names[::-1]:
        draw = _logarithmic if name in ("A_LM", "A_P") else _signed
        what = f"{name}, mean over rows" if len(names) > 1 else f"{name}, predefined"
        pictures.append(_grid(f"structure_{name}", what, tensors[f"mean_{name}"], draw))
    for name, meaning in {"P": "learned powers P", "a": "learned couplings a"}.items():
        if name in parameters:
            x_LNHJ = np.asarray(parameters[name])
            pictures.append(_grid(f"structure_learned_{name}", meaning, x_LNHJ, _signed))
    if parameters:
        learned = {name: histograms[name] for name in parameters}
        caption = "Entries of the learned powers P and couplings a, by layer"
        pictures.append(_distributions("structure_learned_distributions", caption, learned))
    what = f"attention weights of a prompt of {weights_LNTS.shape[2]} tokens"
    pictures.append(_grid("structure_attention", what, weights_LNTS, _weights))
    return tuple(pictures)


def _spectra(values: dict[str, np.ndarray]) -> Picture:
    """One panel an output and layer, a line a head."""
    layers = evenly_spaced(len(next(iter(values.values()))), LAYERS_SHOWN)
    figure, axes = new_figure(
        len(values),
        len(layers),
        1.0 + 1.9 * len(layers),
        0.5 + 1.5 * len(values),
        sharex=True,
        sharey=True,
    )
    for row, (name, x_LNH) in zip(axes, values.items(), strict=True):
        for axis, layer in zip(row, layers, strict=True):
            for k, share_H in enumerate(shares_of_largest(x_LNH[layer])):
                color = COLORS[k % len(COLORS)]
                axis.semilogy(np.arange(1, len(share_H) + 1), share_H, color=color, linewidth=1.2)
            axis.axhline(1e-3, color="black", linestyle=":", linewidth=0.8)
            axis.set_ylim(SMALLEST_SHARE, 2)
            axis.set_title(f"{name}, layer {layer}", fontsize=9)
        row[0].set_ylabel("share of the largest")
    for axis in axes[-1]:
        axis.set_xlabel("singular value")
    caption = (
        "Singular values of the mean tensors, over the largest of each, a line a head; dotted: "
        f"1e-3. Values below {SMALLEST_SHARE:g} are drawn there."
        f"{_which(len(x_LNH), layers, 'layers')}"
    )
    return picture("structure_spectra", caption, figure)


def _distributions(name: str, caption: str, histograms: Mapping[str, EntryHistograms]) -> Picture:
    """Density of the value above, of its magnitude below; a line a layer."""
    figure, axes = new_figure(2, len(histograms), 0.8 + 2.8 * len(histograms), 5.4)
    for (above, below), (output, entries) in zip(axes.T, histograms.items(), strict=True):
        linear_LE, log_LE = entries.densities()
        layers = evenly_spaced(len(linear_LE), LAYERS_SHOWN)
        centers = 10 ** ((entries.log_edges[1:] + entries.log_edges[:-1]) / 2)
        for k, layer in enumerate(layers):
            style: dict[str, Any] = {
                "color": COLORS[k % len(COLORS)],
                "label": f"layer {layer}",
                "linewidth": 1.2,
                "linestyle": "-" if k < len(COLORS) else "--",
            }
            density = np.where(linear_LE[layer] > 0, linear_LE[layer], np.nan)
            above.stairs(density, entries.linear_edges[layer], baseline=None, **style)
            seen = log_LE[layer] > 0
            below.loglog(centers[seen], log_LE[layer][seen], **style)
        above.set_yscale("log")
        above.locator_params(axis="x", nbins=4)
        above.set_title(output, fontsize=10)
        above.set_xlabel("value")
        below.set_xlabel("magnitude")
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("density per decade")
    legend_above(figure, axes[0, 0])
    caption = (
        f"{caption}: density of the middle 99%, above, and per decade of all magnitudes, below; "
        "densities are on a logarithmic scale."
        f"{_which(len(linear_LE), layers, 'layers')}"
    )
    return picture(name, caption, figure)


Draw = Callable[[Any, np.ndarray], str]
"""Draws one matrix on an axis; returns what the title says of the scale."""


def _grid(name: str, what: str, x_LNHJ: np.ndarray, draw: Draw) -> Picture:
    layers, heads = (
        evenly_spaced(len(x_LNHJ), LAYERS_SHOWN),
        evenly_spaced(x_LNHJ.shape[1], HEADS_SHOWN),
    )
    # A single row or column needs a width that its titles fit in.
    size = 1.6 if len(layers) * len(heads) > 12 else 2.2
    figure, axes = new_figure(
        len(layers), len(heads), max(size * len(heads), 3.4), (size + 0.25) * len(layers)
    )
    for row, layer in zip(axes, layers, strict=True):
        for axis, head in zip(row, heads, strict=True):
            scale = draw(axis, np.asarray(x_LNHJ[layer, head], np.float64))
            axis.set_title(f"layer {layer}, head {head}\n{scale}", fontsize=8)
    caption = (
        f"{what[0].upper()}{what[1:]}; {SCALES[draw]}"
        f"{_which(len(x_LNHJ), layers, 'layers')}{_which(x_LNHJ.shape[1], heads, 'heads')}"
    )
    return picture(name, caption, figure)


def _signed(axis: Any, x_HJ: np.ndarray) -> str:
    magnitudes = np.abs(x_HJ[np.isfinite(x_HJ)])
    if not len(magnitudes):
        heat_map(axis, x_HJ)
        return "not finite"
    limit = float(np.quantile(magnitudes, CLIPPED)) or float(magnitudes.max()) or 1.0
    heat_map(axis, np.clip(x_HJ, -limit, limit))
    return f"± {limit:.2g}"


def _logarithmic(axis: Any, x_HJ: np.ndarray) -> str:
    heat_map(axis, np.log10(np.maximum(x_HJ, 1e-30)), center=False)
    finite = x_HJ[np.isfinite(x_HJ)]
    return f"{finite.min():.0e} … {finite.max():.0e}" if len(finite) else "not finite"


def _weights(axis: Any, x_TS: np.ndarray) -> str:
    visible = np.tril(np.ones(x_TS.shape, bool))
    logarithm = np.log10(np.maximum(x_TS, DIM_WEIGHT))
    heat_map(axis, np.where(visible, logarithm, np.nan), center=False)
    return f"{DIM_WEIGHT:g} … 1"


SCALES: dict[Draw, str] = {
    _signed: f"blue is negative, red positive; each map saturates at the {CLIPPED:.1%} quantile "
    "of its magnitudes, which its title states.",
    _logarithmic: "logarithmic scale, between the smallest and the largest entry, which the title "
    "states.",
    _weights: "queries from top to bottom, keys from left to right, logarithmic scale; white is "
    "masked.",
}


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, at even distances, the first and the last among them."""
    return sorted({int(k) for k in np.linspace(0, count - 1, min(count, most)).round()})


def _which(count: int, chosen: list[int], what: str) -> str:
    return "" if len(chosen) == count else f" {len(chosen)} of the {count} {what} are shown."
