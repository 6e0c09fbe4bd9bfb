"""Training without the leak: G_LM from tokens that tell nothing of the targets.

In ordinary training Q^T Q sums over the whole row, so that G_LM tells each position of its future.
`Loss.g_from` computes it elsewhere:

    prefix, random_prefix   from the first p tokens of the row; the loss is over the tokens after
                            them, which is how a prompt is continued
    neighbour               from the whole of another row of the batch; the loss is over all tokens
    prompt                  from what comes before the answer, which alone is a target

Attention is causal over the whole row in either case. In every layer the queries of the first p
tokens depend on these tokens alone, so that what position t >= p - 1 predicts depends on tokens up
to t alone.
"""

import jax
import jax.numpy as jnp

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.rows import SEGMENTS, TARGETS
from pldr_jax.model.decoder import Params, forward
from pldr_jax.training.losses import PAD_ID
from pldr_jax.training.rows import RowOutputs, forward_rows, inputs_of, lengths_of, targets_of

_STREAM = 0x6C6D
"""Keeps the keys of the drawn lengths apart from those of the initial parameters."""


def prefix_lengths(
    config: ExperimentConfig, rows: jax.Array, step: jax.Array | int
) -> jax.Array | None:
    """Tokens [B] that G_LM of each row is computed from, at least 1; None where it is all of them.
    Of prompts in rows with segments [B,K], those of each.

    A random length is uniform on 1 .. p, where p is `Loss.g_prefix_length`, or all tokens that the
    row has. It follows from `Training.seed`, the step and the row's place in the batch alone.

    Args:
      rows: of the whole batch, [B,C] or [B,3,T].
      step: updates made before.
    """
    loss = config.loss
    if loss.g_from == "prompt":
        lengths_BK = prompt_lengths(rows, config.data.segments_per_row)
        return lengths_BK if config.data.segments_per_row > 1 else lengths_BK[:, 0]
    if loss.g_from not in ("prefix", "random_prefix"):
        return None
    batch, length = inputs_of(rows).shape
    real_B = lengths_of(rows)
    real_B = jnp.full(batch, length, jnp.int32) if real_B is None else jnp.maximum(real_B, 1)
    longest = loss.g_prefix_length or (length if loss.g_from == "random_prefix" else length // 2)
    longest_B = jnp.minimum(real_B, longest)
    if loss.g_from == "prefix":
        return longest_B
    key = jax.random.fold_in(jax.random.key(config.training.seed), _STREAM)
    return jax.random.randint(jax.random.fold_in(key, step), (batch,), 1, longest_B + 1)


def prompt_lengths(rows: jax.Array, max_segments: int) -> jax.Array:
    """Tokens [B,K] of each segment of rows [B,3,T] up to the one that predicts its first target;
    those of all of it where it has none.
    """
    segments_BT, targets_BT = rows[:, SEGMENTS], rows[:, TARGETS]
    of_segment_BTK = segments_BT[:, :, None] == jnp.arange(1, max_segments + 1)
    answered_BTK = jnp.cumsum(of_segment_BTK & (targets_BT != PAD_ID)[:, :, None], axis=1) > 0
    before_BK = (of_segment_BTK & ~answered_BTK).sum(1)
    return jnp.minimum(before_BK + 1, jnp.maximum(of_segment_BTK.sum(1), 1))


def half_lengths(rows: jax.Array) -> jax.Array:
    """Half of the tokens of each row, [B], at least 1."""
    batch, length = inputs_of(rows).shape
    real_B = lengths_of(rows)
    return jnp.maximum((jnp.full(batch, length) if real_B is None else real_B) // 2, 1)


def scored_share(rows: jax.Array, g_length_B: jax.Array) -> jax.Array:
    """Share of the targets that the G_LM of the prefixes does not know."""
    scored = (targets_of(rows, g_length_B) != PAD_ID).sum()
    return scored / jnp.maximum((targets_of(rows) != PAD_ID).sum(), 1)


def forward_neighbour(config: ExperimentConfig, params: Params, rows: jax.Array) -> RowOutputs:
    """`forward_rows` with each row's G_LM that of the row before it, the first row's of the last.

    Two passes, and gradients flow through both. The deductive outputs are those of the first, row
    b's at entry b.
    """
    model, length_B = config.model, lengths_of(rows)
    own = forward(model, params, inputs_of(rows), None, length_B).deductive
    assert own.G_LM is not None
    given = forward_rows(model, params, rows, g_lm=jnp.roll(own.G_LM, 1, axis=1))
    return given._replace(outputs=given.outputs.replace(deductive=own))
