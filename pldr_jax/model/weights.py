"""Weights in fewer bytes than they were trained in, for decoding and scoring: reading them is what
a decode step of few rows waits for.
"""

import typing
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from pldr_jax.config import ConfigError
from pldr_jax.config.annotations import show

Params: TypeAlias = Any
WeightsDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]

LARGEST = 127
"""Of int8 values, on both sides of 0."""


def rounded(params: Params, dtype: WeightsDtype) -> Params:
    """Stacked parameters with the kernels of attention, feed-forward and head in another dtype, and
    the embedding table in bfloat16. Biases, LayerNorms and everything of PLGA stay as they are.

    An int8 kernel has a `kernel_scale` beside it: of each output channel, the largest magnitude
    over 127. The layer multiplies its product by it.

    Args:
      dtype: "float32" changes nothing.
    """
    if dtype == "float32":
        return params

    def of_tree(tree: Params, stacked: int, name: str) -> Params:
        if not isinstance(tree, dict) or name == "plga":
            return tree
        made = {key: of_tree(value, stacked, key) for key, value in tree.items()}
        if "kernel" in made and dtype == "int8":
            summed = stacked + (2 if name == "out" else 1)  # heads and head dimension, or one axis
            made["kernel"], made["kernel_scale"] = _int8(made["kernel"], (stacked, summed))
        elif "kernel" in made:
            made["kernel"] = made["kernel"].astype(dtype)
        return made

    made = {name: of_tree(tree, int(name == "layers"), name) for name, tree in params.items()}
    table = params["embedding"]["table"].astype(jnp.bfloat16)
    return made | {"embedding": {**params["embedding"], "table": table}}


def check_weights(dtype: str) -> None:
    """Raises a one-line `ConfigError` for a dtype that weights cannot have."""
    if dtype not in (names := typing.get_args(WeightsDtype)):
        raise ConfigError(
            f"weights = {show(dtype)}: must be {', '.join(names[:-1])} or {names[-1]}"
        )


def has_scales(params: Params) -> bool:
    """Whether they have scales, which a model's own do not have."""
    return "kernel_scale" in params["head"]


def read_in_loop(params: Params, counter: jax.Array) -> Params:
    """Parameters for the body of a loop. Rounded ones are widened there, where they are read: a
    compiler would do it once before the loop, and keep a copy as large as what was rounded.

    Args:
      counter: of the loop.
    """
    if params["embedding"]["table"].dtype != jnp.bfloat16:
        return params
    return jax.lax.optimization_barrier((params, counter))[0]


@jax.jit
def _scaled(kernel: jax.Array, largest: jax.Array) -> jax.Array:
    return jnp.round(kernel / largest * LARGEST).astype(jnp.int8)


def _int8(kernel: jax.Array, axes: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Values, and the scale without the axes that the product sums over."""
    summed = tuple(range(*axes))
    largest = jnp.abs(kernel).max(summed, keepdims=True).astype(jnp.float32)
    largest = jnp.where(largest > 0, largest, 1.0)
    return _scaled(kernel, largest), (largest / LARGEST).squeeze(summed)
