"""`infer.py --freeze_g`: a checkpoint with one G_LM in place of the PLGA network."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pldr_jax.cli.common import CHECKPOINT, STEP, keep_compiled_programs
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig
from pldr_jax.config.load import config_to_dict, dump_config, load_config
from pldr_jax.files import TOKENIZER

if TYPE_CHECKING:
    from pldr_jax.training.freeze.calibrate import RowSet

DESCRIPTION = (
    "Replaces the PLGA network of a trained PLDR-LLM by one G_LM, and certifies what it changes. "
    "Config fields set here replace the run's; those of Model cannot be set."
)
CERTIFICATE = "certificate.json"
KL_THRESHOLD = 0.01
"""Nats a token above which the frozen model counts as another one."""

OPTIONS = (
    CHECKPOINT,
    Option("output", "folder of the frozen checkpoint", required=True, metavar="DIR"),
    STEP,
    Option("text", "text file, folder or glob; default: the run's held-out text", metavar="PATH"),
    Option("rows", "rows that G_LM is calibrated on", type=int, default=16, metavar="ROWS"),
    Option(
        "eval_rows",
        "other rows that the certificate measures; default: Training.eval_rows; 0 takes all",
        type=int,
        metavar="ROWS",
    ),
    Option(
        "calibration",
        "mean of G_LM over the rows, or that of the first",
        default="mean",
        choices=("mean", "first"),
    ),
    Option(
        "save_g",
        "also write the calibrated G_LM alone, as NPZ, which Model.g_file and Generation.g_file "
        "read",
        metavar="FILE",
    ),
    Option(
        "rank_budget",
        "also certify decoding with keys cached in fewer numbers, at this relative error of G_LM",
        type=float,
        repeat=True,
        metavar="X",
    ),
)


def freeze(
    checkpoint: str | Path,
    output: str | Path,
    text: str | None = None,
    rows: int = 16,
    calibration: str = "mean",
    eval_rows: int | None = None,
    step: int | None = None,
    kl_threshold: float = KL_THRESHOLD,
    rank_budgets: Sequence[float] = (),
    gin_files: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
    save_g: str | Path | None = None,
) -> dict[str, Any]:
    """Writes a frozen checkpoint, and prints and returns its certificate.

    Args:
      checkpoint: a run folder, or one in the transformers layout, which needs `text`.
      output: a folder that does not exist, or is empty; `pldr_jax.load` opens it.
      text: unseen text to use, cut in two by documents to calibrate and to evaluate on; None is the
        run's own held-out text.
      rows: rows of `Model.context_length` tokens to calibrate on.
      calibration: "mean" of G_LM over those rows, or that of the "first".
      eval_rows: other rows, to evaluate on; None is `Training.eval_rows`, 0 takes all.
      step: checkpoint of a run folder; None is the newest complete one.
      kl_threshold: nats a token above which a warning is printed.
      rank_budgets: relative errors of G_LM for which the certificate says what low-rank decoding
        saves and costs (`pldr_jax/training/freeze/rank_budget.py`); the checkpoint is the same.
      gin_files, overrides: for `load_config`, on top of the run's config.
      log: takes each line.
      save_g: an NPZ file for the calibrated G_LM [L,N,H,J], key `G_LM`, which another run can train
        with (`Model.g_source = "external"`) or decode with.

    Raises:
      ConfigError: no learned G_LM to freeze, no text, or a folder that cannot be used.
      CheckpointError: the checkpoint cannot be read or written.
    """
    from pldr_jax.files import check_output
    from pldr_jax.interop.weights import open_checkpoint
    from pldr_jax.model.low_rank import check_budget
    from pldr_jax.runs.curves import summary_table
    from pldr_jax.runs.folder import write_run
    from pldr_jax.training.freeze import calibrate as freezing
    from pldr_jax.training.freeze import certificate as certificates
    from pldr_jax.training.freeze.rank_budget import budget_lines, measure_budgets

    for name, value, low in (("rows", rows, 1), ("eval_rows", eval_rows or 0, 0)):
        if value < low:
            raise ConfigError(f"--{name}={value}: must be at least {low}")
    if calibration not in freezing.CALIBRATIONS:
        raise ConfigError(f"--calibration={calibration}: must be 'mean' or 'first'")
    for budget in rank_budgets:
        check_budget(budget, "--rank_budget")
    folder = Path(checkpoint)
    check_output(output)
    if save_g is not None:
        _check_new_file(Path(save_g))
    opened = open_checkpoint(folder, step)
    stored, params, found = opened.config, opened.params, opened.step or 0
    freezing.check_learned(stored.model, folder)
    config = load_config(gin_files, overrides, base=stored)
    if config.model != stored.model:
        raise ConfigError("--gin.Model: the model is that of the checkpoint and cannot be changed")
    evaluated = config.training.eval_rows if eval_rows is None else eval_rows
    row_sets = _row_sets(folder, config, text, rows, evaluated, log)
    batch_size = freezing.rows_at_once(config.model)
    method: Any = calibration
    calibrated = freezing.calibrate(config.model, params, row_sets[0], method, batch_size)
    frozen = freezing.frozen_config(stored)
    certificate = certificates.certify(
        config.model,
        frozen.model,
        params,
        calibrated,
        method,
        *row_sets,
        batch_size,
        kl_threshold,
    )
    kept = freezing.without_plga(params)
    if rank_budgets:
        certificate["low_rank"] = measure_budgets(
            frozen.model,
            kept,
            calibrated.g_lm,
            (batch for batch, _ in row_sets[1].batches(batch_size)),
            rank_budgets,
            row_sets[1].rows.max_segments,
        )
    files = {
        "config.gin": dump_config(frozen).encode(),
        CERTIFICATE: (json.dumps(certificate, indent=2, allow_nan=False) + "\n").encode(),
    }
    if (folder / TOKENIZER).is_file():
        files[TOKENIZER] = (folder / TOKENIZER).read_bytes()
    write_run(output, found, kept, calibrated.g_lm, config_to_dict(frozen), files)
    if save_g is not None:
        np.savez(save_g, G_LM=np.asarray(calibrated.g_lm)[:, 0])
        log(f"G_LM: {save_g}")
    lines = certificates.certificate_lines(certificate)
    log(summary_table({**lines, **budget_lines(certificate.get("low_rank", ()))}))
    if warning := certificates.invariance_warning(certificate):
        log(warning)
    log(f"frozen checkpoint of step {found}: {output}")
    return certificate


def _check_new_file(path: Path) -> None:
    """ConfigError if an NPZ file of this name cannot be written, or is there."""
    if path.suffix != ".npz":
        raise ConfigError(f"--save_g={path}: must end in .npz")
    if path.exists():
        raise ConfigError(f"--save_g={path}: is there already; name another file")
    if not path.parent.is_dir():
        raise ConfigError(f"--save_g={path}: there is no folder {path.parent}; make it first")


def _row_sets(
    folder: Path,
    config: ExperimentConfig,
    text: str | None,
    rows: int,
    eval_rows: int,
    log: Callable[[str], None],
) -> tuple["RowSet", "RowSet"]:
    """Rows to calibrate on and rows to evaluate on, of different documents where text is given."""
    from pldr_jax.data.mixture import open_training_text
    from pldr_jax.data.rows import join_rows
    from pldr_jax.data.segment_count import with_segment_count
    from pldr_jax.interop.weights import held_out_text
    from pldr_jax.model.flops import row_flops
    from pldr_jax.training.freeze.calibrate import some_rows, split_rows

    model, path = config.model, folder / TOKENIZER
    if text is None:
        training_text = held_out_text(folder, config, "--text", log)
        data = with_segment_count(config, training_text, row_flops(model), log).data
        held_out = training_text.rows("validation", model.context_length, data)
        return split_rows(join_rows(held_out), rows, eval_rows)
    if not path.is_file():
        raise ConfigError(f"--text={text}: {folder} has no {TOKENIZER} to read it with")
    cache_dir = config.data.cache_dir
    data = DataConfig(
        source=text,
        tokenizer=str(path),
        validation_fraction=0.5,
        packing=config.data.packing,
        max_segments=config.data.max_segments,
        cache_dir=cache_dir,
    )
    halves = open_training_text(data, model.vocab_size, log)
    config = dataclasses.replace(config, data=data)
    data = with_segment_count(config, halves, row_flops(model), log).data
    calibration, evaluation = (
        join_rows(halves.rows(split, model.context_length, data))
        for split in ("train", "validation")
    )
    return some_rows(calibration, rows), some_rows(evaluation, eval_rows)


def freeze_main(argv: list[str]) -> None:
    """Parses the command line and freezes."""
    options = parse_args(argv, "infer.py --freeze_g", DESCRIPTION, OPTIONS)
    keep_compiled_programs(load_config(options.gin_files, options.overrides).data.cache_dir)
    freeze(
        options.checkpoint,
        options.output,
        options.text,
        options.rows,
        options.calibration,
        options.eval_rows,
        options.step,
        rank_budgets=options.rank_budget,
        gin_files=options.gin_files,
        overrides=options.overrides,
        save_g=options.save_g,
    )
