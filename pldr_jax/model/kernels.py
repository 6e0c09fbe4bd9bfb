"""Fused kernels of causal attention, which never hold [T,S] scores: cuDNN's on a GPU, Pallas's on a
TPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pldr_jax.partition import partition_spec

TILE = 128
"""The TPU kernel takes sequences and heads of whole tiles; what is missing is zeros."""

LARGEST_BLOCK = 512


def fused_attention(
    q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array, kernel: str
) -> jax.Array | None:
    """Causal attention of a sequence to itself, [B,T,N,H], by the kernel that
    `Model.attention_kernel` names, or "auto" chooses; None where that is none of these.

    "auto" takes cuDNN's where it can, and never the TPU's, which has to be asked for.
    """
    if kernel == "flash":
        return flash_attention(q_BTNJ, k_BSNH, v_BSNH)
    if kernel == "cudnn" or (kernel == "auto" and cudnn_can(q_BTNJ.dtype, q_BTNJ.shape[-1])):
        return jax.nn.dot_product_attention(
            q_BTNJ, k_BSNH, v_BSNH, is_causal=True, implementation="cudnn"
        )
    return None


def flash_attention(q_BTNJ: jax.Array, k_BSNH: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """The TPU kernel, on each device's part of the batch and of the heads, [B,T,N,H]."""
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

    block = next(b for b in (LARGEST_BLOCK, 256, TILE) if (length + more_T) % b == 0)
    names = (
        "block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv",
        "block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq",
    )  # fmt: skip
    sizes = pallas.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    attend = functools.partial(
        pallas.flash_attention, causal=True, sm_scale=1 / math.sqrt(width), block_sizes=sizes
    )
    out_BNTH = attend(tiled(q_BTNJ), tiled(k_BSNH), tiled(v_BSNH))
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :length, :, :width]


def cudnn_can(dtype: Any, head_dim: int) -> bool:
    """16-bit, H a multiple of 8 up to 128, compute capability 8.0 or later."""
    if jax.default_backend() != "gpu" or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    return float(capability) >= 8.0 and head_dim % 8 == 0 and head_dim <= 128
