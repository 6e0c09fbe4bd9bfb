"""A forward pass over rows of any packing: what `pldr_jax/data/rows.py` makes, for the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.data.rows import INPUTS, SEGMENTS, TARGETS
from pldr_jax.model.decoder import ModelOutputs, Params, forward
from pldr_jax.model.segments import Segments


class RowOutputs(NamedTuple):
    """What a model makes of rows.

    Attributes:
      outputs: of the model; its deductive outputs have a batch axis of B, or B * K with segments.
      targets_BT: what is to be predicted; padding where nothing is.
      real_B: which entries of that axis had a token; None is all.
    """

    outputs: ModelOutputs
    targets_BT: jax.Array
    real_B: jax.Array | None


def targets_of(rows: jax.Array) -> jax.Array:
    """What is to be predicted in rows [B,C] or [B,3,T]."""
    return rows[:, 1:] if rows.ndim == 2 else rows[:, TARGETS]


def forward_rows(
    config: ModelConfig,
    params: Params,
    rows: jax.Array,
    max_segments: int = 1,
    g_lm: jax.Array | None = None,
) -> RowOutputs:
    """The forward pass that the packing of the rows asks for.

    Args:
      rows: [B,C], or [B,3,T].
      max_segments: K, of rows [B,3,T]; static.
      g_lm: G_LM to use instead of PLGA's, [L,1,N,H,J].
    """
    if rows.ndim == 2:
        return RowOutputs(forward(config, params, rows[:, :-1], g_lm), targets_of(rows), None)
    inputs_BT, targets_BT, ids_BT = rows[:, INPUTS], rows[:, TARGETS], rows[:, SEGMENTS]
    if max_segments == 1:
        length_B = jnp.count_nonzero(ids_BT, axis=1)
        outputs = forward(config, params, inputs_BT, g_lm, length_B)
        return RowOutputs(outputs, targets_BT, length_B > 0)
    segments = Segments(ids_BT, max_segments)
    outputs = forward(config, params, inputs_BT, g_lm, segments=segments)
    return RowOutputs(outputs, targets_BT, segments.real)
