"""Checkpoints in the transformers layout: a folder with `config.json`, weights and a tokenizer.

The weights are `model.safetensors`, or several files with an index. A model whose G_LM is not
learned has it as `decoder.past_G_values` [L,3,1,N,H,J]: A, A_LM (both unused) and G_LM, and beside
it `decoder.past_G_values_status` [L]. A backbone without a head has the same names without
`decoder.`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.interop.config_json import BACKBONE, label_names, model_from_json
from pldr_jax.interop.folder import read_json
from pldr_jax.interop.names import HEADS, as_float32, from_tensors, to_tensors
from pldr_jax.interop.tensors import TensorFiles, read_folder
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import g_lm_shape
from pldr_jax.partition import on_every_device

CONFIG = "config.json"
G_VALUES, G_STATUS = "decoder.past_G_values", "decoder.past_G_values_status"
_DECODER = "decoder."
_PLANES = 3
_G_LM = 2


@dataclasses.dataclass(frozen=True)
class TransformersCheckpoint:
    """A checkpoint of others, as ours.

    Attributes:
      config: its model.
      params: its parameters, float32; without `head` of a backbone.
      g_lm: predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
      source: its tensors as they were.
      labels: names of a task's labels; () where it has none.
    """

    config: ModelConfig
    params: Params
    g_lm: jax.Array | None
    source: TensorFiles
    labels: tuple[str, ...] = ()


def open_transformers(
    folder: str | Path, mesh: Mesh | None = None, keep_source: bool = True
) -> TransformersCheckpoint:
    """Reads a folder in the transformers layout.

    Args:
      mesh: that the parameters come to, each in its parts; None is the default device.
      keep_source: False reads no tensor whole where a mesh takes parts of it; `source` then holds
        no arrays.

    Raises:
      ConfigError: a file, a config field or a tensor that is missing, unknown, or of another shape
        than the config says.
    """
    folder = Path(folder)
    raw = read_json(folder / CONFIG)
    config = model_from_json(raw, folder / CONFIG)
    source = read_folder(folder, in_parts=not keep_source)
    head = source.tensors.get(f"{HEADS[config.task]}.weight")
    labels: tuple[str, ...] = ()
    if config.task in ("sequence", "token"):
        stated = label_names(raw, folder)
        if stated is None and head is not None and len(head.shape) == 2 and head.shape[0]:
            config = dataclasses.replace(config, num_labels=head.shape[0])
        labels = stated or tuple(f"LABEL_{i}" for i in range(config.num_labels))
    has_head = raw.get("architectures") != [BACKBONE]
    if not has_head:
        named = {f"{_DECODER}{n.removeprefix(_DECODER)}": x for n, x in source.tensors.items()}
        source = dataclasses.replace(source, tensors=named)
    where = str(folder / next(iter(source.files)))
    opened = from_source(config, source, where, mesh, has_head)
    return dataclasses.replace(opened, labels=labels)


def from_source(
    config: ModelConfig,
    source: TensorFiles,
    where: str,
    mesh: Mesh | None = None,
    head: bool = True,
) -> TransformersCheckpoint:
    """Gives every tensor its place; `mesh` as in `open_transformers`, `head` as in `from_tensors`.

    Raises:
      ConfigError: as `open_transformers`.
    """
    tensors = dict(source.tensors)
    g_lm = None
    if config.g_source != "learned":
        g_lm = _take_g_lm(config, tensors, where)
        g_lm = None if g_lm is None else on_every_device(g_lm, mesh)
    params = from_tensors(config, tensors, where, mesh, head)
    return TransformersCheckpoint(config, params, g_lm, source)


def _take_g_lm(config: ModelConfig, tensors: dict[str, Any], where: str) -> jax.Array | None:
    layers, _, *matrix = g_lm_shape(config)
    for name, shape in {G_VALUES: (layers, _PLANES, 1, *matrix), G_STATUS: (layers,)}.items():
        if name not in tensors:
            raise ConfigError(f"{where}: the tensor {name!r} is missing")
        if tensors[name].shape != shape:
            raise ConfigError(
                f"{where}: {name!r} has the shape {tensors[name].shape}, the config needs {shape}"
            )
    everything = (slice(None),) * (3 + len(matrix))
    g_lm = as_float32(tensors.pop(G_VALUES)[everything], f"{where}: {G_VALUES!r}")[:, _G_LM]
    tensors.pop(G_STATUS)
    if config.g_source != "identity":
        return jnp.asarray(g_lm)
    if not np.array_equal(g_lm, np.broadcast_to(np.eye(config.head_dim), g_lm.shape)):
        raise ConfigError(
            f"{where}: {G_VALUES!r} is not the identity that custom_G_type = 'identity' says"
        )
    return None


def to_source(config: ModelConfig, params: Params, g_lm: jax.Array | None) -> dict[str, np.ndarray]:
    """Every tensor of the layout, float32, for a model of ours."""
    tensors = to_tensors(config, params)
    return tensors if config.g_source == "learned" else {**tensors, **g_tensors(config, g_lm)}


def g_tensors(config: ModelConfig, g_lm: jax.Array | None) -> dict[str, np.ndarray]:
    """The two tensors that hold a predefined G_LM [L,1,N,H,J]; None is the identity."""
    layers, _, *matrix = g_lm_shape(config)
    values = np.zeros((layers, _PLANES, 1, *matrix), np.float32)
    values[:, _G_LM] = np.eye(config.head_dim) if g_lm is None else np.asarray(g_lm)
    return {G_VALUES: values, G_STATUS: np.ones((layers,), bool)}
