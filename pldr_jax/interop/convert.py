"""Conversions: the transformers layout or a native `.pth` to a run folder, and back."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pldr_jax.config import ConfigError, ExperimentConfig, ModelConfig
from pldr_jax.config.load import config_to_dict, dump_config
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER, check_output, new_folder
from pldr_jax.interop import card, native
from pldr_jax.interop.check import LogitCheck, check_logits
from pldr_jax.interop.config_json import (
    PieceIds,
    config_json,
    generation_config_json,
    model_from_json,
)
from pldr_jax.interop.record import Record, make_record, read_record, record_files
from pldr_jax.interop.tensors import SINGLE, TensorFiles, read_pth, write_folder
from pldr_jax.interop.tokenizer_json import tokenizer_files
from pldr_jax.interop.transformers import (
    CONFIG,
    G_VALUES,
    TransformersCheckpoint,
    from_source,
    g_tensors,
    open_transformers,
    to_source,
)
from pldr_jax.interop.weights import Checkpoint, open_checkpoint
from pldr_jax.model.deductive import predefined_g_lm
from pldr_jax.model.shapes import count_params
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.folder import fill_run

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_DEFAULT_IDS = PieceIds(2, 3, 0)
"""Start, end and padding pieces where no tokenizer says."""


def import_checkpoint(
    path: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> LogitCheck:
    """Makes a run folder of a checkpoint of others; all of it or nothing.

    Args:
      path: a folder in the transformers layout, or a native `.pth`.
      output: a folder that does not exist, or is empty.
      tokenizer: a SentencePiece model; None takes `tokenizer.model` of the folder.
      gin_files, overrides: for a `.pth`, what its tensors do not say.
      log: takes each line.

    Raises:
      ConfigError: anything missing, unknown or misshaped; one line that names it.
    """
    path = Path(path)
    check_output(output, "OUT")
    if path.is_dir():
        if gin_files or overrides:
            raise ConfigError(f"--gin: {path / CONFIG} says what the model is; leave it out")
        opened = open_transformers(path)
    elif path.suffix in (".pth", ".pt"):
        opened = _open_pth(path, gin_files, overrides)
    else:
        raise ConfigError(f"{path}: no such folder or .pth file; give one to import")
    files = _imported_files(path, opened, tokenizer)
    config = ExperimentConfig(model=opened.config)
    files["config.gin"] = dump_config(config).encode()
    with new_folder(output, "OUT") as folder:
        fill_run(folder, 0, opened.params, opened.g_lm, config_to_dict(config), files)
        stored = read_weights(folder)
        _check_same_bits((opened.params, opened.g_lm), (stored.params, stored.g_lm), output)
        check = check_logits(opened.config, stored.params, stored.g_lm, opened.source.tensors, path)
    log(
        f"imported {len(opened.source.tensors)} tensors, {count_params(opened.config):,} "
        f"parameters, G_LM {opened.config.g_source}: {output}"
    )
    log(check.line())
    return check


def _open_pth(
    path: Path, gin_files: Sequence[str | Path], overrides: Sequence[str]
) -> TransformersCheckpoint:
    tensors = read_pth(path)
    source = TensorFiles(tensors, {}, {})
    config = native.model_from_tensors(tensors, gin_files, overrides, path)
    if config.g_source == "learned" or G_VALUES in tensors:
        return from_source(dataclasses.replace(config, g_file=None), source, str(path))
    g_lm = predefined_g_lm(config)
    config = dataclasses.replace(config, g_file=None)
    # The native code keeps G_LM in a file of its own.
    whole = {**g_tensors(config, g_lm), **tensors}
    opened = from_source(config, TensorFiles(whole, {}, {}), str(path))
    return dataclasses.replace(opened, source=source)


def _imported_files(
    path: Path, opened: TransformersCheckpoint, tokenizer: str | Path | None
) -> dict[str, bytes]:
    files = record_files(make_record(opened.source, path, leave_out=[TOKENIZER]))
    named = Path(tokenizer or path / TOKENIZER)
    if tokenizer is None and not named.is_file():
        return files
    loaded = Tokenizer.load(named)
    if loaded.vocab_size > opened.config.vocab_size:
        raise ConfigError(
            f"{named}: has {loaded.vocab_size} pieces, more than the model's vocabulary of "
            f"{opened.config.vocab_size}; name its own with --tokenizer"
        )
    return {**files, TOKENIZER: loaded.model_bytes}


def export_run(
    run_dir: str | Path,
    output: str | Path,
    step: int | None = None,
    licences: card.Licences | None = None,
    log: Callable[[str], None] = print,
) -> LogitCheck:
    """Writes a checkpoint of a run folder in the transformers layout; all of it or nothing.

    Args:
      run_dir: a run folder, trained, frozen or imported.
      output: a folder that does not exist, or is empty.
      step: of the checkpoint; None is the newest complete one.
      licences: for the model card.
      log: takes each line.

    Raises:
      ConfigError, CheckpointError: one line, saying what is wrong with a folder.
    """
    run_dir = Path(run_dir)
    check_output(output, "OUT")
    run = open_checkpoint(run_dir, step)
    if run.step is None:
        raise ConfigError(f"{run_dir}: has the transformers layout already; give a run folder")
    tensors = to_source(run.config.model, run.params, run.g_lm)
    record = read_record(run_dir)
    restored = record.restored(tensors) if record is not None else None
    if record is not None and restored is None:
        log(f"note: {run_dir} is not what was imported any more; its tensors are float32")
        record = None
    content = restored or TensorFiles(tensors, {}, {"format": "pt"})
    if not content.files:
        content = dataclasses.replace(content, files={SINGLE: sorted(content.tensors)})
    files = _exported_files(run, record)
    files["README.md"] = card.model_card(
        run, licences or card.Licences(), record.name if record else None
    ).encode()
    with new_folder(output, "OUT") as folder:
        write_folder(folder, content)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        opened = open_transformers(folder)
        _check_same_bits((run.params, run.g_lm), (opened.params, opened.g_lm), output)
        check = check_logits(run.config.model, run.params, run.g_lm, opened.source.tensors, run_dir)
    log(f"exported step {run.step}, {len(content.tensors)} tensors: {output}")
    log(check.line())
    return check


def _exported_files(run: Checkpoint, record: Record | None) -> dict[str, bytes]:
    """Every file but weights and model card; those of the source where there was one."""
    config, tokenizer, ids = run.config, run.tokenizer, _DEFAULT_IDS
    files: dict[str, bytes] = {}
    if tokenizer is not None:
        numbers = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        ids = PieceIds(*(number if number >= 0 else None for number in numbers))
        files = tokenizer_files(tokenizer, config.model.context_length)
    files[CONFIG] = _json(config_json(config.model, ids))
    files["generation_config.json"] = _json(
        generation_config_json(
            config.model.context_length, ids, dataclasses.asdict(config.generation)
        )
    )
    if record is None:
        return files
    kept = dict(record.others)
    if "tokenizer_config.json" in kept:  # its own files say what the tokenizer is
        files = {name: data for name, data in files.items() if name not in _TOKENIZER_FILES}
    if CONFIG in kept:
        theirs = model_from_json(json.loads(kept[CONFIG]), CONFIG)
        if theirs != _as_exported(config.model):
            del kept[CONFIG]
    return {**files, **kept}


def _as_exported(model: ModelConfig) -> ModelConfig:
    """The part of a model config that the transformers layout holds."""
    return model_from_json(config_json(model, _DEFAULT_IDS), CONFIG)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_same_bits(one: Any, other: Any, where: object) -> None:
    """RuntimeError if what was read back is not what was written: never seen, and never silent."""
    leaves, others = (jax.tree.leaves_with_path(tree) for tree in (one, other))
    for (path, x), (other_path, y) in zip(leaves, others, strict=True):
        if path != other_path or np.asarray(x).tobytes() != np.asarray(y).tobytes():
            raise RuntimeError(f"{where}: {jax.tree_util.keystr(path)} was not written as it is")
