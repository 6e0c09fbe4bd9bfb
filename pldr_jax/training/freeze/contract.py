"""The frozen-operator contract (arXiv 2609.34130): whether one frozen G_LM may stand for that of
each text, at several lengths.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.audits import centred_squares
from pldr_jax.model.decoder import Params, forward
from pldr_jax.training.freeze.certificate import kl_divergence

CONTRACT_LENGTHS = (32, 64, 128)
CONTRACT_DOCUMENTS = 16
MOST_RMS, MOST_KL = 0.25, 0.03
"""It passes up to this centred relative RMS of the logits and this mean KL divergence in nats."""


def frozen_contract(
    config: ModelConfig,
    params: Params,
    calibration_RC: np.ndarray,
    scored_RC: np.ndarray,
    lengths: Sequence[int] = CONTRACT_LENGTHS,
) -> list[dict[str, Any]]:
    """For each length T that the rows have: freezes the mean G_LM of the first T tokens of the
    calibration rows, and compares the logits of the first T tokens of the others.

    Args:
      config: of a model with learned G_LM.
      calibration_RC: `CONTRACT_DOCUMENTS` of them are used, at most.
      scored_RC: other rows.

    Returns:
      A dict a length: "length", "documents", "centred_relative_rms", "kl" (nats, mean), "passes",
      and "norms": the Frobenius norms of the mean A, A_LM and G_LM (float64) over all heads.
    """
    model = jax.jit(functools.partial(forward, dataclasses.replace(config, unroll=False)))
    results = []
    for length in (n for n in lengths if n <= min(calibration_RC.shape[1], scored_RC.shape[1])):
        total: dict[str, np.ndarray] = {}
        documents = calibration_RC[:CONTRACT_DOCUMENTS, :length]
        for tokens_T in documents:
            for name, x in model(params, tokens_T[None]).deductive.items():
                total[name] = total.get(name, 0.0) + np.asarray(x, np.float64)
        mean = {name: x / len(documents) for name, x in total.items()}
        g_lm, kl = jnp.asarray(mean["G_LM"], jnp.float32), 0.0
        difference = size = 0.0
        for tokens_T in scored_RC[:, :length]:
            pair = (model(params, tokens_T[None], g).logits[0] for g in (None, g_lm))
            own_TV, frozen_TV = pair
            kl += float(kl_divergence(own_TV, frozen_TV).mean()) / len(scored_RC)
            logits = (np.asarray(x, np.float64) for x in (own_TV, frozen_TV))
            squares = centred_squares(*logits)
            difference, size = difference + squares[0], size + squares[1]
        rms = float(np.sqrt(difference / size))
        results.append(
            {
                "length": length,
                "documents": len(documents),
                "centred_relative_rms": rms,
                "kl": kl,
                "passes": rms <= MOST_RMS and kl <= MOST_KL,
                "norms": {n: float(np.linalg.norm(mean[n])) for n in ("A", "A_LM", "G_LM")},
            }
        )
    return results
