"""Forward passes over rows, a batch of one shape after another."""

from collections.abc import Iterator

import jax
import numpy as np

from pldr_jax.api import LanguageModel
from pldr_jax.model.deductive import identity_g_lm


def batches(rows_RC: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(a new array [B,...], real rows of it); the last batch is filled up with its first row, so
    that one compiled program serves all.
    """
    batch_size = min(batch_size, len(rows_RC))
    for start in range(0, len(rows_RC), batch_size):
        rows = rows_RC[start : start + batch_size]
        missing = batch_size - len(rows)
        yield np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)]), len(rows)


def deductive_outputs(model: LanguageModel, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """A, A_LM, A_P and G_LM [L,B,N,H,J] of rows of tokens, on the host; of a model whose G_LM is
    not learned, G_LM alone.
    """
    tensors = jax.device_get(dict(model(tokens_BT).deductive.items()))
    if not tensors:  # the identity is not even made
        tensors = {"G_LM": np.asarray(identity_g_lm(model.config))}
    return {
        name: np.broadcast_to(x, (x.shape[0], len(tokens_BT), *x.shape[2:]))
        for name, x in tensors.items()
    }


def mean_g_lm(model: LanguageModel, rows_RC: np.ndarray, batch_size: int) -> np.ndarray:
    """The mean of G_LM over rows, [L,N,H,J], summed in float64."""
    if model.config.g_source != "learned":
        rows_RC = rows_RC[:1]  # it is the same for all
    total = np.zeros(())
    for rows_BC, real in batches(rows_RC, batch_size):
        g_lm_LBNHJ = deductive_outputs(model, rows_BC)["G_LM"][:, :real]
        total = total + g_lm_LBNHJ.astype(np.float64).sum(1)
    return total / len(rows_RC)
