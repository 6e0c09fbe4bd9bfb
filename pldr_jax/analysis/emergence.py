"""Emergence: how G_LM becomes the same for every text during training, from the checkpoints that
a run folder still holds and the evaluations that its metrics record.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from pldr_jax.analysis.batches import batches, deductive_tensors
from pldr_jax.analysis.figures import SMALLEST_ORDER, picture
from pldr_jax.analysis.invariance.determinants import Determinants
from pldr_jax.analysis.section import DEFAULTS, Picture, Section, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.model.low_rank import RANK_TOLERANCE, numerical_rank, singular_values
from pldr_jax.plots import COLORS, OUTPUT_COLORS, new_figure
from pldr_jax.training.order_parameter import DeductiveStatistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emergence(Section):
    """Order parameter, determinants and rank of G_LM against the step."""

    key = "emergence"
    title = "Over the checkpoints"

    @classmethod
    def measure(
        cls,
        models: Iterable[tuple[int, LanguageModel]],
        rows_RC: np.ndarray,
        evaluations: Sequence[Mapping[str, Any]] = (),
        settings: Settings = DEFAULTS,
    ) -> Self:
        """Measures each checkpoint on the same rows.

        Args:
          models: (step, model), taken one at a time.
          rows_RC: int32 token rows without padding.
          evaluations: rows of `metrics.jsonl`; those without an evaluation are passed over.
        """
        checkpoints = [
            {"step": step} | _checkpoint_numbers(model, rows_RC, settings) for step, model in models
        ]
        curves = {
            name: [
                (row["step"], row[f"eval/{name}"])
                for row in evaluations
                if row.get(f"eval/{name}") is not None
            ]
            for name in ("order_parameter/G_LM", "causal_gap", "loss")
        }
        return cls(numbers={"checkpoints": checkpoints, "evaluations": curves})

    def words(self) -> tuple[str, ...]:
        checkpoints = self.numbers["checkpoints"]
        if not checkpoints:
            return ("There are no checkpoints.",)
        first, last = checkpoints[0], checkpoints[-1]
        return (
            f"Between texts, the order parameter of G_LM is "
            f"{first['order_parameter']['G_LM']:.1e} at step {first['step']:,} and "
            f"{last['order_parameter']['G_LM']:.1e} at step {last['step']:,}; the median rank of "
            f"its mean is {np.median(first['rank']):g} and {np.median(last['rank']):g}. A run "
            "folder keeps its last checkpoints, and more with Checkpoint.keep_every.",
        )

    def tables(self) -> tuple[Table, ...]:
        return (_table(self.numbers["checkpoints"]),)

    def figures(self) -> tuple[Picture, ...]:
        return (_figure(self.numbers["checkpoints"], self.numbers["evaluations"]),)


def _checkpoint_numbers(
    model: LanguageModel, rows_RC: np.ndarray, settings: Settings
) -> dict[str, Any]:
    statistics: dict[str, DeductiveStatistics] = {}
    determinants, g_lm = Determinants(), RunningStatistics()
    for rows_BC, real in batches(rows_RC, settings.batch_size):
        tensors = {name: x[:, :real] for name, x in deductive_tensors(model, rows_BC).items()}
        for name, x_LBNHJ in tensors.items():
            statistics.setdefault(name, DeductiveStatistics()).add(x_LBNHJ)
        determinants.add(tensors["G_LM"])
        g_lm.add(np.moveaxis(tensors["G_LM"], 1, 0))
        settings.advance(real)
    logs = determinants.results()
    spreads = {name: sums.spread() for name, sums in statistics.items()}
    return {
        "order_parameter": {name: spread.order_parameter for name, spread in spreads.items()},
        "rmse_over_std": {name: spread.rmse_over_std for name, spread in spreads.items()},
        "rank": numerical_rank(singular_values(g_lm.mean)).tolist(),
        "log10_determinant": logs["log10_abs"],
        "log10_determinant_std": logs["log10_std"],
    }


def _table(checkpoints: Sequence[Mapping[str, Any]]) -> Table:
    outputs = list(checkpoints[0]["order_parameter"]) if checkpoints else []
    rows = tuple(
        (
            entry["step"],
            *(entry["order_parameter"][name] for name in outputs),
            entry["rmse_over_std"]["G_LM"],
            float(np.median(entry["log10_determinant"])),
            float(np.median(entry["log10_determinant_std"])),
            np.min(entry["rank"]).item(),
            float(np.median(entry["rank"])),
            np.max(entry["rank"]).item(),
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


def _figure(
    checkpoints: Sequence[Mapping[str, Any]], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> Picture:
    figure, axes = new_figure(2, 2, width=9.0, height=5.6, sharex=True)
    order, gap, spread, rank = axes.flat
    steps = [entry["step"] for entry in checkpoints]
    for name in checkpoints[0]["order_parameter"] if checkpoints else ():
        values = [max(entry["order_parameter"][name], SMALLEST_ORDER) for entry in checkpoints]
        order.plot(steps, values, "o", color=OUTPUT_COLORS[name], label=name, markersize=5)
    if curves["order_parameter/G_LM"]:
        at, curve = zip(*curves["order_parameter/G_LM"], strict=True)
        order.plot(at, np.maximum(curve, SMALLEST_ORDER), color=OUTPUT_COLORS["G_LM"], linewidth=1)
    order.set_yscale("log")
    order.set_title("order parameter", fontsize=9)
    if order.get_legend_handles_labels()[0]:
        order.legend(fontsize=8)
    if curves["causal_gap"]:
        gap.plot(*zip(*curves["causal_gap"], strict=True), color=COLORS[1])
    gap.set_title("causal gap, nats a token", fontsize=9)
    medians = [float(np.median(entry["log10_determinant_std"])) for entry in checkpoints]
    spread.plot(steps, np.maximum(medians, SMALLEST_ORDER), "o-", color=COLORS[2])
    spread.set_yscale("log")
    spread.set_title("std of log10 |det G_LM| between texts, median", fontsize=9)
    for what, mark in (("max", "^"), ("median", "o"), ("min", "v")):
        values = [float(getattr(np, what)(entry["rank"])) for entry in checkpoints]
        rank.plot(steps, values, mark, color=COLORS[0], label=what, markersize=5)
    rank.set_title(f"rank of the mean G_LM at {RANK_TOLERANCE:g}", fontsize=9)
    rank.legend(fontsize=8)
    for axis in (spread, rank):
        axis.set_xlabel("step")
    caption = (
        "How G_LM becomes the same for every text: lines are evaluations during training, dots the "
        "checkpoints that the folder holds."
    )
    return picture("emergence", caption, figure)
