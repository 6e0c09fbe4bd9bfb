"""The pure functions of decoding; the engine jits them, and a loop of one's own can be built from
them.

Prompts are left-aligned and padded on the right: positions start at the first real token, the
causal mask keeps real tokens from padding, and `length_B` keeps padding out of Q^T Q, so that a
prompt decodes to what it decodes to alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.cache import Cache, LayerOutputs, build_cache
from pldr_jax.model.decoder import Decoder, DecoderLayer, Params, apply
from pldr_jax.model.decoder import decode_step as decode_step
from pldr_jax.model.embedding import Embedding
from pldr_jax.model.low_rank import LowRankG
from pldr_jax.model.weights import scan_layers


def prefill(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    capacity: int,
    keep: str = "G_LM",
) -> tuple[jax.Array, Cache]:
    """Runs the prompts once.

    Args:
      params: stacked, or what `unstack_layers` makes of them.
      tokens_BT: prompts, padded on the right.
      length_B: real tokens of each, at least 1.
      g_lm_LBNHJ: G_LM to decode with, for a cache of V^T k in factors; None takes what each prompt
        gives.
      capacity: S, tokens that the cache can hold, at least T.
      keep: "G_LM", or "A" to recompute the last steps of PLGA at every token.

    Returns:
      Logits [B,V] after each prompt's last real token, and the cache.
    """
    low_rank = g_lm_LBNHJ if isinstance(g_lm_LBNHJ, LowRankG) else None
    g_lm = g_lm_LBNHJ.G_LM if isinstance(g_lm_LBNHJ, LowRankG) else g_lm_LBNHJ
    last_BV, layers = _last_logits(config, params, tokens_BT, length_B, g_lm)
    return last_BV, build_cache(layers, length_B, capacity, keep, low_rank)


def extend(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    first: jax.Array,
    last_B: jax.Array,
    before: LayerOutputs,
    g_lm_LBNHJ: jax.Array | None,
) -> tuple[jax.Array, LayerOutputs]:
    """Runs some tokens of prompts whose earlier ones have been run, with one G_LM for all tokens.

    Args:
      params: stacked, or what `unstack_layers` makes of them.
      tokens_BT: the tokens at positions `first`, `first` + 1, ...
      last_B: of which one of them the logits are returned.
      before: keys and values [L,B,S,N,H], of which those before `first` are read.
      g_lm_LBNHJ: G_LM; None is the identity.

    Returns:
      Logits [B,V], and keys and values of these tokens.
    """

    def body(
        layer: Params, x_BTD: jax.Array, inputs: tuple[Any, ...]
    ) -> tuple[jax.Array, LayerOutputs]:
        return apply(DecoderLayer(config), layer, DecoderLayer.extend, x_BTD, first, *inputs)

    x_BTD = apply(Embedding(config), params["embedding"], Embedding.__call__, tokens_BT)
    inputs = before.k_BTNH, before.v_BTNH, g_lm_LBNHJ
    hidden_BTD, made = scan_layers(config, params["layers"], body, x_BTD, inputs)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return apply(Decoder(config), params, Decoder.logits, last_B1D)[:, 0], made


def full_step(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    g_lm_LBNHJ: jax.Array | None,
) -> jax.Array:
    """Logits [B,V] after each row's last real token, keys and values recomputed from all of them.

    With `g_lm_LBNHJ` None, G_LM is recomputed as well: the definition of the model, without any
    cache.
    """
    return _last_logits(config, params, tokens_BT, length_B, g_lm_LBNHJ)[0]


def prompt_g_lm(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, length_B: jax.Array
) -> jax.Array:
    """G_LM [L,B,N,H,J] of each prompt."""
    _, layers = apply(Decoder(config), params, Decoder.hidden, tokens_BT, None, length_B)
    assert layers.deductive.G_LM is not None
    return layers.deductive.G_LM


def _last_logits(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    g_lm_LBNHJ: jax.Array | None,
) -> tuple[jax.Array, LayerOutputs]:
    decoder = Decoder(config)
    hidden_BTD, layers = apply(decoder, params, Decoder.hidden, tokens_BT, g_lm_LBNHJ, length_B)
    # The head runs on the last token only: on all of them it would be most of a prefill's memory.
    last_B1D = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)
    return apply(decoder, params, Decoder.logits, last_B1D)[:, 0], layers
