"""Adapters: merged into their base, and in the layout of the PEFT library, out and in.

A folder of that layout has `adapter_config.json` and `adapter_model.safetensors`, with lora_A
[rank, in] and lora_B [out, rank] of every linear map under its name in the transformers layout, and
the head of a task whole, as one of PEFT's `modules_to_save`. The metadata of the second hold the
SHA-256 of the base and the names of labels, where the adapters were exported here.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pldr_jax.config import ConfigError, ExperimentConfig, LoraConfig, ModelConfig, TaskConfig
from pldr_jax.config.load import config_from_dict, config_to_dict, dump_config
from pldr_jax.copies import readable_path
from pldr_jax.files import TOKENIZER, check_output, new_folder
from pldr_jax.interop.folder import parse_json, read_json
from pldr_jax.interop.names import HEADS, as_float32, linear_names
from pldr_jax.interop.record import inherited_files
from pldr_jax.interop.tensors import read_safetensors
from pldr_jax.interop.weights import Checkpoint, check_base, open_checkpoint
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import digest_of, target_shapes
from pldr_jax.runs.checkpoint import Weights, read_weights
from pldr_jax.runs.folder import write_run
from pldr_jax.runs.hub import find_checkpoint
from pldr_jax.terminal import print_line

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX, _OURS = "base_model.model.", "pldr_jax"
_UNKNOWN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
"""What an `adapter_config.json` may ask for and is not done here."""
_TASK_TYPES = {
    None: "CAUSAL_LM",
    "sequence": "SEQ_CLS",
    "token": "TOKEN_CLS",
    "question": "QUESTION_ANS",
}
"""Task -> PEFT's name of it."""

Log = Callable[[str], None]


def is_adapter(path: str | Path) -> bool:
    """Whether a folder has PEFT's layout."""
    return (readable_path(path, "PATH") / SETTINGS).is_file()


def merge_run(run: str | Path, output: str | Path, step: int | None, log: Log = print_line) -> None:
    """Makes a run folder of a model whose adapters are part of its weights.

    Raises:
      ConfigError, CheckpointError: no run of adapters, another base, or an output that is there.
    """
    check_output(output, "OUT")
    weights, lora = _read_adapters(run, step, "there is nothing to merge")
    opened = open_checkpoint(run, weights.step, tasks=True)
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
    config = config_from_dict(weights.config_dict, str(run))
    model, head = config.model, HEADS[config.model.task]
    for name, (path, slot) in linear_names(model).items():
        if (*path, "a") in flat:
            for letter in "ab":
                matrix = np.asarray(flat[*path, letter])[slot]
                key = f"{_PREFIX}{name}.lora_{letter.upper()}.weight"
                tensors[key] = np.ascontiguousarray(matrix.T)
    modules = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    if model.task is not None:
        for name, leaf in {"weight": "kernel", "bias": "bias"}.items():
            if ("head", leaf) in flat:
                matrix = np.ascontiguousarray(np.asarray(flat["head", leaf]).T)
                tensors[f"{_PREFIX}{head}.{name}"] = matrix
    settings = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[model.task],
        "base_model_name_or_path": lora.base,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
        "modules_to_save": None if model.task is None else [head],
    }
    ours = {"base_sha256": lora.base_digest, "labels": config.task.labels}
    with new_folder(output, "OUT") as folder:
        save_file(tensors, folder / ADAPTER, {_OURS: json.dumps(ours)})
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
    folder = readable_path(path, "PATH")
    opened = open_checkpoint(base, flag="--base", tasks=True)
    settings = read_json(folder / SETTINGS)
    tensors, metadata = read_safetensors(folder / ADAPTER)
    where = str(folder / ADAPTER)
    ours = parse_json(metadata.get(_OURS, "{}").encode(), where)
    lora = dataclasses.replace(
        _read_settings(settings, f"{folder / SETTINGS}"),
        base=opened.name,
        base_step=opened.step,
        base_digest=ours.get("base_sha256"),
    )
    if lora.base_digest is not None:
        stated = dataclasses.replace(lora, base=settings.get("base_model_name_or_path"))
        check_base(stated, opened, f"--base={base}", folder)
    else:
        lora = dataclasses.replace(lora, base_digest=digest_of(opened.params, opened.g_lm))
    config, head = _with_head(opened.config, settings, tensors, ours.get("labels", ()), where)
    linear = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    adapters, targets = _adapters(config.model, lora, linear, where)
    config = dataclasses.replace(config, lora=dataclasses.replace(lora, targets=targets))
    adapters = {**adapters, **head}
    files = _files(opened, config)
    write_run(output, 0, adapters, opened.g_lm, config_to_dict(config), files)
    log(f"imported {len(tensors)} tensors of adapters of rank {lora.rank}: {output}")


def _read_adapters(run: str | Path, step: int | None, remedy: str) -> tuple[Weights, LoraConfig]:
    """A checkpoint of adapters as it is, and what they are; ConfigError where it has none."""
    folder = find_checkpoint(run, "RUN", step=step).folder
    weights = read_weights(folder, step)
    lora = config_from_dict(weights.config_dict, str(folder)).lora
    if not lora.rank:
        raise ConfigError(f"{run}: has no adapters; {remedy}")
    return weights, lora


def _with_head(
    config: ExperimentConfig,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    labels: Sequence[str],
    where: str,
) -> tuple[ExperimentConfig, Params]:
    """The config with the task that the adapters are for, and `{"head": ...}` of it; the config of
    the base and {} where they are for a language model.

    Raises:
      ConfigError: another task or other labels than the base has, or a tensor that does not fit.
    """
    base = config.model
    named: dict[Any, Any] = {name: task for task, name in _TASK_TYPES.items()}
    task = named.get(settings.get("task_type"), base.task)
    whole = {
        key.removeprefix(_PREFIX): as_float32(tensor, f"{where}: {key!r}")
        for key, tensor in tensors.items()
        if ".lora_" not in key
    }
    if task != base.task and base.task is not None:
        raise ConfigError(f"{where}: is for a {task or 'language'} model, --base has a {base.task}")
    name = HEADS[task]
    needed = [f"{name}.weight", *([] if task == "sequence" else [f"{name}.bias"])]
    needed = [] if task is None else needed
    if odd := sorted(set(whole) ^ set(needed)):
        there = "has no place in the model" if odd[0] in whole else "is missing"
        raise ConfigError(f"{where}: {_PREFIX + odd[0]!r} {there}")
    if task is None:
        return config, {}
    count = len(whole[needed[0]])
    labels = config.task.labels or tuple(labels) or tuple(f"LABEL_{i}" for i in range(count))
    labels = () if task == "question" else labels
    for key, shape in zip(needed, ((count, base.model_dim), (count,)), strict=False):
        if whole[key].shape != shape or count != (2 if task == "question" else len(labels)):
            raise ConfigError(
                f"{where}: {_PREFIX + key!r} has the shape {whole[key].shape}, which does not fit "
                f"a {task} head of {len(labels) or 2} labels on a width of {base.model_dim}"
            )
    model = dataclasses.replace(base, task=task, num_labels=count)
    leaves = zip(("kernel", "bias"), needed, strict=False)
    head = {leaf: jax.numpy.asarray(whole[key].T) for leaf, key in leaves}
    return ExperimentConfig(model=model, task=TaskConfig(labels=labels)), {"head": head}


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
    if not set(settings.get("modules_to_save") or ()) <= {*HEADS.values(), "classifier"}:
        unsupported.append("modules_to_save")
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
