"""Rows of tokens, checked, and forward passes over them a batch after another."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.config import CALIBRATION_ROWS, ConfigError, ModelConfig
from pldr_jax.model.deductive import identity_g_lm

NOT_FINITE = "the {} are not finite: the checkpoint may be broken"


def check_rows(config: ModelConfig, rows_RC: np.ndarray, least: int = 1) -> None:
    """ConfigError unless `rows_RC` holds at least `least` rows of tokens of the model's vocabulary
    that fit its context.
    """
    if rows_RC.ndim != 2 or not np.issubdtype(rows_RC.dtype, np.integer):
        raise ConfigError(
            f"rows: shape {rows_RC.shape}, dtype {rows_RC.dtype}: must be integer ids [R,C]"
        )
    if len(rows_RC) < least:
        raise ConfigError(f"rows: {len(rows_RC)} of them, {least} are needed; give more text")
    length = rows_RC.shape[1]
    if not 3 <= length <= config.context_length:
        raise ConfigError(
            f"rows: of {length} tokens; the model needs 3 to {config.context_length} of them"
        )
    if rows_RC.min() < 0 or rows_RC.max() >= config.vocab_size:
        raise ConfigError(f"rows: a token id outside the vocabulary of {config.vocab_size}")


def check_at_least(name: str, value: int, least: int) -> None:
    """ConfigError if `value`, the argument `name`, is below `least`."""
    if value < least:
        raise ConfigError(f"{name} = {value}: must be at least {least}")


def check_finite(what: str, x: Any) -> None:
    """ConfigError if some logit or loss is NaN or infinite: nothing follows from such numbers."""
    if not np.isfinite(x).all():
        raise ConfigError(NOT_FINITE.format(what))


def split_calibration(rows_RC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows to average G_LM over, the first quarter, and the others, to be scored."""
    aside = min(CALIBRATION_ROWS, max(1, len(rows_RC) // 4))
    return rows_RC[:aside], rows_RC[aside:]


def quick_to_compile(config: ModelConfig) -> ModelConfig:
    """The same model without unrolled scans over layers: with few rows, compiling takes the most
    time.
    """
    return dataclasses.replace(config, unroll=False)


def batches(rows_RC: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """(a new array [B,...], how many of its rows count); the last batch repeats its first row to
    have the same shape, so that one compiled program serves all.
    """
    batch_size = min(batch_size, len(rows_RC))
    for start in range(0, len(rows_RC), batch_size):
        rows = rows_RC[start : start + batch_size]
        missing = batch_size - len(rows)
        yield np.concatenate([rows, np.repeat(rows[:1], missing, axis=0)]), len(rows)


def predefined_or_identity(model: LanguageModel) -> jax.Array:
    """G_LM [L,1,N,H,J] of a model that does not learn it."""
    return identity_g_lm(model.config) if model.g_lm is None else model.g_lm


def deductive_tensors(model: LanguageModel, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """A, A_LM, A_P and G_LM [L,B,N,H,J] of rows of tokens, on the host; of a model whose G_LM is
    not learned, G_LM alone.
    """
    tensors = jax.device_get(dict(model(tokens_BT).deductive.items()))
    if not tensors:  # the identity is not computed
        tensors = {"G_LM": np.asarray(predefined_or_identity(model))}
    return {
        name: np.broadcast_to(x, (x.shape[0], len(tokens_BT), *x.shape[2:]))
        for name, x in tensors.items()
    }


def mean_g_lm(model: LanguageModel, rows_RC: np.ndarray, batch_size: int) -> np.ndarray:
    """The mean of G_LM over rows, [L,N,H,J], float64."""
    if model.config.g_source != "learned":
        rows_RC = rows_RC[:1]  # it is the same for all
    g_lm = RunningStatistics()
    for rows_BC, real in batches(rows_RC, batch_size):
        g_lm.add(np.moveaxis(deductive_tensors(model, rows_BC)["G_LM"][:, :real], 1, 0))
    return g_lm.mean
