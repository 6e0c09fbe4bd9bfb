"""A checkpoint with one calibrated G_LM in place of the PLGA network, and its certificate."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig, MeshConfig
from pldr_jax.config.load import config_to_dict, dump_config, load_config, load_mesh
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.rows import join_rows
from pldr_jax.data.segment_count import with_segment_count
from pldr_jax.files import TOKENIZER, check_output
from pldr_jax.interop.record import inherited_files
from pldr_jax.interop.weights import Checkpoint, held_out_text, open_checkpoint
from pldr_jax.model.counts.flops import row_flops
from pldr_jax.partition import build_mesh, mesh_scope
from pldr_jax.runs.folder import write_run
from pldr_jax.terminal import print_line, summary_table
from pldr_jax.training.freeze import calibrate as calibration
from pldr_jax.training.freeze.certificate import certificate_lines, certify, invariance_warning
from pldr_jax.training.freeze.contract import contract_lines, frozen_contract, row_documents
from pldr_jax.training.freeze.rank_budget import budget_lines, measure_budgets
from pldr_jax.training.freeze.settings import FreezeConfig

CERTIFICATE = "certificate.json"
RowSets = tuple[calibration.RowSet, calibration.RowSet]


def freeze(
    checkpoint: str | Path,
    output: str | Path,
    settings: FreezeConfig = FreezeConfig(),  # noqa: B008 (frozen)
    gin_files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print_line,
) -> dict[str, Any]:
    """Writes a frozen checkpoint, and prints and returns its certificate.

    Args:
      checkpoint: a run folder, or one in the transformers layout, which needs `settings.text`.
      output: a folder that does not exist, or is empty; `pldr_jax.load` opens it.
      gin_files, overrides: for `load_config`, on top of the run's config; where they name a mesh,
        the weights come to it, each in its parts.
      log: takes each line.

    Raises:
      ConfigError: no learned G_LM to freeze, no text, or a folder that cannot be used.
      CheckpointError: the checkpoint cannot be read or written.
    """
    check_output(output)
    if settings.save_g is not None:
        _check_new_file(Path(settings.save_g))
    chosen = load_mesh(gin_files, overrides)
    mesh = None if chosen == MeshConfig() else build_mesh(chosen)
    opened = open_checkpoint(checkpoint, settings.step, "--checkpoint", mesh=mesh)
    with mesh_scope(mesh):
        return _freeze(opened, output, settings, gin_files, overrides, log)


def _freeze(
    opened: Checkpoint,
    output: str | Path,
    settings: FreezeConfig,
    gin_files: Sequence[str | Path],
    overrides: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    folder = opened.folder
    stored, step = opened.config, opened.step or 0
    calibration.check_learned(stored.model, folder)
    config = load_config(gin_files, overrides, base=stored)
    if config.model != stored.model:
        raise ConfigError("--gin.Model: the model is that of the checkpoint and cannot be changed")
    calibrated_on, evaluated_on = _row_sets(folder, config, settings, log)
    calibrated = calibration.calibrate(
        config.model, opened.params, calibrated_on, settings.calibration
    )
    certificate = certify(
        config.model, opened.params, calibrated, evaluated_on, settings.kl_threshold
    )
    averaged, compared = map(row_documents, (calibrated_on, evaluated_on))
    certificate["contract"] = frozen_contract(config.model, opened.params, averaged, compared)
    frozen = calibration.frozen_config(stored)
    params = calibration.without_plga(opened.params)
    if settings.rank_budget:
        batches = evaluated_on.batches(calibration.rows_at_once(config.model))
        certificate["low_rank"] = measure_budgets(
            frozen.model,
            params,
            calibrated.g_lm,
            (batch for batch, _ in batches),
            settings.rank_budget,
            evaluated_on.rows.max_segments,
        )
    files = {"config.gin": dump_config(frozen).encode(), **_files(opened, certificate)}
    write_run(output, step, params, calibrated.g_lm, config_to_dict(frozen), files)
    if settings.save_g is not None:
        np.savez(settings.save_g, G_LM=np.asarray(calibrated.g_lm)[:, 0])
        log(f"G_LM: {settings.save_g}")
    for text in _shown(certificate):
        log(text)
    log(f"frozen checkpoint of step {step}: {output}")
    return certificate


def _files(opened: Checkpoint, certificate: dict[str, Any]) -> dict[str, bytes]:
    """What a frozen run folder holds of the folder it comes from, and the certificate."""
    text = json.dumps(certificate, indent=2, allow_nan=False) + "\n"
    folder = opened.folder
    files = {**inherited_files(folder, opened.origin), CERTIFICATE: text.encode()}
    if (folder / TOKENIZER).is_file():
        files[TOKENIZER] = (folder / TOKENIZER).read_bytes()
    return files


def _shown(certificate: dict[str, Any]) -> Iterator[str]:
    """The certificate as a table, and the warning that it may call for."""
    lines = certificate_lines(certificate) | contract_lines(certificate["contract"])
    yield summary_table(lines | budget_lines(certificate.get("low_rank", ())))
    if warning := invariance_warning(certificate):
        yield warning


def _check_new_file(path: Path) -> None:
    """ConfigError if an NPZ file of this name cannot be written, or is there."""
    if path.suffix != ".npz":
        raise ConfigError(f"--save_g={path}: must end in .npz")
    if path.exists():
        raise ConfigError(f"--save_g={path}: is there already; name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"--save_g={path}: there is no folder {path.parent}; make it first")


def _row_sets(
    folder: Path, config: ExperimentConfig, settings: FreezeConfig, log: Callable[[str], None]
) -> RowSets:
    """Rows to calibrate and to evaluate on, of different documents where a text is named."""
    eval_rows = config.training.eval_rows if settings.eval_rows is None else settings.eval_rows
    model, path = config.model, folder / TOKENIZER
    if settings.text is None:
        text = held_out_text(folder, config, "--text", log)
        data = with_segment_count(config, text, row_flops(model), log).data
        held_out = join_rows(text.rows("validation", model.context_length, data))
        return calibration.split_rows(held_out, settings.rows, eval_rows)
    if not path.is_file():
        raise ConfigError(f"--text={settings.text}: {folder} has no {TOKENIZER} to read it with")
    data = DataConfig(
        source=settings.text,
        tokenizer=str(path),
        validation_fraction=0.5,
        packing=config.data.packing,
        max_segments=config.data.max_segments,
        cache_dir=config.data.cache_dir,
    )
    text = open_training_text(data, model.vocab_size, log)
    config = dataclasses.replace(config, data=data)
    data = with_segment_count(config, text, row_flops(model), log).data
    first, second = (
        calibration.some_rows(join_rows(text.rows(split, model.context_length, data)), count)
        for split, count in (("train", settings.rows), ("validation", eval_rows))
    )
    return first, second
