"""Layers without attention in them: linear maps, LayerNorm, the gated linear unit, the
embedding.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.reductions import add_bias
from pldr_jax.partition import divided, in_use

Initializer = Callable[..., Any]


def logical(init: Initializer, *names: str) -> Initializer:
    """`init`, with the logical axis of each axis of the array it makes
    (`pldr_jax/partition.py`).
    """
    return nn.with_logical_partitioning(init, names)


def glorot_uniform(fan_in: int, fan_out: int, scale: float = 1.0) -> Initializer:
    """Uniform on +-scale sqrt(6 / (fan_in + fan_out)), fans given because kernels here have more
    than two axes.
    """
    return uniform(scale * math.sqrt(6.0 / (fan_in + fan_out)))


REFERENCE_DIM, REFERENCE_FFN = 128, 341
"""D and F of the model that `Model.init = 'normalized'` refers to."""


def width_scale(config: ModelConfig, fans: tuple[int, int], reference: tuple[int, int]) -> float:
    """Factor of a linear layer's Glorot bound: with `Model.init = 'normalized'` what gives each
    output the variance that it has at the reference fans, 2 heads of 64; else 1.
    """
    if config.init != "normalized":
        return 1.0
    (fan_in, _), (reference_in, _) = fans, reference
    return math.sqrt(reference_in * sum(fans) / (fan_in * sum(reference)))


def uniform(limit: float) -> Initializer:
    """Uniform on +-limit."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


Weights: TypeAlias = tuple[jax.Array, jax.Array, jax.Array | None]
"""Kernel, bias, and the scale of each output of an int8 kernel (`weights.rounded`)."""


class Linear(nn.Module):
    """`y = x W + b`, from the last `len(in_shape)` axes of x to axes `out_shape`.

    Attributes:
      in_shape, out_shape: axes contracted and made; the kernel is [*in_shape, *out_shape].
      in_axes, out_axes: their logical names.
      dtype, precision: of the product.
      use_bias: False is `y = x W`.
      scale: of the initial kernel.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    dtype: Any = jnp.float32
    precision: str | None = None
    use_bias: bool = True
    scale: float = 1.0

    def setup(self) -> None:
        init = glorot_uniform(math.prod(self.in_shape), math.prod(self.out_shape), self.scale)
        self.kernel = self.param(
            "kernel",
            logical(init, *self.in_axes, *self.out_axes),
            (*self.in_shape, *self.out_shape),
        )
        self.kernel_scale: jax.Array | None = self.get_variable("params", "kernel_scale")
        if not self.use_bias:
            self.bias = jnp.zeros(self.out_shape)
            return
        bias_axes = tuple("norm" if axis == "embed" else axis for axis in self.out_axes)
        self.bias = self.param("bias", logical(nn.initializers.zeros, *bias_axes), self.out_shape)

    def weights(self) -> Weights:
        """Kernel, bias and scale as the product takes them."""
        kernel = in_use(self.kernel, (*self.in_axes, *self.out_axes), self.dtype)
        return kernel, self.bias.astype(self.dtype), self.kernel_scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., *in_shape] to [..., *out_shape]."""
        return linear(x.astype(self.dtype), self.weights(), len(self.in_shape), self.precision)


def linear(x: jax.Array, weights: Weights, summed: int, precision: str | None) -> jax.Array:
    """`x W + b`, summed over the last `summed` axes of x."""
    kernel, bias, scale = weights
    if scale is not None:
        y = linear(x, (kernel, jnp.zeros_like(bias), None), summed, precision)
        return (y * scale).astype(y.dtype) + bias
    rows = x.shape[: x.ndim - summed]
    if len(rows) > 2:  # heads among them, which a mesh may divide
        contract = (tuple(range(x.ndim - summed, x.ndim)), tuple(range(summed)))
        return jax.lax.dot_general(x, kernel, (contract, ((), ())), precision=precision) + bias
    # As matrices: with two axes of rows, the product of the kernel's gradient would sum over
    # both, for which XLA's CPU backend transposes a copy of its operand.
    inner = math.prod(kernel.shape[:summed])
    x, matrix = x.reshape(-1, inner), kernel.reshape(inner, -1)
    y = add_bias(jnp.matmul(x, matrix, precision=precision), bias.reshape(-1))
    return y.reshape(*rows, *kernel.shape[summed:])


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
      width: size of that axis.
      hidden: width of the gate and of the value.
      axes: logical names of the input axis and of the hidden axis.
      dtype, precision: of the products.
      scales: of the initial kernels to the hidden axis, and back.
    """

    width: int
    hidden: int
    axes: tuple[str, str]
    dtype: Any = jnp.float32
    precision: str | None = None
    scales: tuple[float, float] = (1.0, 1.0)

    def setup(self) -> None:
        into: dict[str, Any] = {"in_shape": (self.width,), "in_axes": self.axes[:1]}
        back: dict[str, Any] = {"out_shape": (self.width,), "out_axes": self.axes[:1]}
        product: dict[str, Any] = {"dtype": self.dtype, "precision": self.precision}
        hidden: dict[str, Any] = {"out_shape": (self.hidden,), "out_axes": self.axes[1:]}
        self.w1, self.w2 = (
            Linear(**into, **hidden, **product, scale=self.scales[0]) for _ in range(2)
        )
        self.w3 = Linear(
            (self.hidden,), in_axes=self.axes[1:], **back, **product, scale=self.scales[1]
        )
        # What decoding has in place of them (`join_gate`).
        joined = aligned(self.axes[1], self.hidden)
        self.w12 = Linear(
            **into, out_shape=(2, joined), out_axes=("joined", self.axes[1]), **product
        )
        self.w3_aligned = Linear((joined,), in_axes=self.axes[1:], **back, **product)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] to the same shape."""
        if on_gpu() and not divided(self.axes[1], self.hidden):
            parts = {"w1": self.w1, "w2": self.w2, "w3": self.w3}
            trees = {
                name: {k: w for k, w in zip(NAMES, part.weights(), strict=True) if w is not None}
                for name, part in parts.items()
            }
            tree = join_gate(trees, self.axes[1])
            both, last = (tuple(map(tree[name].get, NAMES)) for name in ("w12", "w3_aligned"))
            return self._joined(x, both, last)
        return self.w3(nn.silu(self.w1(x)) * self.w2(x))

    def joined(self, x: jax.Array) -> jax.Array:
        """The same of parameters that `join_gate` made."""
        return self._joined(x, self.w12.weights(), self.w3_aligned.weights())

    def _joined(self, x: jax.Array, both: Weights, last: Weights) -> jax.Array:
        y = linear(x.astype(self.dtype), both, 1, self.precision)
        return linear(nn.silu(y[..., 0, :]) * y[..., 1, :], last, 1, self.precision)


NAMES = ("kernel", "bias", "kernel_scale")
"""Parameters of `Linear`."""


def join_gate(glu: dict[str, Any], axis: str) -> dict[str, Any]:
    """Parameters of `GLU` as `GLU.joined` reads them: w1 and w2 side by side, [width,2,hidden], and
    with `aligned` zeros, which are zero after silu too, so that no number changes.

    Args:
      axis: logical name of the hidden axis.
    """
    hidden = glu["w1"]["kernel"].shape[-1]
    more = aligned(axis, hidden) - hidden

    def wider(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, more),))

    w12 = {k: jnp.stack([wider(glu[w][k]) for w in ("w1", "w2")], axis=-2) for k in glu["w1"]}
    last = {**glu["w3"], "kernel": jnp.pad(glu["w3"]["kernel"], ((0, more), (0, 0)))}
    return {"w12": w12, "w3_aligned": last}


def split_gate(glu: dict[str, Any], hidden: int) -> dict[str, Any]:
    """The inverse of `join_gate`, without its zeros."""
    both, last = glu["w12"], glu["w3_aligned"]
    parts = {
        w: {k: x[..., i, :hidden] for k, x in both.items()} for i, w in enumerate(("w1", "w2"))
    }
    return parts | {"w3": {**last, "kernel": last["kernel"][:hidden]}}


def on_gpu() -> bool:
    """Whether programs are compiled for a GPU."""
    return jax.default_backend() == "gpu"


def aligned(axis: str, width: int) -> int:
    """On a GPU, the next width whose rows are whole 16 bytes, which its tensor cores need; `width`
    itself elsewhere, and where a mesh divides the axis.
    """
    if not on_gpu() or width % 8 == 0 or divided(axis, width):
        return width
    tile = 128 if width > 512 else 64
    return -(-width // tile) * tile
