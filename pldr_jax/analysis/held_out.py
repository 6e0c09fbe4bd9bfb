"""Held-out rows, checked once; models that compile quickly."""

import dataclasses

import numpy as np

from pldr_jax.config import ConfigError, ModelConfig


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


def quick_to_compile(config: ModelConfig) -> ModelConfig:
    """The same model with its scans over layers not unrolled: rows are few here, and compiling is
    most of the time.
    """
    return dataclasses.replace(config, unroll=False)


def check_at_least(name: str, value: int, least: int) -> None:
    """ConfigError if `value`, the argument `name`, is below `least`."""
    if value < least:
        raise ConfigError(f"{name} = {value}: must be at least {least}")
