"""The transformers layout of PLDR-LLM checkpoints: `config.json` and `model.safetensors`.

One table maps every tensor of that layout to a parameter here. Linear weights are [out, in] there
and [in, out] here, with heads as an axis of their own; what they keep per layer is stacked here.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.decoder import Params

Array = np.ndarray


class _Entry(NamedTuple):
    """Where a tensor of theirs goes: a path of ours, an index into its stacked axes, and how it is
    turned.
    """

    theirs: str
    ours: tuple[str, ...]
    slot: tuple[int, ...]
    turn: Callable[[Array], Array]


def read_config(folder: Path) -> ModelConfig:
    """The model of a folder's `config.json`.

    Raises:
      ConfigError: not a PLDR-LLM, or one with parts this model does not have.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if raw.get("model_type") != "pldrllm":
        raise ConfigError(f"{path}: model_type = {raw.get('model_type')!r}: must be 'pldrllm'")
    for name, needed in {
        "attention_bias": True,
        "glu_bias": True,
        "final_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }.items():
        if raw.get(name, needed) != needed:
            raise ConfigError(f"{path}: {name} = {raw[name]!r}: only {needed!r} is supported")
    try:
        config = ModelConfig(
            vocab_size=raw["vocab_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            head_dim=raw["head_dim"],
            ffn_dim=raw["intermediate_size"],
            metric_dim=raw["A_dff"],
            num_residual_layers=raw["num_reslayerA"],
            num_gated_units=raw["num_denseA"],
            context_length=raw["max_position_embeddings"],
            rope_theta=float(raw.get("rope_theta", 10000.0)),
            rope_layout="interleaved" if raw.get("reference_rope", True) else "half_split",
            layer_norm_eps=raw.get("layer_norm_eps", 1e-6),
            unroll=False,
        )
    except KeyError as error:
        raise ConfigError(f"{path}: the field {error} is missing") from error
    custom = raw.get("custom_G_type")
    if custom == "identity":
        return dataclasses.replace(config, g_source="identity")
    if custom is not None:
        return dataclasses.replace(
            config, g_source="external", g_file=str(folder / "model.safetensors")
        )
    return config


def read_checkpoint(folder: str | Path) -> tuple[ModelConfig, Params, jax.Array | None]:
    """Model config, parameters and predefined G_LM [L,1,N,H,J] (None where learned or identity) of
    a folder.

    Raises:
      ConfigError: a file or a tensor that is missing, unknown, or of another shape than the config
        says.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = read_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read, it may be truncated ({error})") from error
    g_values = tensors.pop("decoder.past_G_values", None)
    tensors.pop("decoder.past_G_values_status", None)
    params = from_tensors(config, tensors, str(path))
    g_lm = None
    if config.g_source == "external":
        if g_values is None:
            raise ConfigError(f"{path}: the tensor 'decoder.past_G_values' is missing")
        g_lm = jnp.asarray(g_values[:, 2], jnp.float32)
    return config, params, g_lm


def from_tensors(
    config: ModelConfig, tensors: dict[str, Array], where: str = "checkpoint"
) -> Params:
    """Parameters from tensors by their names in the transformers layout.

    Raises:
      ConfigError: naming the first tensor that is missing, left over or wrongly shaped.
    """
    from pldr_jax.model.shapes import param_shapes

    shapes = param_shapes(config)
    filled = {path: np.full(shape, np.nan, np.float32) for path, shape in shapes.items()}
    left = dict(tensors)
    for entry in _table(config):
        if entry.theirs not in left:
            raise ConfigError(f"{where}: the tensor {entry.theirs!r} is missing")
        tensor = entry.turn(np.asarray(left.pop(entry.theirs), np.float32))
        slot = filled[entry.ours][entry.slot]
        if tensor.size != slot.size:
            raise ConfigError(
                f"{where}: {entry.theirs!r} has {tensor.size} entries, the config needs {slot.size}"
            )
        filled[entry.ours][entry.slot] = tensor.reshape(slot.shape)
    if left:
        raise ConfigError(f"{where}: unknown tensor {sorted(left)[0]!r} ({len(left)} in all)")
    params: dict[str, Any] = {}
    for path, array in filled.items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(array)
    return params


def to_tensors(config: ModelConfig, params: Params) -> dict[str, Array]:
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
        if entry.ours[-1] == "kernel":
            fan_out = array.size // _fan_in(config, entry.ours)
            array = array.reshape(-1, fan_out).T
        elif entry.ours[-1] == "bias":
            array = array.reshape(-1)
        out[entry.theirs] = np.ascontiguousarray(array)
    return out


def _fan_in(config: ModelConfig, path: tuple[str, ...]) -> int:
    if "plga" in path:
        return config.metric_width if path[-2] == "w3" else config.head_dim
    return config.ffn_width if path[-2] == "w3" else config.model_dim


def _table(config: ModelConfig) -> Iterator[_Entry]:
    """One entry for each tensor of theirs."""

    def linear(theirs: str, ours: tuple[str, ...], index: tuple[int, ...] = ()) -> Iterator[_Entry]:
        yield _Entry(f"{theirs}.weight", (*ours, "kernel"), index, np.transpose)
        yield _Entry(f"{theirs}.bias", (*ours, "bias"), index, np.asarray)

    def norm(theirs: str, ours: tuple[str, ...], index: tuple[int, ...] = ()) -> Iterator[_Entry]:
        yield _Entry(f"{theirs}.weight", (*ours, "scale"), index, np.asarray)
        yield _Entry(f"{theirs}.bias", (*ours, "bias"), index, np.asarray)

    yield _Entry("decoder.embedding.weight", ("embedding", "table"), (), np.asarray)
    yield from norm("decoder.layernorm1", ("embedding", "norm"))
    yield from linear("final_layer", ("head",))
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
            yield _Entry(f"{theirs}.mha1.plgatt_layer.{name}", (*plga, mine), (i,), np.asarray)
