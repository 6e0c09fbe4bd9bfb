"""Tensors by their names in the transformers layout, as our parameters, and back.

One table maps every tensor of that layout to a parameter here. Linear weights are [out, in] there
and [in, out] here, with heads as an axis of their own; what they keep per layer is stacked here.
Nothing is computed: every value keeps its bits.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import fan_in
from pldr_jax.model.shapes import param_shapes

HEADS = {None: "final_layer", "sequence": "score", "token": "score", "question": "qa_outputs"}
"""Task -> name of the head. That of sequences has no bias."""


class _Entry(NamedTuple):
    """Where a tensor of theirs goes: a path of ours, and an index into its stacked axes."""

    theirs: str
    ours: tuple[str, ...]
    slot: tuple[int, ...] = ()


def from_tensors(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], where: str = "checkpoint"
) -> Params:
    """Parameters from tensors by their names in the transformers layout.

    Raises:
      ConfigError: naming the first tensor that is missing, left over, wrongly shaped, or not exact
        in float32.
    """
    for entry in _table(config):  # first: a config may claim sizes of which no model can be made
        if entry.theirs not in tensors:
            raise ConfigError(f"{where}: the tensor {entry.theirs!r} is missing")
    shapes = param_shapes(config)
    _check_shapes(config, shapes, tensors, where)
    arrays = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    for entry in _table(config):
        exact = as_float32(tensors[entry.theirs], f"{where}: {entry.theirs!r}")
        turned = exact.T if entry.ours[-1] == "kernel" else exact
        place = arrays[entry.ours][entry.slot]
        arrays[entry.ours][entry.slot] = turned.reshape(place.shape)
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(array)
    return params


def _check_shapes(
    config: ModelConfig,
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
    where: str,
) -> None:
    """ConfigError, naming the first tensor that is misshaped or left over."""
    known = set()
    for entry in _table(config):
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
