"""Layers without attention in them: linear maps, LayerNorm, the gated linear unit, the
embedding.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pldr_jax.model.reductions import add_bias
from pldr_jax.partition import in_use

Initializer = Callable[..., Any]


def logical(init: Initializer, *names: str) -> Initializer:
    """`init`, with the logical axis of each axis of the array it makes
    (`pldr_jax/partition.py`).
    """
    return nn.with_logical_partitioning(init, names)


def glorot_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform on +-sqrt(6 / (fan_in + fan_out)), fans given because kernels here have more than
    two axes.
    """
    limit = math.sqrt(6.0 / (fan_in + fan_out))

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Linear(nn.Module):
    """`y = x W + b`, from the last `len(in_shape)` axes of x to axes `out_shape`.

    Attributes:
      in_shape, out_shape: axes contracted and made; the kernel is [*in_shape, *out_shape].
      in_axes, out_axes: their logical names.
      dtype, precision: of the product.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *in_shape] to [..., *out_shape]."""
        init = glorot_uniform(math.prod(self.in_shape), math.prod(self.out_shape))
        kernel = self.param(
            "kernel",
            logical(init, *self.in_axes, *self.out_axes),
            (*self.in_shape, *self.out_shape),
        )
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in self.out_axes)
        bias = self.param("bias", logical(nn.initializers.zeros, *bias_axes), self.out_shape)
        summed = len(self.in_shape)
        kernel = in_use(kernel, (*self.in_axes, *self.out_axes), self.dtype)
        x, bias = x.astype(self.dtype), bias.astype(self.dtype)
        rows = x.shape[: x.ndim - summed]
        if len(rows) > 2:  # heads among them, which a mesh may divide
            contract = (tuple(range(x.ndim - summed, x.ndim)), tuple(range(summed)))
            y = jax.lax.dot_general(x, kernel, (contract, ((), ())), precision=self.precision)
            return y + bias
        # As matrices: with two axes of rows, the product of the kernel's gradient would sum over
        # both, for which XLA's CPU backend transposes a copy of its operand.
        inner = math.prod(self.in_shape)
        x, kernel = x.reshape(-1, inner), kernel.reshape(inner, -1)
        y = add_bias(jnp.matmul(x, kernel, precision=self.precision), bias.reshape(-1))
        return y.reshape(*rows, *self.out_shape)


def full_product_operand(x: jax.Array) -> jax.Array:
    """`x` as an operand of a product with a float32 result: itself, but float32 on a CPU.

    XLA's CPU backend lacks some products of bfloat16 with a float32 result; widening changes no
    number, since those products are exact in float32.
    """
    return x.astype(jnp.float32) if jax.default_backend() == "cpu" else x


def layer_norm(epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm over the last axis, computed and returned in float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        scale_init=logical(nn.initializers.ones, "norm"),
        bias_init=logical(nn.initializers.zeros, "norm"),
        use_fast_variance=False,
        name=name,
    )


class GLU(nn.Module):
    """Gated linear unit of width `hidden`: `w3(silu(w1 x) * w2 x)`, from the last axis of x back
    to its size.

    Attributes:
      hidden: width of the gate and of the value.
      axes: logical names of the input axis and of the hidden axis.
      dtype, precision: of the products.
    """

    hidden: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] to the same shape."""
        width = x.shape[-1]
        into: dict[str, Any] = {
            "in_shape": (width,),
            "out_shape": (self.hidden,),
            "in_axes": self.axes[:1],
            "out_axes": self.axes[1:],
        }
        product: dict[str, Any] = {"dtype": self.dtype, "precision": self.precision}
        gate = Linear(**into, **product, name="w1")(x)
        value = Linear(**into, **product, name="w2")(x)
        return Linear((self.hidden,), (width,), self.axes[1:], self.axes[:1], **product, name="w3")(
            nn.silu(gate) * value
        )
