"""The frozen-operator contract (arXiv 2609.34130): whether one frozen G_LM may stand for that of
each text, at several lengths.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.data.rows import INPUTS, SEGMENTS
from pldr_jax.model.audits import centred_squares
from pldr_jax.model.decoder import Params, forward
from pldr_jax.training.freeze.calibrate import RowSet
from pldr_jax.training.freeze.certificate import kl_divergence

CONTRACT_LENGTHS = (32, 64, 128)
CONTRACT_DOCUMENTS = 16
MOST_RMS, MOST_KL = 0.25, 0.03
"""It passes up to this centred relative RMS of the logits and this mean KL divergence in nats."""


def frozen_contract(
    config: ModelConfig,
    params: Params,
    calibration: Sequence[np.ndarray],
    scored: Sequence[np.ndarray],
    lengths: Sequence[int] = CONTRACT_LENGTHS,
) -> list[dict[str, Any]]:
    """For each length T: freezes the mean G_LM of the first T tokens of calibration documents, and
    compares the logits of the first T tokens of other documents.

    Args:
      config: of a model with learned G_LM.
      calibration, scored: token ids of documents. The first `CONTRACT_DOCUMENTS` that have T tokens
        are used of each; a length without any is left out.

    Returns:
      A dict a length, plain values for JSON: "length"; "documents" averaged and "compared";
      "centred_relative_rms" and "kl" (nats, mean), None where not finite; "passes"; and "norms",
      the Frobenius norms of the mean A, A_LM and G_LM (float64) of all heads together.
    """
    model = jax.jit(functools.partial(forward, dataclasses.replace(config, unroll=False)))
    results = []
    for length in lengths:
        documents, compared = (
            [tokens[None, :length] for tokens in texts if len(tokens) >= length][
                :CONTRACT_DOCUMENTS
            ]
            for texts in (calibration, scored)
        )
        if not documents or not compared:
            continue
        mean: dict[str, np.ndarray] = {}
        for tokens_1T in documents:
            for name, x in model(params, tokens_1T).deductive.items():
                mean[name] = mean.get(name, 0.0) + np.asarray(x, np.float64) / len(documents)
        g_lm = jnp.asarray(mean["G_LM"], jnp.float32)
        sums = np.zeros(3)
        for tokens_1T in compared:
            own, frozen = (model(params, tokens_1T, g).logits for g in (None, g_lm))
            logits = (np.asarray(x, np.float64) for x in (own, frozen))
            sums += [*centred_squares(*logits), float(kl_divergence(own, frozen).mean())]
        rms, kl = float(np.sqrt(sums[0] / sums[1])), float(sums[2] / len(compared))
        results.append(
            {
                "length": length,
                "documents": len(documents),
                "compared": len(compared),
                "centred_relative_rms": rms if math.isfinite(rms) else None,
                "kl": kl if math.isfinite(kl) else None,
                "passes": rms <= MOST_RMS and kl <= MOST_KL,
                "norms": {
                    name: float(np.linalg.norm(mean[name])) for name in ("A", "A_LM", "G_LM")
                },
            }
        )
    return results


def row_documents(rows: RowSet) -> list[np.ndarray]:
    """Token ids of the inputs of rows, not of all where there are many; of a row with several
    documents, of the first.
    """
    found = (rows.rows[k] for k in rows.order[: 8 * CONTRACT_DOCUMENTS])
    return [x[:-1] if x.ndim == 1 else x[INPUTS][x[SEGMENTS] == 1] for x in found]


def contract_lines(lengths: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One row of a table of two columns for each length."""
    return {
        f"contract at {entry['length']} tokens": (
            f"{'passes' if entry['passes'] else 'does not pass'}: centred relative RMS "
            f"{entry['centred_relative_rms']:.2e}, KL {entry['kl']:.2e} nats a token"
            if None not in (entry["centred_relative_rms"], entry["kl"])
            else "does not pass: the logits are not finite"
        )
        for entry in lengths
    }
