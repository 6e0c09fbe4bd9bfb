"""Emergence: how G_LM becomes the same for every text during training, from the checkpoints that
a run folder still holds and the evaluations that its metrics record.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pldr_jax.analysis.batches import batches, deductive_outputs
from pldr_jax.analysis.figures import COLORS, OUTPUT_COLORS, new_figure, png
from pldr_jax.analysis.invariance.determinants import Determinants
from pldr_jax.analysis.section import Picture, Section, Table
from pldr_jax.api import LanguageModel
from pldr_jax.training.evaluate import DeductiveStatistics
from pldr_jax.training.freeze.certificate import RANK_TOLERANCE, spectrum

_FLOOR = 1e-12


def measure(
    models: Iterable[tuple[int, LanguageModel]],
    rows_RC: np.ndarray,
    evaluations: Sequence[Mapping[str, Any]] = (),
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda n: None,
) -> Section:
    """Order parameter, determinants and rank of G_LM against the step.

    Args:
      models: (step, model), taken one at a time.
      rows_RC: int32 token rows without padding, the same for all.
      evaluations: rows of `metrics.jsonl`; those without an evaluation are passed over.
      batch_size: rows in one call.
      advance: takes the number of rows that were done.
    """
    checkpoints = [
        {"step": step} | _measured(model, rows_RC, batch_size, advance) for step, model in models
    ]
    curves = {
        name: [
            (row["step"], row[f"eval/{name}"])
            for row in evaluations
            if row.get(f"eval/{name}") is not None
        ]
        for name in ("order_parameter/G_LM", "causal_gap", "loss")
    }
    return Section(
        "emergence",
        "Over the checkpoints",
        tuple(_words(checkpoints)),
        (_table(checkpoints),),
        (_picture(checkpoints, curves),),
        {"checkpoints": checkpoints, "evaluations": curves},
    )


def _measured(
    model: LanguageModel, rows_RC: np.ndarray, batch_size: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Of one checkpoint."""
    statistics: dict[str, DeductiveStatistics] = {}
    determinants, total = Determinants(), np.zeros(())
    for rows_BC, real in batches(rows_RC, batch_size):
        for name, x_LBNHJ in deductive_outputs(model, rows_BC).items():
            statistics.setdefault(name, DeductiveStatistics()).add(x_LBNHJ[:, :real])
            if name == "G_LM":
                determinants.add(x_LBNHJ[:, :real])
                total = total + x_LBNHJ[:, :real].astype(np.float64).sum(1, keepdims=True)
        advance(real)
    found = determinants.results()
    spreads = {name: sums.spread() for name, sums in statistics.items()}
    return {
        "order_parameter": {name: spread.order_parameter for name, spread in spreads.items()},
        "rmse_over_std": {name: spread.rmse_over_std for name, spread in spreads.items()},
        "rank": spectrum(total / len(rows_RC))["rank"],
        "log10_determinant": found["log10_abs"],
        "log10_determinant_std": found["log10_std"],
    }


def _words(checkpoints: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not checkpoints:
        yield "There are no checkpoints."
        return
    first, last = checkpoints[0], checkpoints[-1]
    yield (
        f"Between texts, the order parameter of G_LM is "
        f"{first['order_parameter']['G_LM']:.1e} at step {first['step']:,} and "
        f"{last['order_parameter']['G_LM']:.1e} at step {last['step']:,}; the median rank of its "
        f"mean is {np.median(first['rank']):g} and {np.median(last['rank']):g}. A run folder keeps "
        "its last checkpoints, and more with Checkpoint.keep_every."
    )


def _table(checkpoints: Sequence[Mapping[str, Any]]) -> Table:
    outputs = list(checkpoints[0]["order_parameter"]) if checkpoints else []
    rows = tuple(
        (
            entry["step"],
            *(entry["order_parameter"][name] for name in outputs),
            entry["rmse_over_std"]["G_LM"],
            float(np.median(entry["log10_determinant"])),
            float(np.median(entry["log10_determinant_std"])),
            int(np.min(entry["rank"])),
            float(np.median(entry["rank"])),
            int(np.max(entry["rank"])),
        )
        for entry in checkpoints
    )
    return Table(
        "Between texts; determinants are the median over the heads of all layers, and ranks those "
        f"of the mean G_LM at {RANK_TOLERANCE:g} of its largest singular value",
        (
            "step",
            *(f"order parameter of {name}" for name in outputs),
            "RMSE / std of G_LM",
            "log10 |det|",
            "its std between texts",
            "lowest rank",
            "median",
            "highest",
        ),
        rows,
    )


def _picture(
    checkpoints: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> Picture:
    figure, axes = new_figure(2, 2, width=9.0, height=5.6, sharex=True)
    order, gap, spread, rank = axes.flat
    steps = [entry["step"] for entry in checkpoints]
    for name in checkpoints[0]["order_parameter"] if checkpoints else ():
        values = [max(entry["order_parameter"][name], _FLOOR) for entry in checkpoints]
        order.plot(steps, values, "o", color=OUTPUT_COLORS[name], label=name, markersize=5)
    if curves["order_parameter/G_LM"]:
        at, curve = zip(*curves["order_parameter/G_LM"], strict=True)
        order.plot(at, np.maximum(curve, _FLOOR), color=OUTPUT_COLORS["G_LM"], linewidth=1)
    order.set_yscale("log")
    order.set_title("order parameter", fontsize=9)
    if order.get_legend_handles_labels()[0]:
        order.legend(fontsize=8)
    if curves["causal_gap"]:
        gap.plot(*zip(*curves["causal_gap"], strict=True), color=COLORS[1])
    gap.set_title("causal gap, nats a token", fontsize=9)
    medians = [float(np.median(entry["log10_determinant_std"])) for entry in checkpoints]
    spread.plot(steps, np.maximum(medians, _FLOOR), "o-", color=COLORS[2])
    spread.set_yscale("log")
    spread.set_title("std of log10 |det G_LM| between texts, median", fontsize=9)
    for what, mark in (("max", "^"), ("median", "o"), ("min", "v")):
        values = [float(getattr(np, what)(entry["rank"])) for entry in checkpoints]
        rank.plot(steps, values, mark, color=COLORS[0], label=what, markersize=5)
    rank.set_title(f"rank of the mean G_LM at {RANK_TOLERANCE:g}", fontsize=9)
    rank.legend(fontsize=8)
    for axis in (spread, rank):
        axis.set_xlabel("step")
    return Picture(
        "emergence",
        "How G_LM becomes the same for every text: lines are evaluations during training, dots "
        "the checkpoints that the folder holds.",
        png(figure),
    )
