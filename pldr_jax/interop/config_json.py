"""The `config.json` of the transformers layout, as our model config, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.config.load import config_from_dict

CUSTOM_G_TYPES = ("identity", "random", "external")
"""Values of `custom_G_type` beside null; each puts `decoder.past_G_values` beside the weights."""

_NAMES = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "A_dff": "metric_dim",
    "num_reslayerA": "num_residual_layers",
    "num_denseA": "num_gated_units",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope_theta",
    "layer_norm_eps": "layer_norm_eps",
}
"""Field of theirs -> field of ours."""

_OPTIONAL = ("intermediate_size", "rope_theta", "layer_norm_eps")

_FIXED = {
    "attention_bias": True,
    "glu_bias": True,
    "final_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_dropout": 0.0,
}
"""What this model has no other form of."""


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; ConfigError if it does not."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: cannot be read as JSON (it is no object)")
    return raw


def model_from_json(raw: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """The model of a `config.json`. A G_LM that is not learned is in the checkpoint: "random" and
    "external" both become `g_source = 'external'` without a file.

    Raises:
      ConfigError: not a PLDR-LLM, or one with parts this model does not have.
    """
    if raw.get("model_type") != "pldrllm":
        raise ConfigError(f"{where}: model_type = {raw.get('model_type')!r}: must be 'pldrllm'")
    for name, needed in _FIXED.items():
        if raw.get(name, needed) != needed:
            raise ConfigError(f"{where}: {name} = {raw[name]!r}: only {needed!r} is supported")
    fields: dict[str, Any] = {"unroll": False}
    for theirs, ours in _NAMES.items():
        if theirs in raw:
            fields[ours] = raw[theirs]
        elif theirs not in _OPTIONAL:
            raise ConfigError(f"{where}: the field {theirs!r} is missing")
    fields["rope_layout"] = "interleaved" if raw.get("reference_rope", True) else "half_split"
    custom = raw.get("custom_G_type")
    if custom is not None and custom not in CUSTOM_G_TYPES:
        raise ConfigError(
            f"{where}: custom_G_type = {custom!r}: must be null, 'identity', 'random' or 'external'"
        )
    if custom is not None:
        fields["g_source"] = "identity" if custom == "identity" else "external"
    config = config_from_dict({"Model": fields}, str(where)).model
    width = raw.get("hidden_size")
    if width not in (None, config.model_dim):
        raise ConfigError(
            f"{where}: hidden_size = {width}: must be num_attention_heads * head_dim = "
            f"{config.model_dim}"
        )
    return config


class PieceIds(NamedTuple):
    """Ids of the start, end and padding pieces; None where the tokenizer has no such piece."""

    bos: int | None
    eos: int | None
    pad: int | None

    def fields(self) -> dict[str, int | None]:
        """As both config files name them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def config_json(config: ModelConfig, ids: PieceIds) -> dict[str, Any]:
    """The `config.json` of a model."""
    values = {
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items()},
        "intermediate_size": config.ffn_width,
        "A_dff": config.metric_width,
        "hidden_size": config.model_dim,
        "reference_rope": config.rope_layout == "interleaved",
        "custom_G_type": None if config.g_source == "learned" else config.g_source,
        "cache_first_G": False,
        **_FIXED,
        "model_type": "pldrllm",
        "architectures": ["PldrllmForCausalLM"],
        "torch_dtype": "float32",
        "use_cache": True,
        **ids.fields(),
    }
    return dict(sorted(values.items()))


def generation_config_json(
    context_length: int,
    ids: PieceIds,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The `generation_config.json` of a model with the sampling `settings` of a run."""
    values: dict[str, Any] = {
        **ids.fields(),
        "max_length": context_length,
        "use_cache": True,
        "repetition_penalty": settings["repetition_penalty"],
        "do_sample": settings["temperature"] > 0,
    }
    if values["do_sample"]:
        values |= {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    return values
