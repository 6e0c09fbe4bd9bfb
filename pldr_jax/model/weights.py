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
      width: of the rows it multiplies, the product of the axes `in`.
    """

    values: jax.Array
    scale: jax.Array | None
    width: int = flax.struct.field(pytree_node=False)
    out_first: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, kernel: jax.Array, inputs: int, dtype: Any, names: Names = ()) -> "DecodeKernel":
        """A kernel [*in, *out], whose first `inputs` axes are summed over, in another dtype.

        Args:
          dtype: int8 values have a scale for each output channel.
          names: logical axes of the kernel.
        """
        values, scale = rounded(kernel, inputs, dtype)
        width = math.prod(kernel.shape[:inputs])
        out_first = jax.default_backend() == "cpu"
        if out_first:
            order = (*range(inputs, kernel.ndim), *range(inputs))
            values, names = values.transpose(order), tuple(names[i] for i in order if names)
        return cls(constrain(values, *names) if names else values, scale, width, out_first)

    def product(self, x: jax.Array) -> jax.Array:
        """x [rows,width] times the kernel, [rows,out] in the dtype of x."""
        values = self.values.astype(x.dtype)
        if self.out_first:
            y = (values.reshape(-1, self.width) @ x.T).T
        else:
            y = x @ values.reshape(self.width, -1)
        return y if self.scale is None else y * self.scale.reshape(-1).astype(x.dtype)


KERNELS: dict[str, tuple[int, Names]] = {
    "qkv": (1, ("embed", "joined", "heads", "head_dim")),
    "out": (2, ("heads", "head_dim", "embed")),
    "w12": (1, ("embed", "joined", "ffn")),
    "w3_aligned": (1, ("ffn", "embed")),
    "head": (1, ("embed", "vocab")),
}
"""Linear layers of a decode step: axes summed over, and logical axes."""


def for_decoding(tree: Any, dtype: Any) -> Any:
    """Parameters of a layer, or of the head, with a `DecodeKernel` for each kernel but PLGA's."""

    def convert(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        if path[-1].key != "kernel" or path[-2].key not in KERNELS:
            return leaf
        inputs, names = KERNELS[path[-2].key]
        return DecodeKernel.of(leaf, inputs, dtype, names)

    return jax.tree.map_with_path(convert, tree)


def rounded(kernel: jax.Array, inputs: int, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """The kernel in another dtype, and, of int8 values, their scale [*out]: the largest magnitude
    of an output channel over 127.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return kernel.astype(dtype), None
    largest = jnp.abs(kernel).max(tuple(range(inputs)))
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    return jnp.round(kernel / scale).astype(jnp.int8), scale


def rounded_params(params: Any, dtype: Any) -> Any:
    """Stacked parameters with kernels rounded to `dtype` and back: what decoding with such weights
    computes with, for whole forward passes.
    """

    def back(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] != "kernel" or "plga" in names:
            return leaf

        def one(kernel: jax.Array) -> jax.Array:
            values, scale = rounded(kernel, 2 if names[-2] == "out" else 1, dtype)
            return values.astype(leaf.dtype) * (1 if scale is None else scale)

        return jax.vmap(one)(leaf) if names[0] == "layers" else one(leaf)

    return jax.tree.map_with_path(back, params)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
