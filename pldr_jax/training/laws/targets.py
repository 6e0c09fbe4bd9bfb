"""What the loss of a training row is over: its targets (`Loss.targets`), and the hidden states that
dropout leaves (`Task.dropout`).
"""

import jax
import jax.numpy as jnp

from pldr_jax.config import ExperimentConfig
from pldr_jax.model.decoder import Decoder, ModelOutputs, Params, apply
from pldr_jax.training.losses import PAD_ID

_STREAM, _DROPOUT = 0x7461, 0x6472
"""Keep the keys of the draws apart from those of the initial parameters and of prefixes."""


def target_draws(config: ExperimentConfig, batch: int, step: jax.Array | int) -> jax.Array | None:
    """A number of [0, 1) for each row [B] that a random target, or what dropout leaves out, follows
    from; None where nothing is random. It follows from `Training.seed`, the step and the row's
    place in the batch alone.
    """
    if config.loss.targets != "random_one" and not config.task.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.training.seed), _STREAM)
    return jax.random.uniform(jax.random.fold_in(key, step), (batch,))


def count_targets(config: ExperimentConfig, targets_BT: jax.Array) -> jax.Array:
    """Targets of a batch that the loss is over; a row of one has no random one beside the last."""
    count_B = (targets_BT != PAD_ID).sum(1)
    fewest = {"all": None, "last": 1, "random_one": 2}[config.loss.targets]
    return count_B.sum() if fewest is None else (count_B >= fewest).sum()


def chosen_position(targets_BT: jax.Array, draw_B: jax.Array | None) -> jax.Array:
    """The place [B] of the last target that is not padding; with draws, of a random one before it,
    or T where there is none.
    """
    counted_BT = targets_BT != PAD_ID
    count_B = counted_BT.sum(1)
    if draw_B is None:
        rank_B = count_B - 1
    else:
        before_B = count_B - 1
        drawn_B = jnp.floor(draw_B * before_B).astype(jnp.int32)
        rank_B = jnp.where(before_B > 0, jnp.minimum(drawn_B, before_B - 1), -1)
    # The first place with rank_B counted targets before it and one at it.
    found_BT = counted_BT & (counted_BT.cumsum(1) == rank_B[:, None] + 1)
    return jnp.where(found_BT.any(1), found_BT.argmax(1), targets_BT.shape[1])


def at_chosen_targets(
    config: ExperimentConfig,
    params: Params,
    outputs: ModelOutputs,
    targets_BT: jax.Array,
    draw_B: jax.Array | None = None,
) -> tuple[ModelOutputs, jax.Array]:
    """Outputs and targets, of one place of each row, [B,1,...], where the loss is over one target.

    The logits of these places alone are computed: nothing reads the others, so that the compiler
    leaves them out.
    """
    if config.loss.targets == "all":
        return outputs, targets_BT
    place_B = chosen_position(targets_BT, draw_B)
    exists_B = place_B < targets_BT.shape[1]
    index_B1 = jnp.where(exists_B, place_B, 0)[:, None]
    targets_BT = jnp.take_along_axis(targets_BT, index_B1, axis=1)
    targets_BT = jnp.where(exists_B[:, None], targets_BT, PAD_ID)
    hidden_BTD = jnp.take_along_axis(outputs.hidden, index_B1[:, :, None], axis=1)
    head = {"head": params["head"]}
    logits_BTV = apply(Decoder(config.model), head, Decoder.logits, hidden_BTD)
    return outputs.replace(hidden=hidden_BTD, logits=logits_BTV), targets_BT


def with_dropout(
    config: ExperimentConfig, params: Params, outputs: ModelOutputs, draw_B: jax.Array | None
) -> ModelOutputs:
    """Outputs of which the head has read only some of the hidden states, the others as 0 and these
    scaled up; the outputs themselves without `Task.dropout` or without draws.
    """
    rate = config.task.dropout
    if not rate or draw_B is None:
        return outputs
    key = jax.random.fold_in(jax.random.key(config.training.seed), _DROPOUT)
    shape = outputs.hidden.shape[1:]

    def kept(draw: jax.Array) -> jax.Array:
        number = jax.lax.bitcast_convert_type(draw, jnp.uint32)
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, shape)

    kept_BTD = jax.vmap(kept)(draw_B.astype(jnp.float32))
    hidden_BTD = jnp.where(kept_BTD, outputs.hidden / (1 - rate), 0).astype(outputs.hidden.dtype)
    logits = apply(Decoder(config.model), {"head": params["head"]}, Decoder.logits, hidden_BTD)
    return outputs.replace(hidden=hidden_BTD, logits=logits)
