"""A forward pass over rows of any packing: what `pldr_jax/data/rows.py` makes, for the model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.data.rows import INPUTS, PAD_ID, SEGMENTS, TARGETS
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


def inputs_of(rows: jax.Array) -> jax.Array:
    """What the model reads of rows [B,C] or [B,3,T]."""
    return jnp.maximum(rows[:, :-1], 0) if rows.ndim == 2 else rows[:, INPUTS]


def targets_of(rows: jax.Array, g_length_B: jax.Array | None = None) -> jax.Array:
    """What is to be predicted in rows [B,C] or [B,3,T].

    With `g_length_B`, padding stands where the G_LM of the first g_length_B tokens knows the
    target: what position g_length_B - 1 predicts is the first token that is left. (Lengths [B,K]
    are those of prompts, none of which is a target.)
    """
    targets_BT = rows[:, 1:]
    if rows.ndim == 3:
        targets_BT = jnp.where(rows[:, SEGMENTS] > 0, rows[:, TARGETS], PAD_ID)
    if g_length_B is None or g_length_B.ndim > 1:
        return targets_BT
    known_BT = jnp.arange(targets_BT.shape[1]) < g_length_B[:, None] - 1
    return jnp.where(known_BT, PAD_ID, targets_BT)


def lengths_of(rows: jax.Array) -> jax.Array | None:
    """Real tokens [B] of rows [B,3,T]; None of rows [B,C], whose tokens all are."""
    return None if rows.ndim == 2 else jnp.count_nonzero(rows[:, SEGMENTS], axis=1)


def first_documents(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [B,T] of rows [B,C] or [B,3,T] on the host, and how many of them count [B]: all, or
    those of the first segment.
    """
    if rows.ndim == 2:
        return rows[:, :-1], np.full(len(rows), rows.shape[1] - 1, np.int32)
    return rows[:, INPUTS], np.count_nonzero(rows[:, SEGMENTS] == 1, axis=1).astype(np.int32)


def forward_rows(
    config: ModelConfig,
    params: Params,
    rows: jax.Array,
    max_segments: int = 1,
    g_lm: jax.Array | None = None,
    g_length_B: jax.Array | None = None,
) -> RowOutputs:
    """The forward pass that the packing of the rows asks for.

    Args:
      rows: [B,C], or [B,3,T].
      max_segments: K, of rows [B,3,T]; static.
      g_lm: G_LM to use instead of PLGA's, [L,1,N,H,J], or [L,B,N,H,J] where K is 1.
      g_length_B: first tokens of each row that G_LM is computed from; targets that it knows are
        padding then. None is all of them. Where K is above 1, [B,K], of each segment.
    """
    targets_BT = targets_of(rows, g_length_B)
    if max_segments > 1:
        segments = Segments(rows[:, SEGMENTS], max_segments, g_length_B)
        outputs = forward(config, params, inputs_of(rows), g_lm, segments=segments)
        return RowOutputs(outputs, targets_BT, segments.real)
    length_B = lengths_of(rows)
    outputs = forward(config, params, inputs_of(rows), g_lm, length_B, g_length_B=g_length_B)
    if config.task == "question":  # whose softmax is over the tokens
        real_BT = rows[:, SEGMENTS] > 0
        outputs = outputs.replace(logits=jnp.where(real_BT[..., None], outputs.logits, -1e9))
    return RowOutputs(outputs, targets_BT, None if length_B is None else length_B > 0)
