"""Freezing: one G_LM from calibration text takes the place of the PLGA network.

A model trained to where its G_LM is the same for every input (arXiv 2603.23539) needs the network
no longer: with the tensor it computes the same function, as with the G-cache of arXiv 2502.13502.
The frozen checkpoint has the layout of every other, parameters without `plga` and the tensor as
`g_lm`; `pldr_jax/training/freeze/certificate.py` measures what the freezing changed.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ExperimentConfig, LossConfig, ModelConfig
from pldr_jax.data.rows import SEGMENTS, Rows, blank_rows, stack_rows
from pldr_jax.model.decoder import Params
from pldr_jax.training.order_parameter import DeductiveStatistics
from pldr_jax.training.rows import forward_rows

Calibration = Literal["first", "mean"]

LOGITS_AT_ONCE = 1 << 24
"""Entries of one batch's logits, at most: a batch of any model then takes some 100 MB."""
ROWS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class RowSet:
    """Some rows of a token file, read when they are needed.

    Attributes:
      rows: all rows of the file.
      order: indices of those that belong to the set.
    """

    rows: Rows
    order: np.ndarray

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, int]]:
        """(int32 [size,C] or [size,3,T], real rows of it); the last batch is filled up with
        rows without a token.
        """
        for start in range(0, len(self.order), size):
            chosen = self.order[start : start + size]
            batch_BC = blank_rows(size, self.rows.row_shape)
            batch_BC[: len(chosen)] = stack_rows(self.rows, chosen)
            yield batch_BC, len(chosen)


def split_rows(
    rows: Rows, calibration_rows: int, evaluation_rows: int, seed: int = 0
) -> tuple[RowSet, RowSet]:
    """Rows to calibrate on and rows to evaluate on, none in both.

    The choice is that of `data.pipeline.validation_rows`: with the same numbers, the evaluated rows
    are those that training evaluates.

    Args:
      calibration_rows: at most a quarter of all rows is taken, at least one.
      evaluation_rows: 0 takes all others.

    Raises:
      ConfigError: too few rows for one of each.
    """
    n_calibration = min(calibration_rows, max(1, len(rows) // 4))
    if len(rows) <= n_calibration:
        raise ConfigError(
            f"the text gives {len(rows)} rows, too few to calibrate and to evaluate on; give more"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    end = n_calibration + evaluation_rows if evaluation_rows else len(rows)
    return RowSet(rows, order[:n_calibration]), RowSet(rows, order[n_calibration:end])


def some_rows(rows: Rows, count: int, seed: int = 0) -> RowSet:
    """`count` rows of a file, or all if there are fewer or `count` is 0.

    Raises:
      ConfigError: the text is shorter than one row.
    """
    if not len(rows):
        raise ConfigError("the text gives no whole row of tokens to each half; give more")
    order = np.random.default_rng(seed).permutation(len(rows))
    return RowSet(rows, order[: count or len(rows)])


def rows_at_once(config: ModelConfig) -> int:
    """Rows of a batch, so that its logits have a bounded size."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (config.context_length * config.vocab_size)))


@dataclasses.dataclass(frozen=True)
class CalibratedG:
    """A frozen G_LM and how much it differs between the calibration rows.

    Attributes:
      g_lm: [L,1,N,H,J], float32.
      method: the G_LM of the first row, or their mean.
      rows, tokens: that it was calibrated on; padding is no token.
      rmse: between the G_LM of successive rows; None with a single row.
      order_parameter: that, divided by the magnitude of the mean.
    """

    g_lm: jax.Array
    method: Calibration
    rows: int
    tokens: int
    rmse: float | None
    order_parameter: float | None


def calibrate(
    config: ModelConfig, params: Params, rows: RowSet, method: Calibration = "mean"
) -> CalibratedG:
    """G_LM of the first row, or its mean over all rows, or all segments of rows, summed in float64;
    inputs are those of training.
    """
    g_lm_of = jax.jit(functools.partial(_g_lm, config, rows.rows.max_segments))
    statistics, total, n_sequences, n_tokens = DeductiveStatistics(), np.zeros(()), 0, 0
    for batch_BC, real in rows.batches(rows_at_once(config)):
        g_lm, real_B = jax.device_get(g_lm_of(params, batch_BC))
        chosen = np.arange(real) if real_B is None else np.flatnonzero(real_B)
        g_lm_LBNHJ = np.asarray(g_lm, np.float64)[:, chosen]
        statistics.add(g_lm_LBNHJ)
        if method == "mean":
            total = total + g_lm_LBNHJ.sum(1, keepdims=True)
        elif n_sequences == 0:
            total = g_lm_LBNHJ[:, :1]
        n_sequences += len(chosen)
        n_tokens += _count_inputs(batch_BC[:real])
    mean = total / (n_sequences if method == "mean" else 1)
    results: Mapping[str, float | None] = statistics.results("G_LM") if n_sequences > 1 else {}
    return CalibratedG(
        jnp.asarray(mean, jnp.float32),
        method,
        len(rows.order),
        n_tokens,
        results.get("eval/rmse/G_LM"),
        results.get("eval/order_parameter/G_LM"),
    )


def _count_inputs(rows: np.ndarray) -> int:
    """Inputs of rows [B,C] or [B,3,T] that are not padding."""
    whole = rows.ndim == 2
    return rows[:, :-1].size if whole else int(np.count_nonzero(rows[:, SEGMENTS]))


def _g_lm(
    config: ModelConfig, max_segments: int, params: Params, rows_BC: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    outputs, _, real_B = forward_rows(config, params, rows_BC, max_segments)
    assert outputs.deductive.G_LM is not None
    return outputs.deductive.G_LM, real_B


def check_learned(config: ModelConfig, where: str | Path) -> None:
    """ConfigError if the model has no G_LM that could be frozen."""
    if config.g_source != "learned":
        raise ConfigError(
            f"{where}: Model.g_source = {config.g_source!r}: there is no learned G_LM to freeze"
        )


def frozen_model(config: ModelConfig) -> ModelConfig:
    """The frozen model's: G_LM from outside, in no file."""
    return dataclasses.replace(config, g_source="external", g_file=None)


def frozen_config(config: ExperimentConfig) -> ExperimentConfig:
    """That with everything else of the run; there is nothing left to regularise."""
    model = frozen_model(config.model)
    return dataclasses.replace(config.without_generator(), model=model, loss=LossConfig())


def without_plga(params: Params) -> Params:
    """The parameters without those of power law graph attention; arrays are shared, not copied."""
    layers = params["layers"]
    attention = {name: leaf for name, leaf in layers["attention"].items() if name != "plga"}
    return {**params, "layers": {**layers, "attention": attention}}
