"""Weights as decoding holds them: one tree a layer, and in fewer bytes than they were trained in.
Reading them is what a decode step of few rows waits for.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.annotations import show
from pldr_jax.model.attention import join_projections, split_projections
from pldr_jax.model.layers import join_gate, split_gate
from pldr_jax.partition import divided

Params: TypeAlias = Any
WeightsDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]

LARGEST = 127
"""Of int8 values, on both sides of 0."""
AT_ONCE = 64 << 20
"""Bytes of stacked parameters that are taken apart in one program, unless a single one has more."""
UNROLLED_LAYERS = 8
"""Layers of a model whose prompts are run layer by layer, at most."""

C = TypeVar("C")
R = TypeVar("R")


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
    return "kernel_scale" in params.get("head", {})


def read_in_loop(params: Params, counter: jax.Array) -> Params:
    """Parameters for the body of a loop. Rounded ones are widened there, and those that a mesh has
    split over fsdp gathered, where they are read: a compiler would do it once before the loop, and
    keep a copy of the whole model on every device.

    Args:
      counter: of the loop.
    """
    table = params["embedding"]["table"]
    if table.dtype != jnp.bfloat16 and not divided("embed", table.shape[-1]):
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


def unstack_layers(config: ModelConfig, params: Params) -> Params:
    """Parameters as `decode_step` reads them: `layers` a tuple of one tree a layer, which needs no
    slicing; kernels in the compute dtype, so that no step converts them; those that read the same
    state side by side, since a step of few rows costs what its products cost to start. Those that
    `rounded` has made smaller stay so.
    """
    leaves, dtypes, tree = _leaves_of_layers(config, params["layers"])
    layers = map(tree.unflatten, zip(*_slices(leaves, dtypes), strict=True))
    return _converted_head(config, params) | {"layers": tuple(map(_join_layer, layers))}


def take_apart(config: ModelConfig, params: Params) -> Params:
    """`unstack_layers` of parameters that nobody else needs: each stacked array is let go of as
    soon as its layers are there, so that no device holds the weights twice.

    Args:
      params: a dict that loses its layers.
    """
    leaves, dtypes, tree = _leaves_of_layers(config, params.pop("layers"))
    slices: list[list[jax.Array]] = []
    while leaves:
        count, size = 1, leaves[0].nbytes
        while count < len(leaves) and (size := size + leaves[count].nbytes) <= AT_ONCE:
            count += 1
        slices += jax.block_until_ready(_jit_slices(leaves[:count], dtypes[:count]))
        leaves, dtypes = leaves[count:], dtypes[count:]
    layers = list(map(tree.unflatten, zip(*slices, strict=True)))
    del slices
    for i, layer in enumerate(layers):
        layers[i] = jax.block_until_ready(_jit_join_layer(layer))
    return _converted_head(config, params) | {"layers": tuple(layers)}


def stack_layers(config: ModelConfig, unstacked: Params) -> Params:
    """The inverse of `unstack_layers`, but for kernels, which stay in the compute dtype."""
    layers = [split_layer(config, layer) for layer in unstacked["layers"]]
    return {**unstacked, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def split_layer(config: ModelConfig, layer: Params) -> Params:
    """One layer of `unstack_layers` with the parameters that it has in the stacked tree."""
    attention = split_projections(layer["attention"])
    return {**layer, "attention": attention, "ffn": split_gate(layer["ffn"], config.ffn_width)}


def scan_layers(
    config: ModelConfig,
    layers: Params,
    body: Callable[[Params, C, Any], tuple[C, R]],
    carry: C,
    inputs: Any,
) -> tuple[C, R]:
    """`jax.lax.scan` of `body(parameters of a layer, carry, its inputs)` over layers.

    Over a tuple of layers, the loop's body begins with a copy of one layer: stacking them would
    copy all, and a body for each layer would take minutes to compile for a deep model.

    Args:
      layers: stacked, or what `unstack_layers` makes of them.
      inputs: a tree of arrays [L, ...].
    """
    count = config.num_layers
    if not isinstance(layers, tuple):
        unroll = count if config.unroll else 1
        return jax.lax.scan(
            lambda carry, one: body(one[0], carry, one[1]), carry, (layers, inputs), unroll=unroll
        )
    if config.unroll and count <= UNROLLED_LAYERS:
        # Traced once: compiled in the place of each call.
        run = jax.jit(lambda layer, *rest: body(split_layer(config, layer), *rest))
        made = []
        for i, layer in enumerate(layers):
            carry, result = run(layer, carry, jax.tree.map(lambda x, i=i: x[i], inputs))
            made.append(result)
        return carry, jax.tree.map(lambda *results: jnp.stack(results), *made)
    copies = [functools.partial(split_layer, config, layer) for layer in layers]

    def step(carry: C, one: tuple[jax.Array, Any]) -> tuple[C, R]:
        return body(jax.lax.switch(one[0], copies), carry, one[1])

    return jax.lax.scan(step, carry, (jnp.arange(count), inputs))


def change_plga(params: Params, change: Callable[[Params, Any], Params | None]) -> Params:
    """The parameters with others of PLGA, or without; all other leaves are shared.

    Args:
      params: stacked, or what `unstack_layers` makes of them.
      change: from PLGA's parameters of some layers, and an index of an array [L, ...] that gives
        what belongs to these.
    """

    def changed(layer: Params, index: Any) -> Params:
        attention = dict(layer["attention"])
        plga = change(attention.pop("plga"), index)
        more = {} if plga is None else {"plga": plga}
        return {**layer, "attention": attention | more}

    layers = params["layers"]
    if isinstance(layers, tuple):
        return {**params, "layers": tuple(changed(layer, i) for i, layer in enumerate(layers))}
    return {**params, "layers": changed(layers, slice(None))}


def _leaves_of_layers(
    config: ModelConfig, layers: Params
) -> tuple[list[jax.Array], tuple[Any, ...], Any]:
    """Stacked arrays, the dtype that decoding has each in, and the tree that they make."""
    paths, leaves = zip(*jax.tree.leaves_with_path(layers), strict=True)
    dtypes = tuple(map(functools.partial(_dtype, config), paths, leaves))
    return list(leaves), dtypes, jax.tree.structure(layers)


def _dtype(config: ModelConfig, path: tuple[Any, ...], leaf: jax.Array) -> Any:
    computed = jnp.dtype(config.dtype)
    larger = path[-1].key == "kernel" and leaf.dtype.itemsize > computed.itemsize
    return computed if larger else leaf.dtype


def _converted_head(config: ModelConfig, params: Params) -> Params:
    head = params.get("head", {})  # a backbone has none
    converted = jax.tree.map_with_path(lambda p, x: x.astype(_dtype(config, p, x)), head)
    return {**params, "head": converted} if head else params


def _slices(leaves: list[jax.Array], dtypes: tuple[Any, ...]) -> list[list[jax.Array]]:
    """The layers of each array."""
    pairs = zip(leaves, dtypes, strict=True)
    return [[leaf[i].astype(dtype) for i in range(leaf.shape[0])] for leaf, dtype in pairs]


def _join_layer(layer: Params) -> Params:
    attention, ffn = join_projections(layer["attention"]), join_gate(layer["ffn"], "ffn")
    return {**layer, "attention": attention, "ffn": ffn}


_jit_slices = jax.jit(_slices, static_argnums=1)
_jit_join_layer = jax.jit(_join_layer)
