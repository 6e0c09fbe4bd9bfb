"""Attention with a metric: softmax(Q G_LM K^T / sqrt(H)) V, G_LM from PLGA, from the cache or from
outside.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.cache import LayerCache, LayerOutputs, LowRankLayerCache
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.kernels import fused_attention
from pldr_jax.model.layers import Linear, full_product_operand
from pldr_jax.model.plga import PowerLawGraphAttention
from pldr_jax.model.rope import rotate
from pldr_jax.model.segments import Segments

LONG, BLOCK = 2048, 512
"""Without a fused kernel, scores are computed BLOCK queries at a time from LONG tokens on."""

MASKED = -1e30
"""Score of a pair outside the mask; finite, so that a row with nothing to attend to stays
finite.
"""


class AttentionInputs(flax.struct.PyTreeNode):
    """What a layer needs besides its hidden states; the same for all layers of one call.

    Attributes:
      positions_BT: position of each token, for RoPE; [1,T] serves every row.
      valid_BT: true for the tokens that Q^T Q sums over, which are real ones, and of those the
        first where G_LM is that of a prefix; None where all are. Only Q^T Q needs it: rows are
        left-aligned, so that the causal mask already keeps padding, which comes last, from every
        real token.
      segments: where rows hold several sequences side by side.
    """

    positions_BT: jax.Array
    valid_BT: jax.Array | None = None
    segments: Segments | None = None


def apply_metric(
    q_BTNH: jax.Array, g_lm_BNHJ: jax.Array | None, segments: Segments | None = None
) -> jax.Array:
    """q G_LM [B,T,N,J], in the dtype of q; q itself where G_LM is the identity (None).

    With segments, G_LM is [1,N,H,J] or one for each segment, [B * K,N,H,J].
    """
    if g_lm_BNHJ is None:
        return q_BTNH
    g_lm = g_lm_BNHJ.astype(q_BTNH.dtype)
    if g_lm.shape[0] == 1:
        return jnp.einsum("BTNH,NHJ->BTNJ", q_BTNH, g_lm[0])
    if segments is not None:
        return segments.apply_metric(q_BTNH, g_lm)
    # With q first, a CPU takes a third longer for the whole attention and its gradient.
    return jnp.einsum("BNHJ,BTNH->BTNJ", g_lm, q_BTNH)


def apply_metric_once(q_BNH: jax.Array, g_lm_BNHJ: jax.Array | None) -> jax.Array:
    """As `apply_metric` for one query a row, [B,N,J]: a plain batch of vectors times matrices."""
    if g_lm_BNHJ is None:
        return q_BNH
    g_lm = g_lm_BNHJ.astype(q_BNH.dtype)
    if g_lm.shape[0] == 1:
        return jnp.einsum("BNH,NHJ->BNJ", q_BNH, g_lm[0])
    return jnp.einsum("BNH,BNHJ->BNJ", q_BNH, g_lm)


def attention_scores(q_BTNJ: jax.Array, k_BSNJ: jax.Array) -> jax.Array:
    """(q G_LM) K^T / sqrt(H), [B,N,T,S] in float32, before the mask."""
    q, k = full_product_operand(q_BTNJ), full_product_operand(k_BSNJ)
    scores = jnp.einsum("BTNJ,BSNJ->BNTS", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q_BTNJ.shape[-1])


def attention_weights(
    q_BTNJ: jax.Array, k_BSNJ: jax.Array, mask_BNTS: jax.Array | None = None
) -> jax.Array:
    """softmax(mask((q G_LM) K^T / sqrt(H))), [B,N,T,S] in float32; None is the causal mask."""
    scores_BNTS = attention_scores(q_BTNJ, k_BSNJ)
    if mask_BNTS is None:
        mask_BNTS = jnp.tril(jnp.ones(scores_BNTS.shape[-2:], bool))
    return jax.nn.softmax(jnp.where(mask_BNTS, scores_BNTS, MASKED), axis=-1)


def attend(
    q_BTNJ: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    kernel: str,
    mask_BNTS: jax.Array | None = None,
) -> jax.Array:
    """softmax(mask(q k^T / sqrt(H))) v, [B,T,N,H]; q already holds q G_LM.

    Args:
      kernel: `Model.attention_kernel`. Fused kernels do causal attention of a whole sequence
        only.
      mask_BNTS: true where a query may look; None is causal attention of a sequence to itself.
    """
    if mask_BNTS is None:
        fused_BTNH = fused_attention(q_BTNJ, k_BSNH, v_BSNH, kernel)
        if fused_BTNH is not None:
            return fused_BTNH
    long = kernel == "auto" and q_BTNJ.shape[1] >= LONG
    if mask_BNTS is None and (kernel == "blocks" or long):
        return attend_in_blocks(q_BTNJ, k_BSNH, v_BSNH)
    weights_BNTS = attention_weights(q_BTNJ, k_BSNH, mask_BNTS)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


def attend_in_blocks(
    q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, block: int = BLOCK
) -> jax.Array:
    """Causal attention of a sequence to itself, `block` queries at a time, [B,T,N,H].

    The same numbers, but only [B,N,block,S] scores are ever in memory: the backward pass computes
    those of a block again.
    """
    batch, length = q_BTNJ.shape[:2]
    blocks = -(-length // block)
    q = jnp.pad(q_BTNJ, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, blocks, block, *q_BTNJ.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend_block(first: jax.Array, q_BTNJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        positions_T = first + jnp.arange(block)
        mask_TS = jnp.arange(k_BSNH.shape[1])[None] <= positions_T[:, None]
        scores_BNTS = jnp.where(mask_TS, attention_scores(q_BTNJ, k_BSNH), MASKED)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BSNH.dtype)
        return first + block, jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH)

    _, out = jax.lax.scan(attend_block, jnp.int32(0), q)
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, *v_BSNH.shape[2:])[:, :length]


def attend_cached(
    q_BNJ: jax.Array, k_BNSH: jax.Array, v_BNSH: jax.Array, last_B: jax.Array
) -> jax.Array:
    """Attention of one query a row to the cache slots up to `last_B`, [B,N,H]; scores in float32.

    Heads come before slots in the cache because both products are then plain batched matrix
    products; with slots first, they were seven times slower on a CPU.
    """
    q_BNJ = q_BNJ.astype(k_BNSH.dtype)
    scores_BNS = jnp.einsum("BNJ,BNSJ->BNS", q_BNJ, k_BNSH, preferred_element_type=jnp.float32)
    return _weighted_values(scores_BNS, v_BNSH, last_B)


def attend_low_rank(q_BNH: jax.Array, cache: LowRankLayerCache, last_B: jax.Array) -> jax.Array:
    """`attend_cached` of queries that have not met G_LM, with keys cached as V^T k."""
    outs, order = [], []
    for group in cache.groups:
        heads, k_BNES = list(group.factors.heads), group.k_BNES
        q_BNH_ = q_BNH[:, np.array(heads)].astype(jnp.float32)
        q_BNE = jnp.einsum("BNH,NHE->BNE", q_BNH_, group.factors.query_NHE).astype(k_BNES.dtype)
        scores_BNS = jnp.einsum("BNE,BNES->BNS", q_BNE, k_BNES, preferred_element_type=jnp.float32)
        outs.append(_weighted_values(scores_BNS, group.v_BNSH, last_B))
        order += heads
    return jnp.concatenate(outs, axis=1)[:, np.argsort(order)]


def _weighted_values(scores_BNS: jax.Array, v_BNSH: jax.Array, last_B: jax.Array) -> jax.Array:
    """Softmax of the scores over sqrt(H) up to slot `last_B`, times the values, [B,N,H]."""
    visible_BNS = jnp.arange(v_BNSH.shape[2]) <= last_B[:, None, None]
    scores_BNS = jnp.where(visible_BNS, scores_BNS / math.sqrt(v_BNSH.shape[-1]), MASKED)
    weights_BNS = jax.nn.softmax(scores_BNS, axis=-1).astype(v_BNSH.dtype)
    return jnp.einsum("BNS,BNSH->BNH", weights_BNS, v_BNSH, preferred_element_type=jnp.float32)


class Attention(nn.Module):
    """Multi-head attention of one decoder layer; `q`, `k`, `v`, `out` and, where G_LM is learned,
    `plga`.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        model, heads = (config.model_dim,), (config.num_heads, config.head_dim)
        head_axes, dtype = ("heads", "head_dim"), jnp.dtype(config.dtype)
        self.q = Linear(model, heads, ("embed",), head_axes, dtype)
        self.k = Linear(model, heads, ("embed",), head_axes, dtype)
        self.v = Linear(model, heads, ("embed",), head_axes, dtype)
        self.out = Linear(heads, model, head_axes, ("embed",), dtype)
        if config.g_source == "learned":
            self.plga = PowerLawGraphAttention(config)

    def __call__(
        self, x_BTD: jax.Array, inputs: AttentionInputs, g_lm_BNHJ: jax.Array | None = None
    ) -> tuple[jax.Array, LayerOutputs]:
        """Causal attention of a whole sequence to itself, or of each segment to itself.

        Args:
          x_BTD: hidden states.
          inputs: positions, mask and segments.
          g_lm_BNHJ: G_LM from outside ([1,N,H,J] serves every row, and every segment); None takes
            PLGA's, or the identity where the model has no PLGA.

        Returns:
          The output [B,T,D], and keys, values and deductive outputs of this layer.
        """
        segments = inputs.segments
        q_BTNH, k_BTNH, v_BTNH = self._project(x_BTD, inputs.positions_BT)
        if g_lm_BNHJ is None and self.config.g_source == "learned":
            deductive = self.plga(q_BTNH, inputs.valid_BT, segments)
        else:
            deductive = DeductiveOutputs(G_LM=g_lm_BNHJ)
        query_BTNJ = apply_metric(q_BTNH, deductive.G_LM, segments)
        self.sow("intermediates", "query", query_BTNJ)
        mask_BNTS = None if segments is None else segments.mask_BNTS
        kernel = self.config.attention_kernel
        out_BTNH = attend(query_BTNJ, k_BTNH, v_BTNH, kernel, mask_BNTS)
        return self.out(out_BTNH), LayerOutputs(k_BTNH, v_BTNH, deductive)

    def decode(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: LayerCache | LowRankLayerCache,
        update_g_lm: bool,
    ) -> tuple[jax.Array, LayerCache | LowRankLayerCache]:
        """Attention of the newest token (T = 1) to itself and to what the cache holds before it.

        Args:
          x_BTD: hidden states of the newest token.
          positions_BT: [B,1], its position, which is also the cache slot it is written to.
          cache: of this layer; G_LM is used as it is, unless `update_g_lm` recomputes it from the
            cached A.

        Returns:
          The output [B,1,D] and the cache with the token's key and value added.
        """
        q_BTNH, k_BTNH, v_BTNH = self._project(x_BTD, positions_BT)
        last_B = positions_BT[:, 0]
        cache = cache.append(k_BTNH, v_BTNH, last_B)
        if isinstance(cache, LowRankLayerCache):
            out_BNH = attend_low_rank(q_BTNH[:, 0], cache, last_B)
        else:
            g_lm = cache.deductive.G_LM
            if update_g_lm:
                assert cache.deductive.A is not None  # the caller has looked
                g_lm = self.plga.energy_curvature(cache.deductive.A).G_LM
            query_BNH = apply_metric_once(q_BTNH[:, 0], g_lm)
            out_BNH = attend_cached(query_BNH, cache.k_BNSH, cache.v_BNSH, last_B)
        out_BTNH = out_BNH.astype(x_BTD.dtype)[:, None]
        return self.out(out_BTNH), cache

    def _project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[Any, Any, Any]:
        theta, layout = self.config.rope_theta, self.config.rope_layout
        q_BTNH = rotate(self.q(x_BTD), positions_BT, theta, layout)
        k_BTNH = rotate(self.k(x_BTD), positions_BT, theta, layout)
        return q_BTNH, k_BTNH, self.v(x_BTD)
