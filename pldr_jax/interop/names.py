"""Tensors by their names in the transformers layout, as our parameters, and back.

One table maps every tensor of that layout to a parameter here. Linear weights are [out, in] there
and [in, out] here, with heads as an axis of their own; what they keep per layer is stacked here.
Nothing is computed: every value keeps its bits.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.counts.shapes import param_shapes, param_shardings
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import fan_in

HEADS = {None: "final_layer", "sequence": "score", "token": "score", "question": "qa_outputs"}
"""Task -> name of the head. That of sequences has no bias."""


class _Entry(NamedTuple):
    """Where a tensor of theirs goes: a path of ours, and an index into its stacked axes."""

    theirs: str
    ours: tuple[str, ...]
    slot: tuple[int, ...] = ()


Bounds = tuple[tuple[int, int], ...]
"""Start and stop on every axis of an array."""


def from_tensors(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    where: str = "checkpoint",
    mesh: Mesh | None = None,
    head: bool = True,
) -> Params:
    """Parameters from tensors by their names in the transformers layout.

    Args:
      tensors: arrays, or `StoredTensor`s, of which no more is read than a device takes.
      where: named in errors.
      mesh: that the parameters come to, each in its parts; None is the default device.
      head: whether there is one; else the parameters have none.

    Raises:
      ConfigError: naming the first tensor that is missing, left over, wrongly shaped, or not exact
        in float32.
    """
    table: list[_Entry] = []
    for entry in _table(config):  # endless almost, where a config claims sizes that cannot be
        if head or entry.ours[0] != "head":
            if entry.theirs not in tensors:
                raise ConfigError(f"{where}: the tensor {entry.theirs!r} is missing")
            table.append(entry)
    shapes = param_shapes(config)
    _check_shapes(config, table, shapes, tensors, where)
    entries: dict[tuple[str, ...], list[_Entry]] = {}
    for entry in table:
        entries.setdefault(entry.ours, []).append(entry)
    places: dict[tuple[str, ...], Any] = {}
    if mesh is not None:
        leaves = jax.tree_util.tree_leaves_with_path(param_shardings(config, mesh))
        places = {tuple(key.key for key in path): place for path, place in leaves}
    params: dict[str, Any] = {}
    for path in entries:
        shape, node = shapes[path], params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        read = functools.partial(_part, config, tensors, entries[path], shape, where)
        node[path[-1]] = _placed(shape, read, places.get(path))
    return params


def _placed(
    shape: tuple[int, ...], read: Callable[[Bounds], np.ndarray], sharding: Any
) -> jax.Array:
    """An array of parts that are read for the devices that take them."""
    read = functools.cache(read)  # devices with the same part share one reading

    def at(index: Any) -> np.ndarray:
        bounds = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        return read(tuple(bounds))

    if sharding is None:
        return jnp.asarray(at((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, at)


def _part(
    config: ModelConfig,
    tensors: Mapping[str, Any],
    entries: list[_Entry],
    shape: tuple[int, ...],
    where: str,
    bounds: Bounds,
) -> np.ndarray:
    """The part of a parameter of ours between bounds, from the tensors that fill it."""
    out = np.empty([stop - start for start, stop in bounds], np.float32)
    for entry in entries:
        stacked = len(entry.slot)
        slot = tuple(i - start for i, (start, _) in zip(entry.slot, bounds, strict=False))
        ours, cut = shape[stacked:], bounds[stacked:]
        outside = [not 0 <= i < n for i, n in zip(slot, out.shape, strict=False)]
        if any(outside):
            continue
        tensor, name = tensors[entry.theirs], f"{where}: {entry.theirs!r}"
        if entry.ours[-1] == "kernel":
            axes = _input_axes(fan_in(config, entry.ours), ours)
            index = _flat(ours[axes:], cut[axes:]), _flat(ours[:axes], cut[:axes])
            exact = as_float32(tensor[index], name).T
        elif entry.ours[-1] == "bias":
            exact = as_float32(tensor[(_flat(ours, cut),)], name)
        else:
            exact = as_float32(tensor[tuple(slice(*pair) for pair in cut)], name)
        out[slot] = exact.reshape(out[slot].shape)
    return out


def _input_axes(fan_in: int, shape: tuple[int, ...]) -> int:
    """How many leading axes of a kernel are its inputs."""
    return next(n for n in range(1, len(shape)) if math.prod(shape[:n]) == fan_in)


def _flat(shape: tuple[int, ...], bounds: Bounds) -> slice:
    """The same part on one axis: of several, only the first is ever split (`head_dim` is whole)."""
    assert bounds[1:] == tuple((0, size) for size in shape[1:]), (shape, bounds)
    inner = math.prod(shape[1:])
    return slice(bounds[0][0] * inner, bounds[0][1] * inner)


def _check_shapes(
    config: ModelConfig,
    table: list[_Entry],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    tensors: Mapping[str, Any],
    where: str,
) -> None:
    """ConfigError, naming the first tensor that is misshaped or left over."""
    known = set()
    for entry in table:
        shape = tensors[entry.theirs].shape
        needed = _their_shape(config, entry, shapes[entry.ours][len(entry.slot) :])
        if shape != needed:
            raise ConfigError(
                f"{where}: {entry.theirs!r} has the shape {shape}, the config needs {needed}"
            )
        known.add(entry.theirs)
    if unknown := sorted(set(tensors) - known):
        raise ConfigError(f"{where}: unknown tensor {unknown[0]!r} ({len(unknown)} in all)")


def to_tensors(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters (or gradients, or anything of their structure) by their names in the
    transformers layout.
    """
    flat = {
        tuple(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    out = {}
    for entry in _table(config):
        array = flat[entry.ours][entry.slot]
        needed = _their_shape(config, entry, array.shape)
        if entry.ours[-1] == "kernel":
            array = array.reshape(needed[::-1]).T
        out[entry.theirs] = np.ascontiguousarray(array.reshape(needed))
    return out


def as_float32(tensor: np.ndarray, where: str) -> np.ndarray:
    """The same values in float32.

    Raises:
      ConfigError: not a float dtype, or one whose values float32 cannot hold.
    """
    if tensor.dtype == np.float32:
        return tensor
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ConfigError(f"{where} has the dtype {tensor.dtype}, the layout has floats there")
    exact = tensor.astype(np.float32)
    if exact.astype(tensor.dtype).tobytes() != tensor.tobytes():
        raise ConfigError(f"{where} has {tensor.dtype} values that float32 cannot hold")
    return exact


def _their_shape(config: ModelConfig, entry: _Entry, ours: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of theirs, whose slot here has the shape `ours`."""
    size = math.prod(ours)
    if entry.ours[-1] == "kernel":
        inputs = fan_in(config, entry.ours)
        return (size // inputs, inputs)
    return (size,) if entry.ours[-1] == "bias" else ours


def linear_names(config: ModelConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name of every linear map in the transformers layout -> its path here, and its index among
    those that are stacked.
    """
    return {
        entry.theirs.removesuffix(".weight"): (entry.ours[:-1], entry.slot)
        for entry in _table(config)
        if entry.ours[-1] == "kernel"
    }


def _table(config: ModelConfig) -> Iterator[_Entry]:
    """One entry for each tensor of theirs."""

    def linear(theirs: str, ours: tuple[str, ...], index: tuple[int, ...] = ()) -> Iterator[_Entry]:
        yield _Entry(f"{theirs}.weight", (*ours, "kernel"), index)
        yield _Entry(f"{theirs}.bias", (*ours, "bias"), index)

    def norm(theirs: str, ours: tuple[str, ...], index: tuple[int, ...] = ()) -> Iterator[_Entry]:
        yield _Entry(f"{theirs}.weight", (*ours, "scale"), index)
        yield _Entry(f"{theirs}.bias", (*ours, "bias"), index)

    yield _Entry("decoder.embedding.weight", ("embedding", "table"))
    yield from norm("decoder.layernorm1", ("embedding", "norm"))
    yield from list(linear(HEADS[config.task], ("head",)))[: 1 if config.task == "sequence" else 2]
    for i in range(config.num_layers):
        theirs = f"decoder.dec_layers.{i}"
        yield from norm(f"{theirs}.layernorm1", ("layers", "attention_norm"), (i,))
        yield from norm(f"{theirs}.layernorm2", ("layers", "ffn_norm"), (i,))
        for unit in ("w1", "w2", "w3"):
            yield from linear(f"{theirs}.ffn.glu{unit}", ("layers", "ffn", unit), (i,))
        for name, mine in {"wq": "q", "wk": "k", "wv": "v", "dense": "out"}.items():
            yield from linear(f"{theirs}.mha1.{name}", ("layers", "attention", mine), (i,))
        if config.g_source != "learned":
            continue
        plga = ("layers", "attention", "plga")
        yield from norm(f"{theirs}.mha1.layernorm1", (*plga, "density_norm"), (i,))
        for r in range(config.num_residual_layers):
            residual = f"{theirs}.mha1.reslayerAs.{r}"
            yield from norm(f"{residual}.layernormA", (*plga, "residual", "norm"), (i, r))
            for u in range(config.num_gated_units):
                for unit in ("w1", "w2", "w3"):
                    yield from linear(
                        f"{residual}.denseAs.{u}.glu{unit}",
                        (*plga, "residual", f"unit_{u}", unit),
                        (i, r),
                    )
        for name, mine in {
            "Wlst": "W",
            "blst": "b_W",
            "pwlst": "P",
            "alst": "a",
            "balst": "b_a",
        }.items():
            yield _Entry(f"{theirs}.mha1.plgatt_layer.{name}", (*plga, mine), (i,))
