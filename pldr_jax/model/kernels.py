"""Attention on arrays: q G_LM, then softmax(mask(q G_LM k^T / sqrt(H))) v in every way the model
computes it: dense, in blocks of queries, by a fused kernel, and of one token to cached ones.
"""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from pldr_jax.config import ConfigError
from pldr_jax.model.layers import full_product_operand
from pldr_jax.model.segments import Segments
from pldr_jax.partition import partition_spec

LONG, BLOCK = 2048, 512
"""Without a fused kernel, scores are computed BLOCK queries at a time from LONG tokens on."""

MASKED = -1e30
"""Score of a pair outside the mask; finite, so that a query with nothing to attend to stays finite.
"""

CUDNN_TILE = 64
"""Tokens in a tile of cuDNN's kernel."""

TILE, LARGEST_TILE = 128, 512
"""The TPU kernel takes lengths and heads of whole tiles of 128; larger tiles are faster."""


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
    """`apply_metric` for one query of each row, [B,N,J]: vectors times matrices."""
    if g_lm_BNHJ is None:
        return q_BNH
    g_lm = g_lm_BNHJ.astype(q_BNH.dtype)
    if g_lm.shape[0] == 1:
        return jnp.einsum("BNH,NHJ->BNJ", q_BNH, g_lm[0])
    return jnp.einsum("BNH,BNHJ->BNJ", q_BNH, g_lm)


def attend(
    q_BTNJ: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    kernel: str,
    ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of a sequence to itself, [B,T,N,H]; the queries hold q G_LM.

    Args:
      kernel: `Model.attention_kernel`. "auto" takes cuDNN's where it can and the TPU's never; fused
        kernels do not know segments.
      ids_BT: segment of each token; tokens attend within their segment. None: all are one.

    Raises:
      ConfigError: "cudnn", which cannot run here.
    """
    if ids_BT is None and kernel == "flash":
        return attend_flash(q_BTNJ, k_BSNH, v_BSNH)
    if ids_BT is None and kernel in ("auto", "cudnn"):
        refused = cudnn_refuses(q_BTNJ, k_BSNH, v_BSNH)
        if not refused:
            return attend_cudnn(q_BTNJ, k_BSNH, v_BSNH)
        if kernel == "cudnn":
            raise ConfigError(
                f"Model.attention_kernel = 'cudnn': the kernel cannot run: {refused}; take 'auto'"
            )
    if kernel == "blocks" or (kernel != "xla" and q_BTNJ.shape[1] >= LONG):
        return attend_in_blocks(q_BTNJ, k_BSNH, v_BSNH, ids_BT)
    return _weighted(attention_weights(q_BTNJ, k_BSNH, ids_BT), v_BSNH)


def attention_scores(q_BTNJ: jax.Array, k_BSNJ: jax.Array) -> jax.Array:
    """q k^T / sqrt(H), [B,N,T,S] in float32, before the mask."""
    q, k = full_product_operand(q_BTNJ), full_product_operand(k_BSNJ)
    scores_BNTS = jnp.einsum("BTNJ,BSNJ->BNTS", q, k, preferred_element_type=jnp.float32)
    return scores_BNTS / math.sqrt(q_BTNJ.shape[-1])


def attention_weights(
    q_BTNJ: jax.Array,
    k_BSNJ: jax.Array,
    ids_BT: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Weights [B,N,T,S], float32, of queries at positions `first`, `first` + 1, ... for the keys of
    the whole sequence, under the causal mask and within segments.

    Args:
      ids_BT: segment of each token of the sequence, [B,S].
    """
    length = q_BTNJ.shape[1]
    positions_T = first + jnp.arange(length)
    mask = jnp.arange(k_BSNJ.shape[1]) <= positions_T[:, None]
    if ids_BT is not None:
        query_ids_BT = jax.lax.dynamic_slice_in_dim(ids_BT, first, length, axis=1)
        mask = (mask & (query_ids_BT[:, :, None] == ids_BT[:, None, :]))[:, None]
    return jax.nn.softmax(jnp.where(mask, attention_scores(q_BTNJ, k_BSNJ), MASKED), axis=-1)


def attend_from(
    q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, first: jax.Array
) -> jax.Array:
    """Attention of queries at positions `first`, `first` + 1, ... to keys of their own position and
    those before it, [B,T,N,H]; what lies beyond is not looked at.
    """
    return _weighted(attention_weights(q_BTNJ, k_BSNH, first=first), v_BSNH)


def attend_in_blocks(
    q_BTNJ: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    ids_BT: jax.Array | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """The same numbers, `block` queries at a time: only [B,N,block,S] scores are ever in memory,
    since the backward pass computes those of a block again.
    """
    batch, length = q_BTNJ.shape[:2]
    blocks = -(-length // block)
    padding = ((0, 0), (0, blocks * block - length))
    q = jnp.pad(q_BTNJ, (*padding, (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, blocks, block, *q_BTNJ.shape[2:]), 1, 0)
    if ids_BT is not None:  # all of whole blocks, since a slice past the end would be moved
        k_BSNH, v_BSNH = (jnp.pad(x, (*padding, (0, 0), (0, 0))) for x in (k_BSNH, v_BSNH))
        ids_BT = jnp.pad(ids_BT, padding)

    @jax.checkpoint
    def attend_block(first: jax.Array, q_BTNJ: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights_BNTS = attention_weights(q_BTNJ, k_BSNH, ids_BT, first)
        return first + block, _weighted(weights_BNTS, v_BSNH)

    _, out = jax.lax.scan(attend_block, jnp.int32(0), q)
    return jnp.moveaxis(out, 0, 1).reshape(batch, blocks * block, *v_BSNH.shape[2:])[:, :length]


def _weighted(weights_BNTS: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


def attend_flash(q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """Pallas's kernel for TPUs, on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _flash(q_BTNJ, k_BSNH, v_BSNH)
    names = ("batch", "length", "heads", "head_dim")
    spec = partition_spec(q_BTNJ.shape, names, dict(mesh.shape))
    return jax.shard_map(_flash, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(
        q_BTNJ, k_BSNH, v_BSNH
    )


def _flash(q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    # Only a TPU can run it, and importing Pallas takes a second.
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    length, width = q_BTNJ.shape[1], q_BTNJ.shape[3]
    more_T, more_H = -length % TILE, -width % TILE

    def tiled(x_BTNH: jax.Array) -> jax.Array:
        """[B,N,T,H] in whole tiles. Added keys come after every real query: the mask hides them."""
        padded = jnp.pad(x_BTNH, ((0, 0), (0, more_T), (0, 0), (0, more_H)))
        return jnp.swapaxes(padded, 1, 2)

    block = next(b for b in (LARGEST_TILE, 256, TILE) if (length + more_T) % b == 0)
    names = (
        "block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv",
        "block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq",
    )  # fmt: skip
    sizes = pallas.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    fused = functools.partial(
        pallas.flash_attention, causal=True, sm_scale=1 / math.sqrt(width), block_sizes=sizes
    )
    out_BNTH = fused(tiled(q_BTNJ), tiled(k_BSNH), tiled(v_BSNH))
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :length, :, :width]


def attend_cudnn(q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """cuDNN's kernel, on whole tiles of CUDNN_TILE tokens: it has no gradient of odd lengths.

    Added tokens come last, where the causal mask keeps the real ones from them: no number changes.
    """
    length = q_BTNJ.shape[1]
    padding = ((0, 0), (0, -length % CUDNN_TILE), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q_BTNJ, k_BSNH, v_BSNH))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out[:, :length]


def cudnn_refuses(q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> str:
    """Why cuDNN's kernel, or its gradient, would not run on these arrays here; "" if it would."""
    if refused := cudnn_lacks(q_BTNJ.dtype, q_BTNJ.shape[-1]):
        return refused

    def total(*arrays: jax.Array) -> jax.Array:
        return attend_cudnn(*arrays).astype(jnp.float32).sum()

    # JAX checks more, such as the version of cuDNN, but only when the kernel is called.
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BTNJ, k_BSNH, v_BSNH)]
    try:
        jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), *shapes)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    return ""


def cudnn_lacks(dtype: Any, head_dim: int) -> str:
    """What is missing for cuDNN's kernel with such heads here; "" if nothing is."""
    largest = 256 if cuda_capability() >= (9, 0) else 128
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return "needs 16 bits"
    if cuda_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    if head_dim % 8 or head_dim > largest:
        return f"needs a head_dim that is a multiple of 8 up to {largest}"
    return ""


def cuda_capability(device: Any = None) -> tuple[int, int]:
    """Compute capability of a device (the first one); (0, 0) of any that is not CUDA's, since other
    makers put other things there, such as "gfx90a".
    """
    device = jax.devices()[0] if device is None else device
    stated = re.match(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    if device.platform not in ("gpu", "cuda") or stated is None:
        return 0, 0
    return int(stated[1]), int(stated[2])


def attend_cached(scores_BNS: jax.Array, v_BNSH: jax.Array, last_B: jax.Array) -> jax.Array:
    """Attention of one query a row to the cached tokens up to position `last_B`, [B,N,H] float32.

    Args:
      scores_BNS: q G_LM k^T, float32.
    """
    visible_BNS = jnp.arange(v_BNSH.shape[2]) <= last_B[:, None, None]
    scores_BNS = jnp.where(visible_BNS, scores_BNS / math.sqrt(v_BNSH.shape[-1]), MASKED)
    weights_BNS = jax.nn.softmax(scores_BNS, axis=-1).astype(v_BNSH.dtype)
    return jnp.einsum("BNS,BNSH->BNH", weights_BNS, v_BNSH, preferred_element_type=jnp.float32)
