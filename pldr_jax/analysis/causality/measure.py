"""Causality: what the loss is when G_LM knows nothing of the future, and where in a row the
difference arises (the audit "one pass against prefix by prefix" of the authors of arXiv 2603.23539,
by position).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import batches
from pldr_jax.analysis.causality.figures import pictures_of
from pldr_jax.analysis.causality.position_loss import (
    PositionLosses,
    jitted,
    prefix_positions,
)
from pldr_jax.analysis.held_out import check_at_least, check_rows
from pldr_jax.analysis.section import Cell, Section, Table
from pldr_jax.api import LanguageModel
from pldr_jax.partition import mesh_scope

NO_GAP = 1e-3
"""Nats a token. A gap up to this is less than the loss differs between seeds of a training run: the
ordinary loss can be quoted.
"""

SMALL_GAP = 1e-2
"""Nats a token, the default of `Training.gap_threshold`. A gap above it makes the ordinary loss a
number about another task than next-token prediction.
"""

TOKEN_DIFFERENCE = 1e-2
"""Nats. A largest difference of one token's log-probability above this is named even where the mean
gap is nothing. The authors' audit found 2.8e-3 on a model that they call invariant.
"""

CALIBRATION_ROWS = 16
"""Rows set aside for the calibrated G_LM, at most; never more than a quarter of all, but one."""

PREFIX_POSITIONS = 32
"""About as many positions of a row are scored by default with the row cut behind them."""

QUANTILES = (0.5, 0.9, 0.99, 0.999)
"""Of the differences of single tokens."""

KINDS = {
    "full": "whole row",
    "prefix": "prefix",
    "other": "another row",
    "calibrated": "calibration mean",
}
"""The G_LMs, and their names for a reader."""


def measure(
    model: LanguageModel,
    rows_RC: np.ndarray,
    calibration_RC: np.ndarray | None = None,
    batch_size: int = 8,
    prefix_rows: int = 8,
    prefix_stride: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Section:
    """Scores rows with G_LM of the whole row, of the prefix, of another row, and calibrated.

    A row of C tokens gives T = C - 1 inputs and targets, as in training. The cost is three forward
    passes a row, and one for each position that is scored by its prefix.

    Args:
      rows_RC: held-out rows, int32, without padding.
      calibration_RC: other rows, for the calibrated G_LM; None sets aside the first of `rows_RC`,
        a quarter of them, at most `CALIBRATION_ROWS`, which are then not scored.
      batch_size: rows of one forward pass.
      prefix_rows: so many of the scored rows are also scored prefix by prefix.
      prefix_stride: of those, every so-manieth position; None takes about `PREFIX_POSITIONS`.
      advance: called with the number of rows that are done.

    Raises:
      ConfigError: rows that the model cannot take, fewer than two of them, or a setting below 1.
    """
    learned = model.config.g_source == "learned"
    check_rows(model.config, rows_RC, 2 if learned and calibration_RC is None else 1)
    length = rows_RC.shape[1] - 1
    stride = max(1, length // PREFIX_POSITIONS) if prefix_stride is None else prefix_stride
    settings = {"batch_size": batch_size, "prefix_rows": prefix_rows, "prefix_stride": stride}
    for name, value in settings.items():
        check_at_least(name, value, 1)
    if learned and calibration_RC is None:
        aside = min(CALIBRATION_ROWS, max(1, len(rows_RC) // 4))
        calibration_RC, rows_RC = rows_RC[:aside], rows_RC[aside:]
        advance(aside)
    positions_P = prefix_positions(length, stride)
    with mesh_scope(model.mesh):
        if not learned:
            return _predefined(_score(model, rows_RC, None, batch_size, 0, positions_P, advance))
        assert calibration_RC is not None
        check_rows(model.config, calibration_RC)
        calibration = _calibrate(model, calibration_RC, batch_size)
        losses = _score(model, rows_RC, calibration, batch_size, prefix_rows, positions_P, advance)
    numbers = _numbers(losses, positions_P, length)
    numbers["calibration_rows"], numbers["dtype"] = len(calibration_RC), model.config.dtype
    tensors = {
        "prefix_positions": positions_P,
        "logprob_difference": np.stack(losses.differences),
        **{f"loss_{name}": means.by_position for name, means in losses.losses.items()},
        **{f"gap_{name}": means.by_position for name, means in losses.gaps.items()},
    }
    return Section(
        name="causality",
        title="Causality",
        words=_words(numbers),
        tables=_tables(numbers),
        pictures=pictures_of(tensors, KINDS),
        numbers=numbers,
        tensors=tensors,
    )


def _calibrate(
    model: LanguageModel, rows_KC: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """G_LM [L,1,N,H,J] of the first row, and the mean over all of them, summed in float64."""
    row_nats = jitted(model.config).row_nats
    first: np.ndarray | None = None
    total = np.zeros(())
    for batch_BC, real in batches(rows_KC, batch_size):
        g_lm = np.asarray(row_nats(model.params, batch_BC)[1])
        first = g_lm[:, :1] if first is None else first
        for b in range(real):
            total = total + g_lm[:, b : b + 1].astype(np.float64)
    assert first is not None
    return first, (total / len(rows_KC)).astype(np.float32)


def _score(
    model: LanguageModel,
    rows_RC: np.ndarray,
    calibration: tuple[np.ndarray, np.ndarray] | None,
    batch_size: int,
    prefix_rows: int,
    positions_P: np.ndarray,
    advance: Callable[[int], None],
) -> PositionLosses:
    """All rows; row r takes the G_LM of row r - 1 as that of another, the first row that of the
    first calibration row.
    """
    row_nats, prefix_nats = jitted(model.config)
    losses, done = PositionLosses(), 0
    before: jax.Array | np.ndarray | None = None if calibration is None else calibration[0]
    for batch_BC, real in batches(rows_RC, batch_size):
        full_BT, g_lm = row_nats(model.params, batch_BC, model.g_lm)
        made = {"full": full_BT}
        if calibration is not None and before is not None:
            shifted = jnp.concatenate([before, g_lm[:, :-1]], axis=1)
            before = g_lm[:, real - 1 : real]
            everywhere = np.broadcast_to(calibration[1], shifted.shape)
            made["other"] = row_nats(model.params, batch_BC, shifted)[0]
            made["calibrated"] = row_nats(model.params, batch_BC, everywhere)[0]
        nats = {name: np.asarray(x_BT)[:real] for name, x_BT in made.items()}
        losses.add(nats)
        for b in range(real):
            if done < prefix_rows:
                parts = [
                    np.asarray(prefix_nats(model.params, batch_BC[b], chosen_B))[:n]
                    for chosen_B, n in batches(positions_P, batch_size)
                ]
                losses.add_prefix(nats["full"][b, positions_P], np.concatenate(parts))
            done += 1
            advance(1)
    return losses


def _predefined(losses: PositionLosses) -> Section:
    full = losses.losses["full"]
    words = (
        "Causal by construction: G_LM is the same whatever the input, so nothing of a row's "
        "future can reach a position through it, and the gap is 0. "
        f"The held-out loss is {full.mean:.4f} nats a token.",
    )
    numbers: dict[str, Any] = {
        "verdict": "causal by construction",
        "rows": full.rows,
        "positions": len(full.by_position),
        "loss": {"full": full.mean},
        "gap": {name: {"mean": 0.0} for name in ("prefix", "other", "calibrated")},
    }
    tensors = {"loss_full": full.by_position}
    pictures = pictures_of(tensors, KINDS)
    return Section("causality", "Causality", words, (), pictures, numbers, tensors)


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
    numbers: dict[str, Any] = {
        "rows": losses.losses["full"].rows,
        "positions": length,
        "prefix_rows": losses.losses["prefix"].rows,
        "prefix_positions": len(positions_P),
        "loss": {name: means.mean for name, means in losses.losses.items()},
        "gap": gaps,
        "logprob_difference": {
            "tokens": len(differences),
            "mean": float(differences.mean()),
            "max": float(differences.max()),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
        },
    }
    return {"verdict": verdict(gaps["prefix"]["mean"]), **numbers}


def verdict(gap: float) -> str:
    """In words, of a gap in nats a token; by its size, whatever its sign."""
    if not math.isfinite(gap):
        return "not finite"
    if abs(gap) <= NO_GAP:
        return "causal"
    return "nearly causal" if abs(gap) <= SMALL_GAP else "not causal"


def _words(numbers: dict[str, Any]) -> tuple[str, ...]:
    gap, loss, difference = numbers["gap"], numbers["loss"], numbers["logprob_difference"]
    prefix = gap["prefix"]
    meaning = {
        "causal": "the ordinary held-out loss is the loss of next-token prediction.",
        "nearly causal": "the ordinary held-out loss is off by a little.",
        "not causal": "the ordinary held-out loss is not that of next-token prediction; quote the "
        "loss with G_LM of the prefix.",
        "not finite": "nothing can be said of such a loss.",
    }[numbers["verdict"]]
    first = (
        f"{numbers['verdict'].capitalize()}: {meaning} With G_LM of the prefix alone the loss is "
        f"{loss['prefix']:.4f} nats a token, in one pass over the same tokens "
        f"{loss['full_at_prefix']:.4f}: a gap of {_with_error(prefix)}. Up to {NO_GAP:g} in "
        f"magnitude counts as causal, up to {SMALL_GAP:g} as nearly causal."
    )
    if abs(prefix["mean"]) > NO_GAP and prefix["first_half_share"] is not None:
        first += f" {prefix['first_half_share']:.0%} of it arises in the first half of a row."
    second = (
        f"Log-probabilities of single tokens differ between the two by {difference['mean']:.1e} in "
        f"the mean and {difference['max']:.1e} at most ({difference['tokens']} tokens of "
        f"{numbers['prefix_rows']} rows, {numbers['dtype']})."
    )
    if numbers["verdict"] == "causal" and difference["max"] > TOKEN_DIFFERENCE:
        second += " The gap is nothing only in the mean: single tokens differ."
    third = (
        f"Over {numbers['rows']} rows the loss is {loss['full']:.4f} nats a token with G_LM of the "
        f"whole row. With G_LM of another row the gap to it is {_with_error(gap['other'])}, with "
        f"the mean of {numbers['calibration_rows']} calibration rows "
        f"{_with_error(gap['calibrated'])}."
    )
    return first, second, third


def _tables(numbers: dict[str, Any]) -> tuple[Table, ...]:
    loss, gap, difference = numbers["loss"], numbers["gap"], numbers["logprob_difference"]
    rows: list[tuple[Cell, ...]] = [("whole row", numbers["rows"], loss["full"], None, None, None)]
    for name in list(KINDS)[1:]:
        of = gap[name]
        scored = numbers["prefix_rows"] if name == "prefix" else numbers["rows"]
        share = of["first_half_share"] if abs(of["mean"]) > NO_GAP else None
        rows.append((KINDS[name], scored, loss[name], of["mean"], of["standard_error"], share))
    columns = (
        "G_LM of",
        "rows",
        "loss, nats a token",
        "gap to the whole row",
        "standard error",
        "share of the gap in the first half",
    )
    quantiles = [(f"quantile {q}", value) for q, value in difference["quantiles"].items()]
    spread = (("mean", difference["mean"]), *quantiles, ("max", difference["max"]))
    title = "|Difference| of a token's log-probability, whole row and prefix"
    return (
        Table("Held-out loss by where G_LM comes from", columns, tuple(rows)),
        Table(title, ("", "nats"), spread),
    )


def _with_error(gap: dict[str, Any]) -> str:
    error = gap["standard_error"]
    mean = f"{gap['mean']:.2g}"
    return mean if error is None else f"{mean} (standard error {error:.1g})"
