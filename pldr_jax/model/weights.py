"""Kernels of linear layers as decoding multiplies with them: laid out for the device, and rounded
to fewer bytes where `Generation.weights` asks for it.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.partition import Names, constrain

LARGEST = 127
"""Of int8 values, on both sides of 0."""


class DecodeKernel(flax.struct.PyTreeNode):
    """A kernel in place of the array of a `Linear`.

    A decode step multiplies with few rows, so that its time is that of reading the weights. XLA's
    CPU backend reads them up to twice as fast as W x^T with W [out,in] (`benchmarks/decode.py`
    times both); others get x W with W [in,out].

    Attributes:
      values: [*in, *out], or [*out, *in] where `out_first`; in a float dtype, or int8.
      scale: of each output channel, [*out] float32, that int8 values are multiplied by.
    """

    values: jax.Array
    scale: jax.Array | None
    out_first: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel: jax.Array, inputs: int, dtype: Any, names: Names = ()) -> "DecodeKernel":
        """A kernel [*in, *out], whose first `inputs` axes are summed over, in another dtype.

        Args:
          dtype: int8 values have a scale for each output channel.
          names: logical axes of the kernel, on a mesh.
        """
        values, scale = rounded(kernel, inputs, dtype)
        out_first = jax.default_backend() == "cpu"
        if out_first:
            order = (*range(inputs, kernel.ndim), *range(inputs))
            values, names = values.transpose(order), tuple(names[i] for i in order if names)
        return cls(constrain(values, *names) if names else values, scale, out_first)

    def product(self, x: jax.Array, inner: int) -> jax.Array:
        """x [rows,inner] times the kernel, [rows,width] in the dtype of x."""
        values = self.values.astype(x.dtype)
        if self.out_first:
            y = (values.reshape(-1, inner) @ x.T).T
        else:
            y = x @ values.reshape(inner, -1)
        return y if self.scale is None else y * self.scale.reshape(-1).astype(x.dtype)


def rounded(kernel: jax.Array, inputs: int, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The kernel in another dtype, and, of int8 values, their scale [*out]: the largest magnitude
    of an output channel over 127.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return kernel.astype(dtype), None
    largest = jnp.abs(kernel).max(tuple(range(inputs)))
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), scale


def summed_axes(path: tuple[Any, ...]) -> int:
    """Axes of a kernel that its product sums over: heads and head dimension in attention's `out`,
    else one.
    """
    return 2 if path[-2].key == "out" else 1


def is_linear(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a kernel that is rounded: of any linear layer outside PLGA."""
    return path[-1].key == "kernel" and not any(key.key == "plga" for key in path)


def rounded_params(params: Any, dtype: Any) -> Any:
    """Stacked parameters with kernels rounded to `dtype` and back: what decoding with such weights
    computes with, for whole forward passes.
    """

    def back(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not is_linear(path):
            return leaf

        def one(kernel: jax.Array) -> jax.Array:
            values, scale = rounded(kernel, summed_axes(path), dtype)
            return values.astype(leaf.dtype) * (1 if scale is None else scale)

        return jax.vmap(one)(leaf) if path[0].key == "layers" else one(leaf)

    return jax.tree.map_with_path(back, params)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
