"""How nearly singular G_LM is, and what decoding with fewer ranks of it saves and costs."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import NOT_FINITE, batches, mean_g_lm
from pldr_jax.analysis.figures import panel_grid, picture, shares_of_largest
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.model.low_rank import singular_values
from pldr_jax.partition import mesh_scope
from pldr_jax.plots import COLORS, new_figure
from pldr_jax.training.freeze.rank_budget import BUDGETS, measure_budgets
from pldr_jax.training.losses import PAD_ID

HARMLESS = 1e-2
"""Nats a token: budgets with a smaller KL divergence are called harmless."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(ModelSection):
    """Singular values, ranks and key caches by error budget, and the logits with them."""

    key = "low_rank"
    title = "G_LM of low rank"

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        budgets: Sequence[float] = BUDGETS,
    ) -> Self:
        """Measures each budget.

        The mean over the rows stands for a learned G_LM, in place of each row's own; the logits
        compared are those with that tensor, whole and of low rank.

        Args:
          rows_RC: of at least two columns; the first C - 1 are inputs.
          budgets: relative errors of G_LM (`pldr_jax/model/low_rank.py:smallest_ranks`).

        Raises:
          ConfigError: a G_LM or logits that are not finite.
        """
        g_lm, source = _g_lm(model, rows_RC, settings.batch_size)
        real_rows = [real for _, real in batches(rows_RC[:, :1], settings.batch_size)]
        sizes = iter(real_rows)
        with mesh_scope(model.mesh):
            measured = measure_budgets(
                model.config,
                model.params,
                g_lm,
                _padded(rows_RC, settings.batch_size),
                budgets,
                done=lambda: settings.advance(next(sizes)),
            )
        if any(m["loss"]["before"] is None for m in measured):
            raise ConfigError(NOT_FINITE.format("logits of held-out rows"))
        return cls(
            numbers={"g_lm": source, "budgets": measured},
            tensors={"low_rank/singular_values": singular_values(np.asarray(g_lm)[:, 0])},
        )

    def words(self) -> tuple[str, ...]:
        return (
            _verdict(self.numbers["budgets"]),
            "G_LM = U S V^T; with the first E singular vectors, scores are "
            "(q U S)(V^T k)^T / sqrt(H), and E numbers are cached of a key instead of H. The error "
            "budget is ||G - G_E|| / ||G|| in the Frobenius norm, for each head by itself. Heads "
            "of a layer that keep the same rank are one array, at most four in a layer: 'ideal' is "
            "every head at its own rank, 'kept' what is cached, 'padded' all heads of a layer at "
            "the largest rank of it.",
            f"The G_LM measured is {self.numbers['g_lm']}; differences are to the model with that "
            "tensor whole.",
        )

    def tables(self) -> tuple[Table, ...]:
        measured = self.numbers["budgets"]
        return _savings_table(measured), _cost_table(measured), _rank_table(measured)

    def figures(self) -> tuple[Picture, ...]:
        values_LNH = self.tensors["low_rank/singular_values"]
        return spectra_figure(values_LNH), _trade_figure(self.numbers["budgets"])


def _g_lm(model: LanguageModel, rows_RC: np.ndarray, batch_size: int) -> tuple[Any, str]:
    """One G_LM [L,1,N,H,J] for all rows, and what it is."""
    if model.g_lm is not None:
        return model.g_lm, "the model's own"
    if model.config.g_source == "identity":
        return identity_g_lm(model.config), "the identity"
    mean_LNHJ = mean_g_lm(model, rows_RC[:, :-1], batch_size)
    return jnp.asarray(mean_LNHJ[:, None], jnp.float32), "the mean over the rows"


def _padded(rows_RC: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Batches; what the last one lacks is padding, which is not scored."""
    for batch_BC, real in batches(rows_RC, batch_size):
        batch_BC[real:] = PAD_ID
        yield batch_BC


def _verdict(measured: list[dict[str, Any]]) -> str:
    harmless = [m for m in measured if m["kl"]["mean"] is not None and m["kl"]["mean"] <= HARMLESS]
    best = max(harmless, key=lambda m: m["cache"], default=None)
    if best is None or best["keys"]["ideal"] < 1.05:
        return (
            "G_LM has full rank: no key can be cached in fewer numbers without changing the model."
        )
    return (
        f"At a relative error of {best['budget']:g} of G_LM, keys are cached in "
        f"{best['keys']['kept']:.2f} times fewer numbers, and keys and values together in "
        f"{best['cache']:.2f} times fewer; that moves the distribution of the next token by "
        f"{best['kl']['mean']:.1e} nats on average and changes "
        f"{1 - best['greedy_agreement']:.2%} of the greedy tokens."
    )


def _savings_table(measured: list[dict[str, Any]]) -> Table:
    return Table(
        "How many times smaller the cache is",
        ("budget", "mean rank", "keys, ideal", "keys, kept", "keys, padded", "keys and values"),
        tuple(
            (
                f"{m['budget']:g}",
                float(np.mean(m["rank"])),
                *(m["keys"][name] for name in ("ideal", "kept", "padded")),
                m["cache"],
            )
            for m in measured
        ),
    )


def _cost_table(measured: list[dict[str, Any]]) -> Table:
    return Table(
        "What it changes",
        (
            "budget",
            "|logit difference|, mean",
            "max",
            "KL, nats a token",
            "loss before",
            "after",
            "greedy tokens the same",
        ),
        tuple(
            (
                f"{m['budget']:g}",
                m["logit_difference"]["mean"],
                m["logit_difference"]["max"],
                m["kl"]["mean"],
                m["loss"]["before"],
                m["loss"]["after"],
                m["greedy_agreement"],
            )
            for m in measured
        ),
    )


def _rank_table(measured: list[dict[str, Any]]) -> Table:
    """The smallest rank of each head within each budget."""
    layers = range(len(measured[0]["rank"]))
    return Table(
        "Smallest rank of each head",
        ("layer", *(f"{m['budget']:g}" for m in measured)),
        tuple(
            (layer, *(" ".join(map(str, m["rank"][layer])) for m in measured)) for layer in layers
        ),
    )


def spectra_figure(values_LNH: np.ndarray) -> Picture:
    """Singular values of every head, a panel for each layer."""
    figure, panels = panel_grid(len(values_LNH), 5, (2.4, 2.5), sharex=True, sharey=True)
    index_H = np.arange(1, values_LNH.shape[-1] + 1)
    for layer, (axis, share_NH) in enumerate(
        zip(panels, shares_of_largest(values_LNH), strict=True)
    ):
        axis.semilogy(index_H, share_NH.T, color=COLORS[0], linewidth=1, alpha=0.6)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_ylim(5e-10, 2)
    figure.supxlabel("singular value", fontsize=9)
    figure.supylabel("share of the largest", fontsize=9)
    caption = "Singular values of G_LM over the largest of their head; a line is a head."
    return picture("low_rank_spectra", caption, figure)


def _trade_figure(measured: list[dict[str, Any]]) -> Picture:
    """Logit error and KL divergence against the cached keys."""
    figure, axes = new_figure(1, 2, width=8.0, height=3.4)
    keys = [m["keys"]["kept"] for m in measured]
    panels = (
        ("largest logit difference", [m["logit_difference"]["max"] for m in measured]),
        ("mean KL, nats a token", [m["kl"]["mean"] for m in measured]),
    )
    for axis, (label, values) in zip(axes.flat, panels, strict=True):
        heights = [value or math.nan for value in values]  # 0 has no place on this scale
        axis.loglog(keys, heights, color=COLORS[1], marker="o", linewidth=1)
        for x, y, m in zip(keys, heights, measured, strict=True):
            if math.isfinite(y):
                axis.annotate(f" {m['budget']:g}", (x, y), fontsize=8)
        axis.margins(x=0.12)
        axis.set_xlabel("times fewer numbers a key")
        axis.set_ylabel(label)
        ticks = [x for x in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if x <= 1.3 * max(keys)]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    caption = (
        "What a smaller key cache costs; the numbers at the points are the error budgets. A budget "
        "that changes nothing is left out."
    )
    return picture("low_rank_trade", caption, figure)
