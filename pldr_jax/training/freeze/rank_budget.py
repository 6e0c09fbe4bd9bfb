"""What a rank budget saves and costs: cached keys of a G_LM of low rank, and its logits on text.

The G_LM compared is the one that decoding uses (`pldr_jax/model/low_rank.py`), so that its errors
are those of the decoded text.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Params
from pldr_jax.model.low_rank import LowRankG, factorize, singular_values, smallest_ranks
from pldr_jax.training.freeze.certificate import Totals, difference
from pldr_jax.training.rows import forward_rows

BUDGETS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""Relative errors of G_LM that are tried where none are named."""


def savings(values_LNH: np.ndarray, low_rank: LowRankG, budget: float) -> dict[str, Any]:
    """Ranks and how many times smaller a budget makes the cache, plain values for JSON.

    Args:
      values_LNH: singular values of the whole G_LM.
      low_rank: its factors within the budget.

    Returns:
      "rank" [L][N], the smallest within the budget, and "kept" [L][N], that of the head's group.
      "keys": numbers cached as keys without the budget over those with it: "ideal" with "rank",
      "kept" with "kept", "padded" with the largest rank of each layer for all of its heads.
      "cache": the same of keys and values together, with "kept".
    """
    ranks_LN, kept_LN = smallest_ranks(values_LNH, budget), low_rank.ranks
    whole = values_LNH.size
    return {
        "budget": budget,
        "rank": ranks_LN.tolist(),
        "kept": kept_LN.tolist(),
        "keys": {
            "ideal": whole / int(ranks_LN.sum()),
            "kept": whole / int(kept_LN.sum()),
            "padded": whole / int(ranks_LN.max(-1).sum() * ranks_LN.shape[1]),
        },
        "cache": 2 * whole / (whole + int(kept_LN.sum())),
    }


def measure_budgets(
    config: ModelConfig,
    params: Params,
    g_lm: jax.Array,
    batches: Iterable[np.ndarray],
    budgets: Sequence[float] = BUDGETS,
    max_segments: int = 1,
    done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """`savings` of each budget, and `Totals.results` of the logits with `g_lm` ("before") and with
    its low-rank form ("after").

    Args:
      g_lm: one for all rows, [L,1,N,H,J].
      batches: rows of tokens, [B,C] or [B,3,T], all of one shape; padding is not counted.
      done: called after each batch.
    """
    values_LNH = singular_values(np.asarray(g_lm)[:, 0])
    truncated = [factorize(g_lm, budget) for budget in budgets]
    totals = [Totals() for _ in budgets]

    def logits(rows: jax.Array, g_lm: jax.Array, params: Params) -> tuple[jax.Array, jax.Array]:
        outputs, targets_BT, _ = forward_rows(config, params, rows, max_segments, g_lm)
        return outputs.logits, targets_BT

    of, compared = jax.jit(logits), jax.jit(difference)
    for rows in batches:
        own, targets_BT = of(rows, g_lm, params)
        for low_rank, total in zip(truncated, totals, strict=True):
            total.add(compared(own, of(rows, low_rank.G_LM, params)[0], targets_BT))
        done()
    return [
        {**savings(values_LNH, low_rank, budget), **total.results("after")}
        for budget, low_rank, total in zip(budgets, truncated, totals, strict=True)
    ]


def budget_lines(measured: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One row of a table of two columns for each budget."""
    return {
        f"rank budget {m['budget']:g}": f"keys {m['keys']['kept']:.2f} times smaller "
        f"(ideal {m['keys']['ideal']:.2f}), cache {m['cache']:.2f}; logits off by "
        f"{m['logit_difference']['max']:.2e} at most, KL {m['kl']['mean']:.2e} nats a token, "
        f"greedy tokens {m['greedy_agreement']:.2%} the same"
        for m in measured
    }
