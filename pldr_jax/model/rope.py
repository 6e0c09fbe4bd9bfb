"""Rotary position embedding, in the two layouts checkpoints use."""

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, layout: str) -> jax.Array:
    """Rotates pairs of `x` by `position * theta ** (-2 i / H)`, computed in float32, returned in
    the dtype of `x`.

    Args:
      x_BTNH: queries or keys.
      positions_BT: position of each token, from 0; [1, T] serves every row.
      theta: base of the frequencies, 10000.
      layout: pairs (x[2i], x[2i+1]) for "interleaved", (x[i], x[i + H/2]) for "half_split".
    """
    half = x_BTNH.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x = x_BTNH.astype(jnp.float32)
    if layout == "interleaved":
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    rotated = (first * cos - second * sin, first * sin + second * cos)
    if layout == "interleaved":
        out = jnp.stack(rotated, axis=-1).reshape(x.shape)
    else:
        out = jnp.concatenate(rotated, axis=-1)
    return out.astype(x_BTNH.dtype)
