"""How nearly singular G_LM is, and what decoding with fewer ranks of it would save and cost."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import batches, mean_g_lm
from pldr_jax.analysis.figures import COLORS, new_figure, png
from pldr_jax.analysis.section import Picture, Section, Table
from pldr_jax.api import LanguageModel
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.partition import mesh_scope
from pldr_jax.training.freeze.rank_budget import BUDGETS, measure_budgets, singular_values
from pldr_jax.training.losses import PAD_ID

CLOSE = 1e-2
"""Nats a token: budgets whose KL divergence is below are called harmless."""
FLOOR = 1e-8
"""Singular values are drawn down to this share of the largest."""


def measure(
    model: LanguageModel,
    rows_RC: np.ndarray,
    budgets: Sequence[float] = BUDGETS,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda rows: None,
) -> Section:
    """Singular values, ranks and key caches by error budget, and logits on the rows.

    A learned G_LM stands for itself as its mean over the rows, in place of each row's own; the
    logits compared are those with that tensor, whole and of low rank.

    Args:
      rows_RC: token ids without padding, of at least two columns; the first C - 1 are inputs.
      budgets: relative errors of G_LM (`pldr_jax/model/low_rank.py:smallest_ranks`).
    """
    g_lm, source = _g_lm(model, rows_RC, batch_size)
    values_LNH = singular_values(g_lm)
    sizes = (min(batch_size, len(rows_RC) - start) for start in range(0, len(rows_RC), batch_size))
    with mesh_scope(model.mesh):
        measured = measure_budgets(
            model.config,
            model.params,
            g_lm,
            _padded(rows_RC, batch_size),
            budgets,
            done=lambda: advance(next(sizes)),
        )
    return Section(
        name="low_rank",
        title="G_LM of low rank",
        words=(_verdict(measured), *_method(source)),
        tables=(_savings_table(measured), _cost_table(measured), _rank_table(measured)),
        pictures=(spectra(values_LNH), _trade(measured)),
        numbers={"g_lm": source, "budgets": measured},
        tensors={"low_rank/singular_values": values_LNH},
    )


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
    harmless = [m for m in measured if m["kl"]["mean"] is not None and m["kl"]["mean"] <= CLOSE]
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


def _method(source: str) -> tuple[str, ...]:
    return (
        "G_LM = U S V^T; with the first E singular vectors, scores are "
        "(q U S)(V^T k)^T / sqrt(H), and E numbers are cached of a key instead of H. The error "
        "budget is ||G - G_E|| / ||G|| in the Frobenius norm, for each head by itself. Heads of a "
        "layer that keep the same rank are one array, at most four in a layer: 'ideal' is every "
        "head at its own rank, 'kept' what is cached, 'padded' all heads of a layer at the "
        "largest rank of it.",
        f"The G_LM measured is {source}; differences are to the model with that tensor whole.",
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


def spectra(values_LNH: np.ndarray) -> Picture:
    """Singular values of every head, a panel for each layer."""
    layers, _, head_dim = values_LNH.shape
    columns = min(layers, 5)
    rows = math.ceil(layers / columns)
    figure, axes = new_figure(
        rows, columns, width=2.2 * columns + 1, height=2.4 * rows + 0.3, sharex=True, sharey=True
    )
    largest_LN1 = np.maximum(values_LNH[..., :1], np.finfo(float).tiny)
    shares_LNH = np.maximum(values_LNH / largest_LN1, FLOOR)
    index_H = np.arange(1, head_dim + 1)
    for layer, axis in enumerate(axes.flat):
        if layer >= layers:
            axis.set_visible(False)
            continue
        axis.semilogy(index_H, shares_LNH[layer].T, color=COLORS[0], linewidth=1, alpha=0.6)
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_ylim(FLOOR / 2, 2)
    figure.supxlabel("singular value", fontsize=9)
    figure.supylabel("share of the largest", fontsize=9)
    caption = "Singular values of G_LM over the largest of their head; a line is a head."
    return Picture("low_rank_spectra", caption, png(figure))


def _trade(measured: list[dict[str, Any]]) -> Picture:
    """Logit error and KL divergence against the cached keys."""
    figure, axes = new_figure(1, 2, width=8.0, height=3.4)
    keys = [m["keys"]["kept"] for m in measured]
    panels = (
        ("largest logit difference", [m["logit_difference"]["max"] for m in measured]),
        ("mean KL, nats a token", [m["kl"]["mean"] for m in measured]),
    )
    for axis, (label, values) in zip(axes.flat, panels, strict=True):
        heights = [value or math.nan for value in values]  # no difference has no place
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
    return Picture("low_rank_trade", caption, png(figure))
