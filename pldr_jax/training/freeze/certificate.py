"""The certificate of a frozen model: what replacing G_LM by one tensor changed, on text that the
tensor was not calibrated on.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Params
from pldr_jax.model.low_rank import RANK_TOLERANCE, numerical_rank, singular_values
from pldr_jax.model.reductions import most_probable
from pldr_jax.training.freeze.calibrate import (
    CalibratedG,
    RowSet,
    frozen_model,
    rows_at_once,
    without_plga,
)
from pldr_jax.training.losses import PAD_ID, TokenLoss, token_loss
from pldr_jax.training.rows import forward_rows


class Difference(flax.struct.PyTreeNode):
    """Sums and maxima over the targets of one batch that are not padding.

    Attributes:
      full, frozen: loss of either model.
      logit_sum, logit_max: of |logit difference| over all V logits of those positions.
      kl_sum, kl_max: of KL(full || frozen), nats.
      agreed: positions at which both have the same most probable token.
    """

    full: TokenLoss
    frozen: TokenLoss
    logit_sum: jax.Array
    logit_max: jax.Array
    kl_sum: jax.Array
    kl_max: jax.Array
    agreed: jax.Array


class Totals:
    """`Difference` of all batches, added up in float64."""

    def __init__(self) -> None:
        self._sums, self._largest = np.zeros(6, np.float64), np.zeros(2, np.float64)

    def add(self, part: Difference) -> None:
        """Adds a batch."""
        part = jax.device_get(part)
        losses = (part.full.loss_sum, part.frozen.loss_sum, part.full.count)
        self._sums += np.asarray([*losses, part.logit_sum, part.kl_sum, part.agreed], np.float64)
        self._largest = np.maximum(self._largest, [part.logit_max, part.kl_max])

    @property
    def tokens(self) -> int:
        """Positions that were compared."""
        return int(self._sums[2])

    def results(self, other: str = "frozen") -> dict[str, Any]:
        """ "loss", "logit_difference", "kl" and "greedy_agreement", plain values for JSON.

        Args:
          other: what to call the loss of the second model.
        """
        before, after, logit, kl, agreed = self._sums[[0, 1, 3, 4, 5]] / max(self.tokens, 1)
        return {
            "loss": {
                "before": _number(before),
                other: _number(after),
                "difference": _number(after - before),
            },
            "logit_difference": {"max": _number(self._largest[0]), "mean": _number(logit)},
            "kl": {"mean": _number(kl), "max": _number(self._largest[1])},
            "greedy_agreement": _number(agreed),
        }


def kl_divergence(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis, nats, float32, never negative.

    With d = log q - log p it is the sum of p (e^d - 1 - d), as both sum to 1. No term is negative
    and none cancels another, so that a divergence far below the rounding of p log p is still right.
    """
    log_p = jax.nn.log_softmax(p_logits.astype(jnp.float32))
    log_q = jax.nn.log_softmax(q_logits.astype(jnp.float32))
    p, d = jnp.exp(log_p), log_q - log_p
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    # e^d overflows where p is almost 0; there p e^d is q.
    terms = jnp.where(near, p * (jnp.expm1(small) - small), jnp.exp(log_q) - p - p * d)
    return jnp.maximum(terms, 0).sum(-1)


def compare(
    config: ModelConfig,
    params: Params,
    rows_BC: jax.Array,
    g_lm: jax.Array,
    max_segments: int = 1,
) -> Difference:
    """The full model and the one frozen with `g_lm` [L,1,N,H,J], on rows of tokens, [B,C] or
    [B,3,T]; a pure function.
    """
    outputs, targets_BT, _ = forward_rows(config, params, rows_BC, max_segments)
    frozen, bare = frozen_model(config), without_plga(params)
    other = forward_rows(frozen, bare, rows_BC, max_segments, g_lm).outputs.logits
    return difference(outputs.logits, other, targets_BT)


def difference(own: jax.Array, other: jax.Array, targets_BT: jax.Array) -> Difference:
    """What the logits of two models [B,T,V] have between them."""
    counted_BT = targets_BT != PAD_ID
    logit_BTV = jnp.where(counted_BT[:, :, None], jnp.abs(own - other), 0)
    kl_BT = jnp.where(counted_BT, kl_divergence(own, other), 0)
    return Difference(
        full=token_loss(own, targets_BT),
        frozen=token_loss(other, targets_BT),
        logit_sum=logit_BTV.mean(-1).sum(),
        logit_max=logit_BTV.max(),
        kl_sum=kl_BT.sum(),
        kl_max=kl_BT.max(),
        agreed=jnp.sum(
            (most_probable(own) == most_probable(other)) & jnp.isfinite(kl_BT) & counted_BT
        ),
    )


def measure(config: ModelConfig, params: Params, g_lm: jax.Array, rows: RowSet) -> dict[str, Any]:
    """`compare` over all rows, batch by batch: the certificate's "evaluation", "loss",
    "logit_difference", "kl" and "greedy_agreement".
    """
    compared = jax.jit(functools.partial(compare, config, max_segments=rows.rows.max_segments))
    totals = Totals()
    for batch_BC, _ in rows.batches(rows_at_once(config)):
        totals.add(compared(params, batch_BC, g_lm))
    return {
        "evaluation": {"rows": len(rows.order), "tokens": totals.tokens},
        **totals.results(),
    }


def spectrum(g_lm_L1NHJ: jax.Array | np.ndarray) -> dict[str, Any]:
    """Numerical rank and condition number of G_LM by layer and head, [L][N]; a condition number is
    None where a singular value is 0, both are where G_LM is not finite.
    """
    values_LNH = singular_values(np.asarray(g_lm_L1NHJ)[:, 0])
    rank_LN = numerical_rank(values_LNH)
    with np.errstate(divide="ignore", invalid="ignore"):
        condition_LN = values_LNH[..., 0] / values_LNH[..., -1]
    return {
        "rank_tolerance": RANK_TOLERANCE,
        "rank": [[None if np.isnan(rank) else int(rank) for rank in row] for row in rank_LN],
        "condition": [[_number(value) for value in row] for row in condition_LN],
    }


def certify(
    config: ModelConfig,
    params: Params,
    calibrated: CalibratedG,
    evaluation: RowSet,
    kl_threshold: float,
) -> dict[str, Any]:
    """The certificate, plain values for JSON: losses and divergences in nats a token, logits as
    they are.
    """
    before, after = _count(params), _count(without_plga(params))
    measured = measure(config, params, calibrated.g_lm, evaluation)
    mean = measured["kl"]["mean"]
    return {
        "parameters": {"before": before, "after": after, "removed": before - after},
        "calibration": {
            "method": calibrated.method,
            "rows": calibrated.rows,
            "tokens": calibrated.tokens,
        },
        **measured,
        "g_lm": {
            "rmse": _number(calibrated.rmse),
            "order_parameter": _number(calibrated.order_parameter),
            **spectrum(calibrated.g_lm),
        },
        "kl_threshold": kl_threshold,
        "input_invariant": mean is not None and mean <= kl_threshold,
    }


def certificate_lines(certificate: dict[str, Any]) -> dict[str, str]:
    """The certificate as rows of a table of two columns."""
    c, g = certificate, certificate["g_lm"]
    calibration, evaluation = c["calibration"], c["evaluation"]
    rows = {
        "parameters": f"{c['parameters']['before']:,} -> {c['parameters']['after']:,}, "
        f"{c['parameters']['removed']:,} removed",
        "calibration": f"{calibration['method']} of {calibration['rows']} rows, "
        f"{calibration['tokens']:,} tokens",
        "evaluation": f"{evaluation['rows']} other rows, {evaluation['tokens']:,} tokens",
        "loss": f"{_shown(c['loss']['before'])} -> {_shown(c['loss']['frozen'])} nats a token, "
        f"difference {_shown(c['loss']['difference'])}",
        "logit difference": _mean_and_max(c["logit_difference"]),
        "KL divergence": f"{_mean_and_max(c['kl'])} nats a token",
        "greedy tokens": f"{c['greedy_agreement']:.2%} the same",
        "RMSE of G_LM": f"{_shown(g['rmse'])} between rows, "
        f"order parameter {_shown(g['order_parameter'])}",
    }
    for layer, (ranks, conditions) in enumerate(zip(g["rank"], g["condition"], strict=True)):
        worst = None if None in conditions else max(conditions)
        rows[f"rank of G_LM, layer {layer}"] = (
            f"{' '.join(map(str, ranks))}, largest condition number {_shown(worst)}"
        )
    return rows


def invariance_warning(certificate: dict[str, Any]) -> str | None:
    """One line where the frozen model is another function than the full one; None where not."""
    if certificate["input_invariant"]:
        return None
    return (
        f"warning: the KL divergence is {_shown(certificate['kl']['mean'])} nats a token, above "
        f"{certificate['kl_threshold']:g}: G_LM of this model depends on its input, and the frozen "
        "model is another one"
    )


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _number(value: float | None) -> float | None:
    """A float for JSON, which has no infinities."""
    return float(value) if value is not None and math.isfinite(value) else None


def _mean_and_max(entry: dict[str, float | None]) -> str:
    return f"mean {_shown(entry['mean'])}, max {_shown(entry['max'])}"


def _shown(value: float | None) -> str:
    if value is None:
        return "not finite or not known"
    return f"{value:.4f}" if value == 0 or 1e-2 <= abs(value) < 1e4 else f"{value:.2e}"
