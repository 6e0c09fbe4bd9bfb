"""The `config.json` of the transformers layout, as our model config, and back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pldr_jax.config import ConfigError, ModelConfig, SamplingConfig
from pldr_jax.config.load import config_from_dict
from pldr_jax.data.text.tokenizer import Tokenizer

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
    "attention_dropout": 0.0,
}
"""What this model has no other form of."""

_ABSENT = {"partial_rotary_factor": 1.0, "sliding_window": None, "quantization_config": None}
"""What it does not have, with the value that says so."""

ARCHITECTURES = {
    None: "PldrllmForCausalLM",
    "sequence": "PldrllmForSequenceClassification",
    "token": "PldrllmForTokenClassification",
    "question": "PldrllmForQuestionAnswering",
}
"""Task -> their class."""

BACKBONE = "PldrllmModel"
"""Their class without a head."""

CODE_REPOSITORY = "fromthesky/PLDR-LLM-v51-SOC-110M-1"
"""Of the hub; has the authors' code for transformers."""


def model_from_json(raw: Mapping[str, Any], where: str | Path) -> ModelConfig:
    """The model of a `config.json`. A G_LM that is not learned is in the checkpoint: "random" and
    "external" both become `g_source = 'external'` without a file.

    Raises:
      ConfigError: not a PLDR-LLM, or one with parts this model does not have.
    """
    if raw.get("model_type") != "pldrllm":
        raise ConfigError(f"{where}: model_type = {raw.get('model_type')!r}: must be 'pldrllm'")
    task = _task(raw, where)
    for name, needed in {**_FIXED, **_ABSENT}.items():
        if raw.get(name, needed) != needed:
            raise ConfigError(f"{where}: {name} = {raw[name]!r}: only {needed!r} is supported")
    fields: dict[str, Any] = {"unroll": False}
    for theirs, ours in _NAMES.items():
        if theirs in raw:
            fields[ours] = raw[theirs]
        elif theirs not in _OPTIONAL:
            raise ConfigError(f"{where}: the field {theirs!r} is missing")
    fields |= _rope(raw, where)
    if task is not None:
        labels = label_names(raw, where)
        fields |= {"task": task, "pad_id": raw.get("pad_token_id", 0)}
        fields["num_labels"] = 2 if task == "question" else len(labels) if labels else 2
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


def _task(raw: Mapping[str, Any], where: str | Path) -> str | None:
    stated = raw.get("architectures") or [ARCHITECTURES[None]]
    if stated == [BACKBONE]:
        return None
    for task, architecture in ARCHITECTURES.items():
        if stated == [architecture]:
            return task
    known = ", ".join(map(repr, (*ARCHITECTURES.values(), BACKBONE)))
    raise ConfigError(f"{where}: architectures = {stated!r}: only one of {known} is supported")


def label_names(raw: Mapping[str, Any], where: str | Path) -> tuple[str, ...] | None:
    """The names of a task's labels, in the order of its logits; None where nothing says how many
    there are, which is usual for two.

    Raises:
      ConfigError: `id2label` or `num_labels` cannot be used, or they contradict each other.
    """
    named, count = raw.get("id2label"), raw.get("num_labels")
    if named is None:
        if count is None:
            return None
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 2**20:
            raise ConfigError(f"{where}: num_labels = {count!r}: must be a number of labels")
        return tuple(f"LABEL_{i}" for i in range(count))
    numbers = [str(i) for i in range(len(named))] if isinstance(named, dict) else []
    labels = named.values() if numbers else ()
    plain = all(isinstance(label, str | int) for label in labels)
    if not numbers or not plain or {*named} != {*numbers} or len({*map(str, labels)}) < len(named):
        raise ConfigError(f"{where}: id2label: must name each label 0, 1, ... once")
    if count not in (None, len(numbers)):
        raise ConfigError(f"{where}: num_labels = {count!r}: id2label names {len(numbers)}")
    return tuple(str(named[number]) for number in numbers)


def _rope(raw: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """`rope_layout`, and `rope_theta` if it is stated: at the top, or in the `rope_parameters` of
    transformers 5.

    Raises:
      ConfigError: two values, or a rotary embedding that is scaled, partial or unknown.
    """
    reference = raw.get("reference_rope", True)
    if not isinstance(reference, bool):
        raise ConfigError(f"{where}: reference_rope = {reference!r}: must be true or false")
    fields: dict[str, Any] = {"rope_layout": "interleaved" if reference else "half_split"}
    stated = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    for group in ("rope_parameters", "rope_scaling"):
        values = raw.get(group)
        for name, value in (values if isinstance(values, dict) else {"": values}).items():
            if name == "rope_theta":
                stated[f"{group}.{name}"] = value
            elif (name, value) not in _PLAIN_ROPE:
                raise ConfigError(
                    f"{where}: {group} = {values!r}: only rope_type 'default' is supported"
                )
    for name, value in raw.items():
        known = ("reference_rope", "rope_theta", "rope_parameters", "rope_scaling", *_ABSENT)
        if ("rope" in name or "rotary" in name) and name not in known and value is not None:
            raise ConfigError(f"{where}: {name} = {value!r}: there is no such field of this model")
    for value in stated.values():
        if value != next(iter(stated.values())):
            both = " and ".join(f"{name} = {value!r}" for name, value in stated.items())
            raise ConfigError(f"{where}: {both}: must be the same")
        fields["rope_theta"] = value
    return fields


_PLAIN_ROPE = (
    ("", None),
    ("rope_type", "default"),
    ("type", "default"),
    ("partial_rotary_factor", 1.0),
)
"""Fields and values of `rope_parameters` and `rope_scaling` that change nothing."""


class PieceIds(NamedTuple):
    """Ids of the start, end and padding pieces; None where the tokenizer has no such piece."""

    bos: int | None
    eos: int | None
    pad: int | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "PieceIds":
        """Those of a tokenizer."""
        numbers = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        return cls(*(number if number >= 0 else None for number in numbers))

    def fields(self) -> dict[str, int | None]:
        """As both config files name them."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


def end_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end a text by `eos_token_id`, which is a number, a list of them, or absent."""
    stated = raw.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [stated]
    return tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)


def config_json(config: ModelConfig, ids: PieceIds, code_repository: str) -> dict[str, Any]:
    """The `config.json` of a model; transformers finds its code in a repository of the hub."""
    architecture = ARCHITECTURES[config.task]
    values = {
        **{theirs: getattr(config, ours) for theirs, ours in _NAMES.items()},
        "intermediate_size": config.ffn_width,
        "A_dff": config.metric_width,
        "hidden_size": config.model_dim,
        "reference_rope": config.rope_layout == "interleaved",
        "custom_G_type": None if config.g_source == "learned" else config.g_source,
        "cache_first_G": False,
        **_FIXED,
        "rope_scaling": None,
        "model_type": "pldrllm",
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": f"{code_repository}--configuration_pldrllm.PldrllmConfig",
            f"AutoModel{architecture.removeprefix('Pldrllm')}": (
                f"{code_repository}--modeling_pldrllm.{architecture}"
            ),
        },
        "torch_dtype": "float32",
        "use_cache": True,
        **ids.fields(),
    }
    return dict(sorted(values.items()))


def merged_config(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model that was made of another: what `theirs` says and no field of
    the model contradicts, such as `auto_map`, stays.
    """
    kept = {
        name: value for name, value in theirs.items() if name not in ("rope_parameters", "dtype")
    }
    if kept.get("architectures") not in (None, ours["architectures"]):
        kept.pop("auto_map", None)  # it names no class for this head
    stays = ("auto_map", "bos_token_id", "eos_token_id", "pad_token_id")
    return kept | {k: v for k, v in ours.items() if k not in stays or k not in kept}


def generation_config_json(
    context_length: int,
    ids: PieceIds,
    sampling: SamplingConfig,
) -> dict[str, Any]:
    """The `generation_config.json` of a model with the sampling settings of a run."""
    values: dict[str, Any] = {
        **ids.fields(),
        "max_length": context_length,
        "use_cache": True,
        "repetition_penalty": sampling.repetition_penalty,
        "do_sample": sampling.temperature > 0,
    }
    if values["do_sample"]:
        own = ("max_new_tokens", "seed", "stop_ids", "stop")
        values |= {name: x for name, x in dataclasses.asdict(sampling).items() if name not in own}
    return values
