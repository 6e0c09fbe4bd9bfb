"""Conversions: the transformers layout or a native `.pth` to a run folder, and back."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pldr_jax.config import ConfigError, ExperimentConfig, TaskConfig
from pldr_jax.config.load import config_to_dict, dump_config
from pldr_jax.copies import readable_path
from pldr_jax.data.text.chat import template_in
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_output,
    new_folder,
    user_path,
    whole_file,
)
from pldr_jax.interop import card, native
from pldr_jax.interop.check import LogitCheck, check_logits
from pldr_jax.interop.config_json import (
    BACKBONE,
    CODE_REPOSITORY,
    PieceIds,
    config_json,
    generation_config_json,
    label_names,
    merged_config,
    model_from_json,
)
from pldr_jax.interop.folder import parse_json
from pldr_jax.interop.names import from_tensors
from pldr_jax.interop.pth import read_pickled_g_lm, read_pth, refuse_distributed
from pldr_jax.interop.record import Record, make_record, read_record, record_files
from pldr_jax.interop.tensors import SINGLE, TensorFiles, write_folder
from pldr_jax.interop.tokenizer.files import FAST, SETTINGS, check_tokenizer, tokenizer_files
from pldr_jax.interop.transformers import (
    CONFIG,
    G_VALUES,
    TransformersCheckpoint,
    from_source,
    open_transformers,
    to_source,
)
from pldr_jax.interop.weights import Checkpoint, open_checkpoint
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.deductive import predefined_g_lm
from pldr_jax.partition import mesh_of_all_devices
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.folder import fill_run
from pldr_jax.runs.hub import find_checkpoint
from pldr_jax.terminal import print_line

_DEFAULT_IDS = PieceIds(2, 3, 0)
"""Start, end and padding pieces where nothing says."""


def import_checkpoint(
    path: str | Path,
    output: str | Path,
    tokenizer: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print_line,
) -> LogitCheck:
    """Makes a run folder of a checkpoint of others; all of it or nothing.

    Args:
      path: a folder in the transformers layout, a name of the hub, or a native `.pth`.
      output: a folder that does not exist, or is empty.
      tokenizer: a SentencePiece model; None takes `tokenizer.model` of the folder.
      gin_files, overrides: for a `.pth`, what its tensors do not say.
      log: takes each line.

    Raises:
      ConfigError: anything missing, unknown or misshaped; one line that names it.
    """
    check_output(output, "OUT")
    path, origin = find_checkpoint(path, "PATH")
    if path.is_dir():
        refuse_distributed(path)
        if gin_files or overrides:
            raise ConfigError(f"--gin: {path / CONFIG} says what the model is; leave it out")
        if not (path / CONFIG).exists():
            kind = "is a run folder already" if (path / "checkpoints").is_dir() else "has none"
            raise ConfigError(
                f"{path / CONFIG}: cannot be read: {path} {kind}; give a folder in the "
                "transformers layout, a native .pth, or OWNER/NAME of the hub"
            )
        opened = open_transformers(path, mesh_of_all_devices())
        if "head" not in opened.params:
            raise ConfigError(
                f"{path / CONFIG}: a {BACKBONE} has no head, and a run folder needs one; begin a "
                "run with it: train.py --init_from"
            )
    elif path.suffix in (".pth", ".pt"):
        opened = _open_pth(path, gin_files, overrides)
    else:
        raise ConfigError(f"{path}: no such folder or .pth file; give one to import")
    files = _imported_files(path, opened, tokenizer, origin)
    config = ExperimentConfig(model=opened.config, task=TaskConfig(labels=opened.labels))
    files["config.gin"] = dump_config(config).encode()
    with new_folder(output, "OUT") as folder:
        fill_run(folder, 0, opened.params, opened.g_lm, config_to_dict(config), files)
        stored = read_weights(folder, mesh=mesh_of_all_devices())
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
    source = TensorFiles(read_pth(path), {}, {})
    config = native.model_from_tensors(source.tensors, gin_files, overrides, path)
    model = dataclasses.replace(config, g_file=None)
    if config.g_source == "learned" or G_VALUES in source.tensors:
        return from_source(model, source, str(path))
    params = from_tensors(model, source.tensors, str(path))
    # The native code keeps G_LM in a file of its own.
    return TransformersCheckpoint(model, params, predefined_g_lm(config), source)


def _imported_files(
    path: Path,
    opened: TransformersCheckpoint,
    tokenizer: str | Path | None,
    origin: Mapping[str, str],
) -> dict[str, bytes]:
    files = record_files(make_record(opened.source, path, origin))
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
    log: Callable[[str], None] = print_line,
    code_repository: str = CODE_REPOSITORY,
) -> LogitCheck:
    """Writes a checkpoint of a run folder in the transformers layout; all of it or nothing.

    Args:
      run_dir: a run folder, trained, frozen or imported.
      output: a folder that does not exist, or is empty.
      step: of the checkpoint; None is the newest complete one.
      licences: for the model card.
      log: takes each line.
      code_repository: of the hub; has the code with which transformers opens the model.

    Raises:
      ConfigError, CheckpointError: one line, saying what is wrong with a folder.
    """
    check_output(output, "OUT")
    mesh = mesh_of_all_devices()
    run = open_checkpoint(run_dir, step, tasks=True, mesh=mesh)
    if run.step is None:
        raise ConfigError(f"{run_dir}: has the transformers layout already; give a run folder")
    tensors = to_source(run.config.model, run.params, run.g_lm)
    record = read_record(run.folder) or Record()
    restored = record.restored(tensors)
    if record.name is not None and restored is None:
        log(f"note: {run_dir} is not what was imported any more; its tensors are float32")
        record = Record(others=record.others)
    content = restored or TensorFiles(tensors, {}, {"format": "pt"})
    if not content.files:
        content = dataclasses.replace(content, files={SINGLE: sorted(content.tensors)})
    files = _exported_files(run, record.others, code_repository)
    files["README.md"] = card.model_card(run, licences or card.Licences(), record.name).encode()
    with new_folder(output, "OUT") as folder:
        write_folder(folder, content)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        opened = open_transformers(folder, mesh)
        _check_same_bits((run.params, run.g_lm), (opened.params, opened.g_lm), output)
        check = check_logits(run.config.model, run.params, run.g_lm, opened.source.tensors, run_dir)
        lines = [
            f"exported step {run.step}, {len(content.tensors)} tensors: {output}",
            check.line(),
        ]
        if run.tokenizer is not None and FAST in files:
            lines.append(check_tokenizer(run.tokenizer, files[FAST]).line())
    for line in lines:
        log(line)
    return check


def convert_g_lm(
    path: str | Path, output: str | Path, log: Callable[[str], None] = print_line
) -> None:
    """Writes the G_LM of a pickle to an NPZ file with the key `G_LM` [L,N,H,J].

    Raises:
      ConfigError: the pickle cannot be used, or the file is there or cannot be written.
    """
    target = user_path(output, "OUT")
    if target.suffix != ".npz" or target.exists():
        raise ConfigError(f"OUT={output}: must be a new file that ends in .npz")
    g_lm = read_pickled_g_lm(readable_path(path, "PICKLE"))
    try:
        with whole_file(target) as temporary:
            np.savez(temporary, G_LM=g_lm)
    except OSError as error:
        raise ConfigError(f"OUT={output}: cannot be written ({error.strerror})") from None
    log(f"G_LM {list(g_lm.shape)}: {output}")


def _exported_files(
    run: Checkpoint, source: Mapping[str, bytes], code_repository: str
) -> dict[str, bytes]:
    """Every file but weights and model card; those of the source where there was one."""
    model, ids = run.config.model, _DEFAULT_IDS
    theirs = parse_json(source[CONFIG], f"{run.folder}: {CONFIG}") if CONFIG in source else {}
    if run.tokenizer is not None:
        ids = PieceIds.of(run.tokenizer)
    ours = config_json(model, ids, code_repository)
    if labels := run.config.task.labels:
        ours |= {
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    sampling = run.config.generation.sampling
    files = {
        CONFIG: _json(ours),
        "generation_config.json": _json(
            generation_config_json(model.context_length, ids, sampling)
        ),
        **source,
    }
    if run.tokenizer is not None:
        files |= tokenizer_files(run.tokenizer, model.context_length, source)
    template = template_in(run.folder) if (run.folder / TOKENIZER_CONFIG).is_file() else None
    if template is not None and SETTINGS in files:
        settings = parse_json(files[SETTINGS], SETTINGS) | {"chat_template": template}
        files[SETTINGS] = _json(settings)
        files.pop("chat_template.jinja", None)  # transformers would read it first
    if theirs and _contradicts(theirs, ours):
        files[CONFIG] = _json(merged_config(theirs, ours))
    return files


def _contradicts(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two `config.json` say other models, or other labels of a task."""
    one, other = model_from_json(theirs, CONFIG), model_from_json(ours, CONFIG)
    if one.task != other.task:
        return True
    one = dataclasses.replace(one, num_labels=other.num_labels)  # may be stated by the head alone
    unnamed = tuple(f"LABEL_{i}" for i in range(other.num_labels))
    names = [label_names(raw, CONFIG) or unnamed for raw in (theirs, ours)]
    return one != other or (other.task in ("sequence", "token") and names[0] != names[1])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _check_same_bits(one: Any, other: Any, where: object) -> None:
    """RuntimeError if what was read back is not what was written: never seen, and never silent."""
    leaves, others = (jax.tree.leaves_with_path(tree) for tree in (one, other))
    for (path, x), (other_path, y) in zip(leaves, others, strict=True):
        if path != other_path or np.asarray(x).tobytes() != np.asarray(y).tobytes():
            raise RuntimeError(f"{where}: {jax.tree_util.keystr(path)} was not written as it is")
