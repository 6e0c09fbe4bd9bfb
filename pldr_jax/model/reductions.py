"""Reductions that XLA's CPU backend is slow at, as others that it is quick at."""

import jax
import jax.numpy as jnp

POSITIONS = 64
"""On a CPU, positions of a sequence whose logits are compared at a time."""


def most_probable(logits: jax.Array) -> jax.Array:
    """The first token with the largest logit, int32 [...], of logits [..., V].

    `jnp.argmax` in two plain reductions, which a CPU does in a quarter of its time; and of [B,T,V]
    some positions at a time, since it would write another array of that size.
    """
    logits = jax.lax.stop_gradient(logits)
    if jax.default_backend() != "cpu" or logits.ndim != 3 or logits.shape[1] <= POSITIONS:
        return _first_largest(logits)
    parts = logits.shape[1] // POSITIONS

    def part(k: jax.Array) -> jax.Array:
        some = jax.lax.dynamic_slice_in_dim(logits, k * POSITIONS, POSITIONS, axis=1)
        return _first_largest(some)

    ids = jnp.moveaxis(jax.lax.map(part, jnp.arange(parts)), 0, 1)
    ids = ids.reshape(logits.shape[0], parts * POSITIONS)
    rest = logits[:, parts * POSITIONS :]
    return jnp.concatenate([ids, _first_largest(rest)], axis=1) if rest.shape[1] else ids


def _first_largest(logits: jax.Array) -> jax.Array:
    vocab = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.where(logits == best, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(ids, axis=-1)


def chosen(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The logits [...] of the tokens `ids` [...], of logits [..., V].

    The gradient of a lookup is a scatter into zeros, for which a GPU writes an array as large as
    the logits in float32; that of a sum over a mask becomes part of what follows.
    """
    if jax.default_backend() != "gpu":
        return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    is_chosen = jnp.arange(logits.shape[-1]) == ids[..., None]
    return jnp.where(is_chosen, logits, 0).sum(-1)


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y + bias, of y [rows, width] and bias [width].

    The gradient of the bias is the sum of y's over its rows. A CPU does it as a product with
    ones, twenty times faster than as a sum.
    """
    if jax.default_backend() != "cpu":
        return y + bias
    ones = jnp.ones((y.shape[0], 1), y.dtype)
    return y + ones @ bias[None]
