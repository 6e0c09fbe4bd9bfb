"""Causality: the loss when G_LM knows nothing of the future, and where in a row it differs from the
ordinary loss (the audit "one pass against prefix by prefix" of the authors of arXiv 2603.23539, by
position).
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import (
    batches,
    check_at_least,
    check_finite,
    check_rows,
    split_calibration,
)
from pldr_jax.analysis.causality.position_loss import (
    PositionLosses,
    jitted_losses,
    prefix_positions,
)
from pldr_jax.analysis.causality.view import (
    causality_figures,
    causality_tables,
    causality_verdict,
    causality_words,
)
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.partition import mesh_scope

PREFIX_POSITIONS = 32
"""About how many positions of a row are scored by default with the row cut behind them."""

QUANTILES = (0.5, 0.9, 0.99, 0.999)
"""Of the differences of single tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causality(ModelSection):
    """Whether the ordinary loss is that of next-token prediction."""

    key = "causality"
    title = "Causality"

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        calibration_RC: np.ndarray | None = None,
        prefix_rows: int = 8,
        prefix_stride: int | None = None,
    ) -> Self:
        """Scores rows with G_LM of the whole row, of the prefix, of another row, and calibrated.

        A row of C tokens gives T = C - 1 inputs and targets, as in training. The cost is three
        forward passes a row, and one for each position that is scored by its prefix.

        Args:
          calibration_RC: other rows, for the calibrated G_LM; None sets aside the first of
            `rows_RC` (`split_calibration`), which are then not scored.
          prefix_rows: how many of the scored rows are also scored prefix by prefix.
          prefix_stride: the distance between the positions that are; None takes about
            `PREFIX_POSITIONS` of them.

        Raises:
          ConfigError: rows that the model cannot take, fewer than two of them, a setting below 1,
            or a loss that is not finite.
        """
        learned = model.config.g_source == "learned"
        check_rows(model.config, rows_RC, 2 if learned and calibration_RC is None else 1)
        length = rows_RC.shape[1] - 1
        stride = max(1, length // PREFIX_POSITIONS) if prefix_stride is None else prefix_stride
        check_at_least("batch_size", settings.batch_size, 1)
        check_at_least("prefix_rows", prefix_rows, 1)
        check_at_least("prefix_stride", stride, 1)
        if learned and calibration_RC is None:
            calibration_RC, rows_RC = split_calibration(rows_RC)
            settings.advance(len(calibration_RC))
        positions_P = prefix_positions(length, stride)
        with mesh_scope(model.mesh):
            if not learned:
                losses = _score(model, rows_RC, None, 0, positions_P, settings)
                return cls(**_predefined(losses))
            assert calibration_RC is not None
            check_rows(model.config, calibration_RC)
            calibration = _calibrate(model, calibration_RC, settings.batch_size)
            losses = _score(model, rows_RC, calibration, prefix_rows, positions_P, settings)
        numbers = _numbers(losses, positions_P, length)
        numbers["calibration_rows"], numbers["dtype"] = len(calibration_RC), model.config.dtype
        tensors = {
            "prefix_positions": positions_P,
            "logprob_difference": np.stack(losses.differences),
            **{f"loss_{name}": means.by_position for name, means in losses.losses.items()},
            **{f"gap_{name}": means.by_position for name, means in losses.gaps.items()},
        }
        return cls(numbers=numbers, tensors=tensors)

    def words(self) -> tuple[str, ...]:
        return causality_words(self.numbers)

    def tables(self) -> tuple[Table, ...]:
        return causality_tables(self.numbers)

    def figures(self) -> tuple[Picture, ...]:
        return causality_figures(self.tensors)


def _calibrate(
    model: LanguageModel, rows_RC: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """G_LM [L,1,N,H,J] of the first row, and the mean over all of them."""
    row_nats = jitted_losses(model.config).row_nats
    first: np.ndarray | None = None
    mean = RunningStatistics()
    for batch_BC, real in batches(rows_RC, batch_size):
        g_lm_LBNHJ = np.asarray(row_nats(model.params, batch_BC)[1])[:, :real]
        first = g_lm_LBNHJ[:, :1] if first is None else first
        mean.add(np.moveaxis(g_lm_LBNHJ, 1, 0))
    assert first is not None
    return first, mean.mean[:, None].astype(np.float32)


def _score(
    model: LanguageModel,
    rows_RC: np.ndarray,
    calibration: tuple[np.ndarray, np.ndarray] | None,
    prefix_rows: int,
    positions_P: np.ndarray,
    settings: Settings,
) -> PositionLosses:
    """All rows; row r takes the G_LM of row r - 1 as that of another, the first row that of the
    first calibration row.
    """
    row_nats, prefix_nats = jitted_losses(model.config)
    losses, done = PositionLosses(), 0
    before: jax.Array | np.ndarray | None = None if calibration is None else calibration[0]
    for batch_BC, real in batches(rows_RC, settings.batch_size):
        full_BT, g_lm = row_nats(model.params, batch_BC, model.g_lm)
        nats = {"full": full_BT}
        if calibration is not None and before is not None:
            shifted = jnp.concatenate([before, g_lm[:, :-1]], axis=1)
            before = g_lm[:, real - 1 : real]
            everywhere = np.broadcast_to(calibration[1], shifted.shape)
            nats["other"] = row_nats(model.params, batch_BC, shifted)[0]
            nats["calibrated"] = row_nats(model.params, batch_BC, everywhere)[0]
        on_host = {name: np.asarray(x_BT)[:real] for name, x_BT in nats.items()}
        check_finite("losses of held-out rows", on_host["full"])
        losses.add(on_host)
        for b in range(real):
            if done < prefix_rows:
                pieces = [
                    np.asarray(prefix_nats(model.params, batch_BC[b], chosen_B))[:n]
                    for chosen_B, n in batches(positions_P, settings.batch_size)
                ]
                losses.add_prefix(on_host["full"][b, positions_P], np.concatenate(pieces))
            done += 1
            settings.advance(1)
    return losses


def _predefined(losses: PositionLosses) -> dict[str, Any]:
    """Numbers and tensors of a model whose G_LM is not learned."""
    full = losses.losses["full"]
    numbers: dict[str, Any] = {
        "verdict": "causal by construction",
        "rows": full.rows,
        "positions": len(full.by_position),
        "loss": {"full": full.mean},
        "gap": {name: {"mean": 0.0} for name in ("prefix", "other", "calibrated")},
    }
    return {"numbers": numbers, "tensors": {"loss_full": full.by_position}}


def _numbers(losses: PositionLosses, positions_P: np.ndarray, length: int) -> dict[str, Any]:
    differences = np.abs(np.concatenate(losses.differences))
    gaps: dict[str, Any] = {}
    for name, means in losses.gaps.items():
        at = positions_P if name == "prefix" else np.arange(length)
        gap_T = means.by_position
        total = float(gap_T.sum())
        first_half = float(gap_T[at < length / 2].sum())
        gaps[name] = {
            "mean": means.mean,
            "standard_error": means.standard_error,
            "first_half_share": first_half / total if total else None,
        }
    quantiles = np.quantile(differences, QUANTILES)
    return {
        "verdict": causality_verdict(gaps["prefix"]["mean"]),
        "rows": losses.losses["full"].rows,
        "positions": length,
        "prefix_rows": losses.losses["prefix"].rows,
        "prefix_positions": len(positions_P),
        "loss": {name: means.mean for name, means in losses.losses.items()},
        "block": losses.losses["full_at_prefix"].mean,
        "sequential": losses.losses["prefix"].mean,
        "gap": gaps,
        "logprob_difference": {
            "tokens": len(differences),
            "mean": float(differences.mean()),
            "max": float(differences.max()),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        },
    }
