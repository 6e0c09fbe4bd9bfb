"""Drawing the next token from logits.

Order: penalties and bias, temperature, then `FILTERS`: top-k, top-p, min-p. A draw depends on the
prompt's seed and the position of the token alone, not on the batch, the slot or the bucket it is
made in.

A new filter is a field of `SamplingConfig` and a function here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import SamplingConfig
from pldr_jax.model.reductions import most_probable

EXCLUDED = -jnp.inf
"""The logit of a token that cannot be drawn."""

SlotSampling = dict[str, jax.Array]
"""The numbers of a `SamplingConfig` by their names, an array [B] each, one entry a slot."""


def slot_sampling(settings: Sequence[SamplingConfig]) -> SlotSampling:
    """The numbers of several settings, side by side.

    NumPy arrays: making them on the device would cost more than the step that reads them.
    """
    columns: dict[str, Any] = {}
    for one in dataclasses.fields(SamplingConfig):
        if isinstance(one.default, (int, float)):
            wide = (one.metadata["high"] or 0) >= 2**31
            whole = np.uint32 if wide else np.int32
            dtype = np.float32 if isinstance(one.default, float) else whole
            columns[one.name] = np.array([getattr(s, one.name) for s in settings], dtype)
    return columns


class History(flax.struct.PyTreeNode):
    """What a text's own tokens, and its request, do to its logits.

    Attributes:
      seen_BV: whether the prompt or the new text has a token, for the repetition penalty.
      count_BV: how often the new text has it, int32, for the other two.
      bias_BV: added to the logits, float32.
    """

    seen_BV: jax.Array
    count_BV: jax.Array
    bias_BV: jax.Array

    def with_token(self, token_B: jax.Array, valid_B: jax.Array) -> "History":
        """The history with one more token of the texts where `valid_B` is true."""
        ids_V = jnp.arange(self.seen_BV.shape[-1])
        new_BV = valid_B[:, None] & (token_B[:, None] == ids_V)
        return self.replace(seen_BV=self.seen_BV | new_BV, count_BV=self.count_BV + new_BV)


def adjust(logits_BV: jax.Array, history: History, sampling: SlotSampling) -> jax.Array:
    """Logits after all penalties and the bias."""
    presence_B1 = sampling["presence_penalty"][:, None]
    frequency_B1 = sampling["frequency_penalty"][:, None]
    taken_BV = presence_B1 * (history.count_BV > 0) + frequency_B1 * history.count_BV
    return penalize(logits_BV, history.seen_BV, sampling) - taken_BV + history.bias_BV


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Logits of tokens already in the text (true in `seen_BV`) divided by the repetition penalty
    where positive, and multiplied by it where negative.
    """
    penalty_B1 = sampling["repetition_penalty"][:, None]
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def draw(logits_BV: jax.Array, sampling: SlotSampling, position_B: jax.Array) -> jax.Array:
    """The next token of each slot, int32 [B].

    Args:
      logits_BV: float32, after penalties and bias.
      sampling: settings of each slot.
      position_B: position the drawn token will have; enters the draw's random key.
    """
    greedy_B = most_probable(logits_BV)
    hot_B = sampling["temperature"] > 0

    def drawn() -> jax.Array:
        kept_BV = filter_logits(logits_BV, sampling)

        def one(seed: jax.Array, position: jax.Array, kept_V: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, kept_V)

        drawn_B = jax.vmap(one)(sampling["seed"], position_B, kept_BV).astype(jnp.int32)
        return jnp.where(hot_B, drawn_B, greedy_B)

    # The sort is skipped where every slot is greedy.
    return jax.lax.cond(jnp.any(hot_B), drawn, lambda: greedy_B)


def filter_logits(logits_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Logits below their largest, over temperature; -inf for what a filter leaves out.

    The most probable token always stays. Equally probable tokens are taken in the order of their
    ids.
    """
    temperature_B1 = sampling["temperature"][:, None]
    # A temperature that float32 rounds to nothing would divide 0 by 0.
    divisor_B1 = jnp.maximum(temperature_B1, jnp.finfo(jnp.float32).tiny)
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = below_BV / jnp.where(temperature_B1 > 0, divisor_B1, 1.0)
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    first_V = jnp.arange(logits_BV.shape[-1]) == 0
    for keep in FILTERS:
        sorted_BV = jnp.where(keep(sorted_BV, sampling) | first_V, sorted_BV, EXCLUDED)
    slots_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return scaled_BV.at[slots_B1, order_BV].set(sorted_BV)


def keep_top_k(sorted_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """The k most probable tokens; 0 keeps all."""
    top_k_B1 = sampling["top_k"][:, None]
    return (jnp.arange(sorted_BV.shape[-1]) < top_k_B1) | (top_k_B1 == 0)


def keep_top_p(sorted_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """The nucleus: the smallest set of most probable tokens whose mass reaches p; (.5, .3, .2)
    keeps two at p = 0.6. 1 keeps all.
    """
    top_p_B1 = sampling["top_p"][:, None]
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    mass_before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    return (mass_before_BV < top_p_B1) | (top_p_B1 >= 1)


def keep_min_p(sorted_BV: jax.Array, sampling: SlotSampling) -> jax.Array:
    """Tokens at least this share as probable as the most probable one, whose logit is 0."""
    return jnp.exp(sorted_BV) >= sampling["min_p"][:, None]


FILTERS: tuple[Callable[[jax.Array, SlotSampling], jax.Array], ...] = (
    keep_top_k,
    keep_top_p,
    keep_min_p,
)
"""In the order in which they act: from logits [B,V] in falling order, the largest 0 and those left
out by the filters before -inf, to those that stay."""
