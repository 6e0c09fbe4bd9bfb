"""Adapters: merged into their base, and in the layout of the PEFT library, out and in.

A folder of that layout has `adapter_config.json` and `adapter_model.safetensors`, with lora_A
[rank, in] and lora_B [out, rank] of every linear map under its name in the transformers layout. The
metadata of the second hold the SHA-256 of the base, where the adapters were exported here.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pldr_jax.config import ConfigError, ExperimentConfig, LoraConfig, ModelConfig
from pldr_jax.config.load import config_from_dict, config_to_dict, dump_config
from pldr_jax.files import TOKENIZER, check_output, new_folder, user_path
from pldr_jax.interop.folder import read_json
from pldr_jax.interop.names import as_float32, linear_names
from pldr_jax.interop.record import inherited_files
from pldr_jax.interop.tensors import read_safetensors
from pldr_jax.interop.weights import Checkpoint, check_base, open_checkpoint
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import digest_of, target_shapes
from pldr_jax.runs.checkpoint import Weights, read_weights
from pldr_jax.runs.folder import write_run
from pldr_jax.terminal import print_line

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _DIGEST = "base_model.model.", "base_sha256"
_UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""What an `adapter_config.json` may ask for and is not done here."""

Log = Callable[[str], None]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder has PEFT's layout."""
    return (user_path(path, "PATH") / SETTINGS).is_file()


def merge_run(run: str | Path, output: str | Path, step: int | None, log: Log = print_line) -> None:
    """Makes a run folder of a model whose adapters are part of its weights.

    Raises:
      ConfigError, CheckpointError: no run of adapters, another base, or an output that is there.
    """
    check_output(output, "OUT")
    weights, lora = _read_adapters(run, step, "there is nothing to merge")
    opened = open_checkpoint(run, weights.step)
    stored, files = config_to_dict(opened.config), _files(opened, opened.config)
    write_run(output, weights.step, opened.params, opened.g_lm, stored, files)
    log(f"merged the adapters of step {weights.step} into {lora.base}: {output}")


def export_adapter(
    run: str | Path, output: str | Path, step: int | None, log: Log = print_line
) -> None:
    """Writes the adapters of a run folder in PEFT's layout; all of it or nothing.

    Raises:
      ConfigError, CheckpointError: no run of adapters, or an output that is there.
    """
    from safetensors.numpy import save_file

    check_output(output, "OUT")
    weights, lora = _read_adapters(run, step, "leave out --adapter")
    flat, tensors = flatten_dict(weights.params), {}
    model = config_from_dict(weights.config_dict, str(run)).model
    for name, (path, slot) in linear_names(model).items():
        if (*path, "a") in flat:
            for letter in "ab":
                matrix = np.asarray(flat[*path, letter])[slot]
                key = f"{_PREFIX}{name}.lora_{letter.upper()}.weight"
                tensors[key] = np.ascontiguousarray(matrix.T)
    modules = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    with new_folder(output, "OUT") as folder:
        save_file(tensors, folder / ADAPTER, {_DIGEST: str(lora.base_digest)})
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    log(f"exported the adapters of step {weights.step}, {len(tensors)} tensors: {output}")


def import_adapter(
    path: str | Path, base: str | Path, output: str | Path, log: Log = print_line
) -> None:
    """Makes a run folder of adapters in PEFT's layout.

    Args:
      base: checkpoint that they belong to.

    Raises:
      ConfigError, CheckpointError: another base, or adapters that do not fit it.
    """
    check_output(output, "OUT")
    folder = user_path(path, "PATH")
    opened = open_checkpoint(base, flag="--base")
    settings = read_json(folder / SETTINGS)
    tensors, metadata = read_safetensors(folder / ADAPTER)
    where = str(folder / ADAPTER)
    lora = dataclasses.replace(
        _read_settings(settings, f"{folder / SETTINGS}"),
        base=str(opened.folder.resolve()),
        base_step=opened.step,
        base_digest=metadata.get(_DIGEST),
    )
    if lora.base_digest is not None:
        check_base(lora, opened, f"--base={base}", folder)
    else:
        lora = dataclasses.replace(lora, base_digest=digest_of(opened.params, opened.g_lm))
    adapters, targets = _adapters(opened.config.model, lora, tensors, where)
    config = dataclasses.replace(opened.config, lora=dataclasses.replace(lora, targets=targets))
    files = _files(opened, config)
    write_run(output, 0, adapters, opened.g_lm, config_to_dict(config), files)
    log(f"imported {len(tensors)} tensors of adapters of rank {lora.rank}: {output}")


def _read_adapters(run: str | Path, step: int | None, remedy: str) -> tuple[Weights, LoraConfig]:
    """A checkpoint of adapters as it is, and what they are; ConfigError where it has none."""
    folder = user_path(run, "RUN")
    weights = read_weights(folder, step)
    lora = config_from_dict(weights.config_dict, str(folder)).lora
    if not lora.rank:
        raise ConfigError(f"{run}: has no adapters; {remedy}")
    return weights, lora


def _files(opened: Checkpoint, config: ExperimentConfig) -> dict[str, bytes]:
    """What a run folder holds beside its checkpoint."""
    files = {
        **inherited_files(opened.folder, opened.origin),
        "config.gin": dump_config(config).encode(),
    }
    if opened.tokenizer is not None:
        files[TOKENIZER] = opened.tokenizer.model_bytes
    return files


def _read_settings(settings: Mapping[str, Any], where: str) -> LoraConfig:
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    unsupported = [name for name in _UNKNOWN if settings.get(name)]
    if settings.get("peft_type") != "LORA" or unsupported or settings.get("bias", "none") != "none":
        what = ", ".join(unsupported) or "what is not plain LoRA"
        raise ConfigError(f"{where}: asks for {what}, which is not done here")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise ConfigError(f"{where}: r and lora_alpha must be numbers")
    return LoraConfig(rank=rank, alpha=float(alpha))


def _adapters(
    config: ModelConfig, lora: LoraConfig, tensors: Mapping[str, np.ndarray], where: str
) -> tuple[Params, tuple[str, ...]]:
    """Adapters as parameters, and the expressions that name exactly their linear maps.

    Raises:
      ConfigError: a tensor that is unknown, missing, or of another shape.
    """
    names = linear_names(config)
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or match[1] not in names:
            raise ConfigError(f"{where}: {key!r} is of no linear map of the model")
        found.setdefault(match[1], {})[match[2].lower()] = as_float32(tensor, f"{where}: {key!r}")
    targets = tuple(sorted({re.escape(".".join(names[name][0])) for name in found}))
    if not targets:
        raise ConfigError(f"{where}: holds no adapter")
    arrays: dict[tuple[str, ...], np.ndarray] = {}
    shapes = target_shapes(config, dataclasses.replace(lora, targets=targets))
    for name, (path, slot) in names.items():
        if path not in shapes:
            continue
        *stacked, inputs, outputs = shapes[path]
        for letter, shape in (("a", (inputs, lora.rank)), ("b", (lora.rank, outputs))):
            matrix = found.get(name, {}).get(letter)
            if matrix is None or matrix.T.shape != shape:
                there = "missing" if matrix is None else f"of the shape {matrix.shape}"
                raise ConfigError(
                    f"{where}: lora_{letter.upper()} of {name!r} is {there}, not {shape[::-1]}"
                )
            whole = arrays.setdefault((*path, letter), np.zeros((*stacked, *shape), np.float32))
            whole[slot] = matrix.T
    return jax.tree.map(jax.numpy.asarray, unflatten_dict(arrays)), targets
