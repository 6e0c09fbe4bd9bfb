"""The model config of a native `.pth`, which holds tensors and no config: what their shapes say."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.load import config_from_dict, load_config

_LAYER = "decoder.dec_layers.0"
_RESIDUAL = f"{_LAYER}.mha1.reslayerAs"
_WITHOUT_PLGA = ("num_heads", "head_dim", "g_source")
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
    if not any(".plgatt_layer." in name for name in tensors):
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
    found = sizes(tensors, where)
    learned = "num_heads" in found
    named = {text.partition("=")[0].removeprefix("Model.") for text in overrides}
    open_fields = ["context_length"] if learned else ["context_length", *_WITHOUT_PLGA]
    for field in open_fields:
        if field not in named and not gin_files:
            raise ConfigError(
                f"{where}: no tensor says Model.{field}; add --gin.Model.{field}=... or --gin_file"
            )
    base = config_from_dict({"Model": {"unroll": False, **found}}, str(where))
    model = load_config(gin_files, overrides, base).model
    if learned != (model.g_source == "learned") or model.g_source == "random":
        raise ConfigError(
            f"{where}: has {'a' if learned else 'no'} PLGA network, which Model.g_source = "
            f"{model.g_source!r} contradicts; set {_FITTING[learned]}"
        )
    return model


def _count(pattern: str, names: Mapping[str, np.ndarray]) -> int:
    """One more than the largest number that the pattern finds."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1
