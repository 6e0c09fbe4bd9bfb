"""Attention weights softmax(Q G_LM K^T / sqrt(H)) of one prompt, of every layer and head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import quick_to_compile
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Decoder, Params
from pldr_jax.model.kernels import attention_weights
from pldr_jax.partition import mesh_scope


def attention_of_tokens(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, g_lm: jax.Array | None = None
) -> jax.Array:
    """Attention weights [L,B,N,T,S], float32, of a forward pass; a pure function.

    Computed from the queries and keys of that pass by the function that the attention of the model
    uses; only a fused kernel rounds differently.

    Args:
      g_lm: G_LM to use instead of PLGA's, [L,1,N,H,J] or [L,B,N,H,J].
    """
    decoder = Decoder(config)
    outputs, sown = decoder.apply({"params": params}, tokens_BT, g_lm, mutable=["intermediates"])
    q_LBTNJ = sown["intermediates"]["layers"]["attention"]["query"][0]
    weights = [attention_weights(q, k) for q, k in zip(q_LBTNJ, outputs.layers.k_BTNH, strict=True)]
    return jnp.stack(weights)


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> jax.stages.Wrapped:
    return jax.jit(functools.partial(attention_of_tokens, quick_to_compile(config)))


def prompt_attention(model: LanguageModel, prompt_T: np.ndarray) -> np.ndarray:
    """Attention weights [L,N,T,S] of one prompt."""
    with mesh_scope(model.mesh):
        weights = _jitted(model.config)(model.params, prompt_T[None], model.g_lm)
    return np.asarray(weights)[:, 0]


def describe_attention(weights_LNTS: np.ndarray) -> dict[str, np.ndarray]:
    """What the heads look at, [L,N] each, means over the queries but the first, which sees itself
    alone.

    `entropy` of the weights in nats, over its largest possible value log(t + 1): 1 is uniform;
    `distance` from query to key in tokens; shares of the weight `on_itself`, on the `previous` and
    on the `first` token.
    """
    w = np.asarray(weights_LNTS, np.float64)[:, :, 1:]
    queries_T, keys_S = np.arange(1, w.shape[2] + 1), np.arange(w.shape[3])
    entropy = -(w * np.log(np.where(w > 0, w, 1.0))).sum(-1) / np.log(queries_T + 1)
    distance = (w * np.maximum(queries_T[:, None] - keys_S, 0)).sum(-1)
    rows = np.arange(w.shape[2])
    return {
        "entropy": entropy.mean(-1),
        "distance": distance.mean(-1),
        "on_itself": w[:, :, rows, rows + 1].mean(-1),
        "previous": w[:, :, rows, rows].mean(-1),
        "first": w[..., 0].mean(-1),
    }
