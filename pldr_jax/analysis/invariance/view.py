"""Invariance in words, tables and figures; `numbers` are those of the section."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from pldr_jax.analysis.figures import SMALLEST_ORDER, heat_map, picture
from pldr_jax.analysis.section import Picture, Table
from pldr_jax.model.audits import OPERATOR_INVARIANT
from pldr_jax.plots import OUTPUT_COLORS, new_figure

INVARIANT = 1e-3
"""RMSE of G_LM over its size, up to which it counts as the same tensor for every text.

The size is the larger of the mean's magnitude and the standard deviation. The order parameter
divides by the mean alone, which can be far smaller: in a published G_LM of a near-critical 110M
model the mean is 1/2400 of the standard deviation.
"""
NEARLY_INVARIANT = 1e-2
"""The same, up to which it counts as nearly the same tensor; untrained models are above."""
COMPARISONS = {
    "runs": "run 1 and run 2, G_LM recomputed",
    "cached": "run 1 and the cached run",
    "samples": "a text and the next one",
}


def invariance_verdict(value: float) -> str:
    """`value` is a `relative_rmse` of G_LM; NaN is not invariant."""
    if value <= INVARIANT:
        return "invariant"
    return "nearly invariant" if value <= NEARLY_INVARIANT else "not invariant"


def invariance_words(numbers: dict[str, Any]) -> Iterator[str]:
    """The verdict first."""
    found = numbers["float32"]
    parameters = {name: found[name]["G_LM"]["order_parameter"] for name in COMPARISONS}
    yield (
        f"G_LM is {numbers['verdict']}: between texts and runs it differs by up to "
        f"{numbers['relative_rmse']:.1e} of its size (invariant up to {INVARIANT:g}, nearly up to "
        f"{NEARLY_INVARIANT:g}). Its order parameter is {parameters['runs']:.1e} between two runs "
        f"without caches, {parameters['cached']:.1e} between those and the cached run, and "
        f"{parameters['samples']:.1e} between different texts."
    )
    yield (
        f"{numbers['rows']} prompts of {numbers['prompt_tokens']} tokens were continued by "
        f"{numbers['new_tokens']} drawn tokens (temperature 1). With the same draws, the cached "
        f"run wrote {numbers['same_tokens']:.1%} of the tokens of run 1 before it first differed."
    )
    order = found["runs"]["G_LM"]
    verdict = "operator-invariant" if numbers["operator_invariant"] else "not operator-invariant"
    yield (
        f"It is {verdict}: the stabilised order parameter, rms of the difference over the mean rms "
        f"of the two, of G_LM between two sampled continuations of a prompt is "
        f"{order['order_rms']:.1e} on average over the prompts and {order['order_rms_max']:.1e} at "
        f"most (operator-invariant below {OPERATOR_INVARIANT:g})."
    )
    mean, std = (found["samples"]["G_LM"][name] for name in ("mean", "std"))
    if abs(mean) < 0.1 * std:
        yield (
            f"The mean of G_LM, {mean:.1e}, is small beside its standard deviation, {std:.1e}: "
            "the order parameter divides by it and is large for that reason too. The verdict "
            "divides by the larger of the two."
        )
    if numbers["dtype"] != "float32":
        yield (
            f"This model computes in {numbers['dtype']}; what is upstream of Q^T Q is rounded to "
            "that, and differences below its precision are no sign of dependence on the text."
        )
    if "float64" in numbers:
        exact = numbers["float64"]["samples"]["G_LM"]["order_parameter"]
        yield (
            f"In float64 the order parameter between texts is {exact:.1e}: what is left there is "
            "no rounding. Float64 is the NumPy model of the logit check, on the same texts."
        )


def invariance_tables(numbers: dict[str, Any]) -> Iterator[Table]:
    """In both precisions, where there are two."""
    for precision in ("float32", "float64"):
        if precision not in numbers:
            continue
        found = numbers[precision]
        columns = ("mean", "std", "rmse", "order_parameter", "order_rms", "rmse_over_std")
        yield Table(
            f"All layers, {precision}",
            (
                "output",
                "compared",
                "mean",
                "std",
                "RMSE",
                "order parameter",
                "stabilised, mean over pairs",
                "RMSE / std",
            ),  # fmt: skip
            tuple(
                (output, words, *(found[comparison][output][name] for name in columns))
                for output in found["runs"]
                for comparison, words in COMPARISONS.items()
            ),
        )
        by_layer = {
            (output, name): found[name][output]["by_layer"]["order_parameter"]
            for output in found["runs"]
            for name in COMPARISONS
        }
        yield Table(
            f"Order parameter by layer, {precision}",
            ("layer", *(f"{output}, {name}" for output, name in by_layer)),
            tuple((i, *row) for i, row in enumerate(zip(*by_layer.values(), strict=True))),
        )
        yield determinant_table(found["determinants"], precision)


def determinant_table(found: dict[str, Any], precision: str) -> Table:
    """A line a layer; `found` may lack comparisons."""
    compared = [name for name in COMPARISONS if name in found]
    logs, spread = np.asarray(found["log10_abs"]), np.asarray(found["log10_std"])
    rows = []
    for i in range(len(logs)):
        agreement = [
            float(np.min(found[name][what][i]))
            for name in compared
            for what in ("decimals", "digits")
        ]
        share = float(np.mean(found["positive"][i]))
        layer = (float(logs[i].min()), float(logs[i].max()), float(spread[i].max()), share)
        rows.append((i, *layer, *agreement))
    return Table(
        f"Determinants of G_LM, {precision}: log10 |det| of the heads of a layer, and the fewest "
        "decimals (of the determinant itself) and digits (relative to it) in which two agree",
        (
            "layer",
            "lowest log10 |det|",
            "highest",
            "largest std between texts",
            "share above 0",
            *(f"{name}: {what}" for name in compared for what in ("decimals", "digits")),
        ),
        tuple(rows),
    )


def order_parameter_figure(found: dict[str, Any]) -> Picture:
    """By layer, in one precision; a panel a comparison."""
    figure, axes = new_figure(1, len(COMPARISONS), width=9.0, height=3.4, sharey=True)
    for axis, (name, words) in zip(axes.flat, COMPARISONS.items(), strict=True):
        for output, entry in found[name].items():
            values = np.maximum(entry["by_layer"]["order_parameter"], SMALLEST_ORDER)
            color = OUTPUT_COLORS[output]
            axis.plot(range(len(values)), values, "o-", color=color, markersize=4, label=output)
        axis.set_yscale("log")
        axis.set_xticks(range(len(values)))
        axis.set_title(words, fontsize=9)
        axis.set_xlabel("layer")
    axes[0, 0].set_ylabel("order parameter")
    axes[0, 0].legend(fontsize=8)
    caption = (
        "RMSE over the magnitude of the mean, by layer. Values below "
        f"{SMALLEST_ORDER:g} are drawn there."
    )
    return picture("invariance_order_parameter", caption, figure)


def determinant_figure(found: dict[str, Any]) -> Picture:
    """Size and agreement by layer and head; `found` may lack comparisons."""
    panels = {"log10 |det|, mean": np.asarray(found["log10_abs"])}
    if "samples" in found:
        panels["digits in which two texts agree"] = np.clip(found["samples"]["digits"], 0, 16)
    figure, axes = new_figure(1, len(panels), width=8.0, height=3.0)
    for axis, (title, x_LN) in zip(axes.flat, panels.items(), strict=True):
        if np.isfinite(x_LN).any():
            figure.colorbar(heat_map(axis, x_LN, title, center=False), ax=axis)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
    caption = "Determinants of G_LM by layer and head; white: singular or not finite."
    return picture("invariance_determinants", caption, figure)
