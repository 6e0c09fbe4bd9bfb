"""A batch of slots that decode side by side: admitting a prompt to a slot, and decoding all of
them.

Shapes are fixed: B slots of S tokens. A finished slot is given to the next prompt while the others
go on, so that a queue of any length compiles once a prompt bucket and once to decode.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.inference.sampling import Sampling, draw, penalize
from pldr_jax.model.cache import Cache, empty_cache, write_row
from pldr_jax.model.decoder import Params
from pldr_jax.model.low_rank import LowRankG
from pldr_jax.partition import constrain


class Limits(flax.struct.PyTreeNode):
    """What ends a row; arrays [B].

    Attributes:
      left_B: new tokens it may still make.
      stop_BK: token ids that end it, filled up with -1.
    """

    left_B: jax.Array
    stop_BK: jax.Array


class Slots(flax.struct.PyTreeNode):
    """The whole state of decoding; every step returns a new one.

    Attributes:
      cache: of all slots.
      logits_BV: from which each slot's next token is drawn, float32.
      seen_BV: tokens of the slot's prompt and text, for the repetition penalty.
      active_B: false where a slot is free or its row has ended.
      sampling, limits: of each slot's row.
    """

    cache: Cache
    logits_BV: jax.Array
    seen_BV: jax.Array
    active_B: jax.Array
    sampling: Sampling
    limits: Limits


class Emitted(flax.struct.PyTreeNode):
    """What a run of decode steps made; [step, slot].

    Attributes:
      token_CB: the tokens drawn.
      logprob_CB: their log-probability in the model's own distribution, at temperature 1.
      valid_CB: true where the token belongs to a text; a stop token does not.
      stopped_CB: true where a stop token was drawn.
      broken_CB: true where logits were not finite, which ends the row.
    """

    token_CB: jax.Array
    logprob_CB: jax.Array
    valid_CB: jax.Array
    stopped_CB: jax.Array
    broken_CB: jax.Array


def empty_slots(
    config: ModelConfig,
    rows: int,
    length: int,
    stop_ids: int,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    keep: str,
    dtype: Any,
) -> Slots:
    """Free slots.

    Args:
      config: of the model.
      rows: B.
      length: S, tokens that a slot can hold.
      stop_ids: K, stop tokens that a row can have.
      g_lm_LBNHJ: one G_LM [L,1,N,H,J] for all rows, or its factors; None where each has its own,
        or for the identity.
      keep: "G_LM" or "A", what each row keeps of its prompt.
      dtype: of keys and values.
    """
    slots = Slots(
        cache=empty_cache(config, rows, length, g_lm_LBNHJ, keep, dtype),
        logits_BV=jnp.zeros((rows, config.vocab_size), jnp.float32),
        seen_BV=jnp.zeros((rows, config.vocab_size), bool),
        active_B=jnp.zeros((rows,), bool),
        sampling=Sampling.create(rows),
        limits=Limits(jnp.zeros((rows,), jnp.int32), jnp.full((rows, stop_ids), -1, jnp.int32)),
    )
    return _laid_out(slots)


def admit(
    config: ModelConfig,
    params: Params,
    slots: Slots,
    slot: jax.Array,
    tokens_T: jax.Array,
    length: jax.Array,
    sampling: Sampling,
    limits: Limits,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    keep: str,
) -> Slots:
    """Runs one prompt and puts it into a slot. Donate `slots` when jitting this.

    The prompt runs alone, whatever its neighbours: its G_LM, keys and values are those it has
    alone. Bit for bit so, if its bucket is always the same: G_LM amplifies rounding, and another
    width of padding means another order of the sums.

    Args:
      params: stacked parameters.
      slot: index of the slot, int32 scalar.
      tokens_T: the prompt, padded on the right to its bucket, which may be longer than a slot.
      length: its real tokens.
      sampling, limits: of this row, with a batch axis of 1.
      g_lm_LBNHJ, keep: as `empty_slots` was told.
    """
    logits_1V, row = prefill(
        config, params, tokens_T[None], length[None], g_lm_LBNHJ, tokens_T.shape[0], keep
    )
    layers = tuple(
        layer.with_prompt(prompt, slot)
        for layer, prompt in zip(slots.cache.layers, row.layers, strict=True)
    )
    vocab = config.vocab_size
    padded = jnp.where(jnp.arange(tokens_T.shape[0]) < length, tokens_T, vocab)
    seen_V = jnp.zeros((vocab,), bool).at[padded].set(True, mode="drop")

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return write_row(old, new, slot)

    slots = Slots(
        cache=Cache(layers, slots.cache.length_B.at[slot].set(length)),
        logits_BV=put(slots.logits_BV, logits_1V),
        seen_BV=put(slots.seen_BV, seen_V[None]),
        active_B=slots.active_B.at[slot].set(True),
        sampling=jax.tree.map(put, slots.sampling, sampling),
        limits=jax.tree.map(put, slots.limits, limits),
    )
    return _laid_out(slots)


def release(slots: Slots, ended_B: jax.Array) -> Slots:
    """Frees the slots of rows that ended for a reason the steps do not know, such as their text."""
    return _laid_out(slots.replace(active_B=slots.active_B & ~ended_B))


def decode_slots(
    config: ModelConfig, unstacked: Params, slots: Slots, steps: int
) -> tuple[Slots, Emitted]:
    """Up to `steps` tokens of every active slot, in one call. Donate `slots` when jitting this.

    Stops early when no slot is active. What a free slot computes is never read.
    """
    rows = slots.active_B.shape[0]
    nothing = Emitted(
        token_CB=jnp.zeros((steps, rows), jnp.int32),
        logprob_CB=jnp.zeros((steps, rows), jnp.float32),
        valid_CB=jnp.zeros((steps, rows), bool),
        stopped_CB=jnp.zeros((steps, rows), bool),
        broken_CB=jnp.zeros((steps, rows), bool),
    )

    def going(state: tuple[jax.Array, Slots, Emitted]) -> jax.Array:
        return (state[0] < steps) & jnp.any(state[1].active_B)

    def step(state: tuple[jax.Array, Slots, Emitted]) -> tuple[jax.Array, Slots, Emitted]:
        i, slots, emitted = state
        slots, made = _step(config, unstacked, slots)
        return i + 1, slots, jax.tree.map(lambda all_, one: all_.at[i].set(one), emitted, made)

    _, slots, emitted = jax.lax.while_loop(going, step, (jnp.int32(0), slots, nothing))
    # Whole on every device, so that each process can read all of it.
    return slots, jax.tree.map(lambda x: constrain(x, None, None), emitted)


def _step(config: ModelConfig, unstacked: Params, slots: Slots) -> tuple[Slots, Emitted]:
    cache, active_B = slots.cache, slots.active_B
    logits_BV = penalize(slots.logits_BV, slots.seen_BV, slots.sampling.penalty_B)
    token_B = draw(logits_BV, slots.sampling, cache.length_B)
    chosen_B = jnp.take_along_axis(slots.logits_BV, token_B[:, None], axis=-1)[:, 0]
    normalizer_B = jax.nn.logsumexp(slots.logits_BV, axis=-1)
    logprob_B = chosen_B - normalizer_B
    # One NaN or infinity among the logits is enough for this sum not to be finite.
    broken_B = active_B & ~jnp.isfinite(normalizer_B)
    stopped_B = active_B & ~broken_B & jnp.any(token_B[:, None] == slots.limits.stop_BK, axis=-1)
    valid_B = active_B & ~broken_B & ~stopped_B
    left_B = slots.limits.left_B - valid_B
    full_B = cache.length_B + 1 >= config.context_length
    next_active_B = valid_B & (left_B > 0) & ~full_B
    logits_BV, grown = decode_step(config, unstacked, token_B, cache)
    ids_V = jnp.arange(config.vocab_size)
    slots = slots.replace(
        cache=grown.replace(length_B=jnp.where(next_active_B, grown.length_B, cache.length_B)),
        logits_BV=logits_BV,
        seen_BV=slots.seen_BV | (valid_B[:, None] & (token_B[:, None] == ids_V)),
        active_B=next_active_B,
        limits=slots.limits.replace(left_B=left_B),
    )
    return _laid_out(slots), Emitted(token_B, logprob_B, valid_B, stopped_B, broken_B)


def _laid_out(slots: Slots) -> Slots:
    """What is outside the cache, as it lives on the mesh in scope: slots over its batch axes."""

    def place(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    return slots.replace(
        cache=slots.cache.replace(length_B=place(slots.cache.length_B)),
        logits_BV=constrain(slots.logits_BV, "batch", "vocab"),
        seen_BV=constrain(slots.seen_BV, "batch", "vocab"),
        active_B=place(slots.active_B),
        sampling=jax.tree.map(place, slots.sampling),
        limits=jax.tree.map(place, slots.limits),
    )
