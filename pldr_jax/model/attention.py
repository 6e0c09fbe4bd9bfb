"""Attention with a metric: softmax(Q G_LM K^T / sqrt(H)) V, G_LM from PLGA, from the cache or from
outside.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.cache import LayerCache, LayerOutputs
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.kernels import apply_metric, attend, attend_from
from pldr_jax.model.layers import REFERENCE_DIM, Linear, width_scale
from pldr_jax.model.plga import PowerLawGraphAttention
from pldr_jax.model.rope import rotate
from pldr_jax.model.segments import Segments


class AttentionInputs(flax.struct.PyTreeNode):
    """What a layer needs besides its hidden states; the same for all layers of one call.

    Attributes:
      positions_BT: position of each token, for RoPE; [1,T] serves every row.
      summed_BT: tokens that Q^T Q sums over: real ones, and of those the first P where G_LM is that
        of a prefix. None: all. Attention needs no such mask: padding comes last, where the causal
        mask keeps it from every real token.
      segments: where rows hold several sequences side by side.
    """

    positions_BT: jax.Array
    summed_BT: jax.Array | None = None
    segments: Segments | None = None


class Attention(nn.Module):
    """Multi-head attention of one decoder layer; `q`, `k`, `v`, `out` and, where G_LM is learned,
    `plga`. Decoding has `qkv` in place of the first three (`join_projections`).
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        model, heads = (config.model_dim,), (config.num_heads, config.head_dim)
        head_axes, dtype = ("heads", "head_dim"), jnp.dtype(config.dtype)
        scale = width_scale(config, 2 * model, (REFERENCE_DIM, REFERENCE_DIM))
        self.q, self.k, self.v = (
            Linear(model, heads, ("embed",), head_axes, dtype, scale=scale) for _ in range(3)
        )
        three = (3, *heads)
        self.qkv = Linear(model, three, ("embed",), ("joined", *head_axes), dtype)
        self.out = Linear(heads, model, head_axes, ("embed",), dtype, scale=scale)
        if config.g_source == "learned":
            self.plga = PowerLawGraphAttention(config)

    def __call__(
        self, x_BTD: jax.Array, inputs: AttentionInputs, g_lm_BNHJ: jax.Array | None = None
    ) -> tuple[jax.Array, LayerOutputs]:
        """Causal attention of a whole sequence to itself, or of each segment to itself.

        Args:
          x_BTD: hidden states.
          inputs: positions, mask and segments.
          g_lm_BNHJ: G_LM from outside ([1,N,H,J] serves every row and segment); None takes PLGA's,
            or the identity where the model has no PLGA.

        Returns:
          The output [B,T,D], and keys, values and deductive outputs of this layer.
        """
        segments = inputs.segments
        q_BTNH, k_BTNH, v_BTNH = self._project(x_BTD, inputs.positions_BT)
        if g_lm_BNHJ is None and self.config.g_source == "learned":
            deductive = self.plga(q_BTNH, inputs.summed_BT, segments)
        else:
            deductive = DeductiveOutputs(G_LM=g_lm_BNHJ)
        query_BTNJ = apply_metric(q_BTNH, deductive.G_LM, segments)
        self.sow("intermediates", "query", query_BTNJ)
        ids_BT = None if segments is None else segments.ids_BT
        out_BTNH = attend(query_BTNJ, k_BTNH, v_BTNH, self.config.attention_kernel, ids_BT)
        return self.out(out_BTNH), LayerOutputs(k_BTNH, v_BTNH, deductive)

    def extend(
        self,
        x_BTD: jax.Array,
        first: jax.Array,
        k_BSNH: jax.Array,
        v_BSNH: jax.Array,
        g_lm_BNHJ: jax.Array | None,
    ) -> tuple[jax.Array, LayerOutputs]:
        """Attention of some tokens to themselves and to those before them; not with PLGA.

        Args:
          x_BTD: hidden states of the tokens at positions `first`, `first` + 1, ...
          k_BSNH, v_BSNH: keys and values of a whole sequence, of which those before `first` are
            read.
          g_lm_BNHJ: G_LM; None is the identity.

        Returns:
          The output [B,T,D], and keys and values of these tokens.
        """
        positions_BT = first + jnp.arange(x_BTD.shape[1])[None, :]
        q_BTNH, k_BTNH, v_BTNH = self._project(x_BTD, positions_BT)
        k_BSNH = jax.lax.dynamic_update_slice_in_dim(k_BSNH, k_BTNH, first, axis=1)
        v_BSNH = jax.lax.dynamic_update_slice_in_dim(v_BSNH, v_BTNH, first, axis=1)
        out_BTNH = attend_from(apply_metric(q_BTNH, g_lm_BNHJ), k_BSNH, v_BSNH, first)
        return self.out(out_BTNH), LayerOutputs(k_BTNH, v_BTNH, DeductiveOutputs())

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache]:
        """Attention of the newest token (T = 1) to itself and to the cached tokens before it.

        Args:
          x_BTD: hidden states of the newest token.
          positions_BT: [B,1], its position, which is also its place in the cache.
          cache: of this layer. Its G_LM is used as it is; one that keeps A has G_LM recomputed.

        Returns:
          The output [B,1,D] and the cache with the token's key and value added.
        """
        qkv = self.qkv(x_BTD)
        q_BTNH, k_BTNH = (self._rotated(qkv[:, :, i], positions_BT) for i in range(2))
        v_BTNH = qkv[:, :, 2]
        last_B, g_lm_BNHJ = positions_BT[:, 0], None
        cache = cache.append(k_BTNH, v_BTNH, last_B)
        if cache.deductive.A is not None:
            g_lm_BNHJ = self.plga.energy_curvature(cache.deductive.A).G_LM
        out_BNH = cache.attend(q_BTNH[:, 0], last_B, g_lm_BNHJ)
        return self.out(out_BNH.astype(x_BTD.dtype)[:, None]), cache

    def _project(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BTNH = self._rotated(self.q(x_BTD), positions_BT)
        return q_BTNH, self._rotated(self.k(x_BTD), positions_BT), self.v(x_BTD)

    def _rotated(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        return rotate(x_BTNH, positions_BT, self.config.rope_theta, self.config.rope_layout)


def join_projections(attention: dict[str, Any]) -> dict[str, Any]:
    """Parameters of `Attention` as `Attention.decode` reads them: q, k and v side by side."""
    q, k, v = (attention[name] for name in ("q", "k", "v"))
    joined = {
        name: jnp.stack([x[name] for x in (q, k, v)], axis=int(name == "kernel")) for name in q
    }
    rest = {name: tree for name, tree in attention.items() if name not in ("q", "k", "v")}
    return {**rest, "qkv": joined}


def split_projections(attention: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `join_projections`."""
    joined = attention["qkv"]
    three = {
        each: {name: x[:, i] if name == "kernel" else x[i] for name, x in joined.items()}
        for i, each in enumerate(("q", "k", "v"))
    }
    return {**{name: tree for name, tree in attention.items() if name != "qkv"}, **three}
