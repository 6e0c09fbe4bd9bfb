"""The model config of a native `.pth`, which holds tensors and no config: what their shapes say."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.load import config_from_dict, load_config
from pldr_jax.interop.transformers import G_VALUES

_LAYER = "decoder.dec_layers.0"
_RESIDUAL = f"{_LAYER}.mha1.reslayerAs"
_PLGA = ".plgatt_layer."
_FITTING = {True: "'learned'", False: "'identity', or 'external' and Model.g_file"}


def sizes(tensors: Mapping[str, np.ndarray], where: object) -> dict[str, Any]:
    """Fields of `ModelConfig` that the shapes of the tensors decide.

    Heads cannot be told where there is no PLGA network. Context length, RoPE layout and the rest
    are in no tensor.

    Raises:
      ConfigError: a tensor that they are read from is missing.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ConfigError(f"{where}: the tensor {name!r} is missing")
        if tensors[name].ndim != axes:
            raise ConfigError(f"{where}: {name!r} has the shape {tensors[name].shape}")
        return tensors[name].shape

    found: dict[str, Any] = {
        "vocab_size": shape("decoder.embedding.weight", 2)[0],
        "num_layers": _count(r"decoder\.dec_layers\.(\d+)\.", tensors),
        "ffn_dim": shape(f"{_LAYER}.ffn.gluw1.weight", 2)[0],
    }
    if not any(_PLGA in name for name in tensors):
        if G_VALUES in tensors:
            _, _, _, found["num_heads"], found["head_dim"], _ = shape(G_VALUES, 6)
        return found
    found["num_heads"], found["head_dim"], _ = shape(f"{_LAYER}.mha1.plgatt_layer.Wlst", 3)
    found["num_residual_layers"] = _count(re.escape(_RESIDUAL) + r"\.(\d+)\.", tensors)
    if found["num_residual_layers"]:
        found["num_gated_units"] = _count(re.escape(_RESIDUAL) + r"\.0\.denseAs\.(\d+)\.", tensors)
        found["metric_dim"] = shape(f"{_RESIDUAL}.0.denseAs.0.gluw1.weight", 2)[0]
    return found


def model_from_tensors(
    tensors: Mapping[str, np.ndarray],
    gin_files: Sequence[str | Path],
    overrides: Sequence[str],
    where: object,
) -> ModelConfig:
    """What the shapes say, then the user's files and settings.

    Raises:
      ConfigError: no file and no setting says what no shape does; or they contradict the tensors.
    """
    known = sizes(tensors, where)
    learned = any(_PLGA in name for name in tensors)
    if missing := _open_fields(known, learned, gin_files, overrides):
        raise ConfigError(
            f"{where}: no tensor says {', '.join(f'Model.{name}' for name in missing)}; add "
            f"{' '.join(f'--gin.Model.{name}=...' for name in missing)} or --gin_file"
        )
    base = config_from_dict({"Model": {"unroll": False, **known}}, str(where))
    model = load_config(gin_files, overrides, base).model
    if learned != (model.g_source == "learned") or model.g_source == "random":
        raise ConfigError(
            f"{where}: has {'a' if learned else 'no'} PLGA network, which Model.g_source = "
            f"{model.g_source!r} contradicts; set {_FITTING[learned]}"
        )
    return model


def _open_fields(
    known: Mapping[str, Any],
    learned: bool,
    gin_files: Sequence[str | Path],
    overrides: Sequence[str],
) -> list[str]:
    """Fields that neither the tensors nor files and settings say: those that keep a default."""
    fields = {"context_length": (2, 3)}
    if not learned:
        fields |= {"num_heads": (1, 2), "head_dim": (2, 4)}
    fields = {name: values for name, values in fields.items() if name not in known}
    models = []
    for i in (0, 1):
        defaults = {name: values[i] for name, values in fields.items()}
        base = config_from_dict({"Model": {**known, "g_source": "external", **defaults}})
        models.append(load_config(gin_files, overrides, base).model)
    missing = [name for name in fields if getattr(models[0], name) != getattr(models[1], name)]
    if learned or models[0].g_source != "external":
        return missing
    try:  # "external" is what was said, if another default changes nothing
        base = config_from_dict({"Model": {"g_source": "learned"}})
        said = load_config(gin_files, overrides, base).model.g_source == "external"
    except ConfigError:
        said = False
    return missing if said else [*missing, "g_source"]


def _count(pattern: str, names: Mapping[str, np.ndarray]) -> int:
    """One more than the largest number that the pattern finds."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
