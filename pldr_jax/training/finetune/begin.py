"""Fine-tuning: a run that begins with the weights of a checkpoint, and nothing else of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from pldr_jax.config import (
    HOW_BEGUN,
    HOW_COMPUTED,
    CheckpointConfig,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    TaskConfig,
)
from pldr_jax.config.load import config_from_dict, load_config, load_mesh
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER
from pldr_jax.interop.config_json import BACKBONE, model_from_json
from pldr_jax.interop.folder import read_json
from pldr_jax.interop.record import inherited_files
from pldr_jax.interop.transformers import CONFIG
from pldr_jax.interop.weights import Checkpoint, check_base, open_checkpoint
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.lora import digest_of
from pldr_jax.partition import build_mesh
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.runs.folder import check_same_model
from pldr_jax.runs.hub import find_checkpoint
from pldr_jax.terminal import print_line
from pldr_jax.training.step import InitialWeights


def model_of(init_from: str | Path) -> ModelConfig:
    """The model of a checkpoint, whose weights are not read.

    Raises:
      ConfigError: the folder holds none.
    """
    folder = find_checkpoint(init_from, "--init_from").folder
    if (folder / CONFIG).is_file():
        return model_from_json(read_json(folder / CONFIG), folder / CONFIG)
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        stored = checkpointer.read_config()
    if stored is None:
        raise ConfigError(f"--init_from={init_from}: holds no complete checkpoint")
    return config_from_dict(stored, str(folder)).model


def start_from(
    init_from: str | Path,
    run_dir: Path,
    gin_files: Sequence[str | Path],
    overrides: Sequence[str],
    on_mesh: bool = True,
) -> tuple[ExperimentConfig, InitialWeights | None]:
    """The config, and the weights, unless the run goes on from a checkpoint of its own.

    The model is that of the checkpoint, and so is the tokenizer; everything else is what files and
    flags say. The weights come to the mesh of the run, each in its parts; to the default device
    without `on_mesh`.

    Raises:
      ConfigError: they say another model, or the checkpoint has no tokenizer and they name none.
      CheckpointError: the checkpoint cannot be read.
    """
    mesh = build_mesh(load_mesh(gin_files, overrides)) if on_mesh else None
    with Checkpointer(run_dir, CheckpointConfig()) as checkpointer:
        stored = checkpointer.read_config() if checkpointer.latest_step() is not None else None
    if stored is not None:
        saved = config_from_dict(stored, str(run_dir))
        config = load_config(gin_files, overrides, _base(saved))
        config = _with_tokenizer(config, saved.data.tokenizer, run_dir / TOKENIZER)
        if saved.lora.rank and config.lora.rank:  # its checkpoints do not hold the base
            step = saved.lora.base_step
            opened = open_checkpoint(init_from, step, "--init_from", tasks=True, mesh=mesh)
            check_base(saved.lora, opened, f"--init_from={init_from}", run_dir)
            return _with_base(config, opened), InitialWeights(opened.params, opened.g_lm)
        print_line(
            f"--init_from={init_from}: not read again, {run_dir} goes on from its own checkpoint"
        )
        return config, None
    opened = open_checkpoint(init_from, flag="--init_from", tasks=True, mesh=mesh)
    config = load_config(gin_files, overrides, _base(opened.config))
    params = opened.params
    # No weight depends on them.
    may_differ: tuple[str, ...] = ("context_length", "pad_id", *HOW_BEGUN, *HOW_COMPUTED)
    if config.task.kind is not None and opened.config.model.task is None:
        params = {name: tree for name, tree in params.items() if name != "head"}
        may_differ = ("task", "num_labels", *may_differ)
    check_same_model(
        f"--init_from={init_from}: is",
        opened.config,
        config,
        "leave out what the checkpoint says, or take another one",
        may_differ,
    )
    config = _checked_tokenizer(config, opened.folder)
    _announce(init_from, opened, config)
    if config.lora.rank:
        if "head" not in opened.params and config.task.kind is None:
            config.lora.fail("rank", f"adapters train no head, and a {BACKBONE} has none; take 0")
        config = _with_base(config, opened)
    files = inherited_files(opened.folder, opened.origin)
    return config, InitialWeights(params, opened.g_lm, files)


def _announce(init_from: str | Path, opened: Checkpoint, config: ExperimentConfig) -> None:
    layout = "transformers layout" if opened.step is None else f"step {opened.step}"
    print_line(
        f"weights of {init_from} ({layout}): {count_params(config.model):,} parameters, G_LM "
        f"{config.model.g_source}; optimiser, schedule and data begin anew"
    )
    if "head" not in opened.params:
        print_line(f"{init_from} is a {BACKBONE}, without a head: a new one is drawn")


def _base(config: ExperimentConfig) -> ExperimentConfig:
    """The defaults, with the model of a checkpoint and the names of its task's labels."""
    task = TaskConfig(labels=config.task.labels)
    return dataclasses.replace(ExperimentConfig(), model=config.model, task=task)


def _with_base(config: ExperimentConfig, opened: Checkpoint) -> ExperimentConfig:
    """The config, saying which weights its adapters belong to."""
    lora = dataclasses.replace(
        config.lora,
        base=opened.name,
        base_step=opened.step,
        base_digest=digest_of(opened.params, opened.g_lm),
    )
    return dataclasses.replace(config, lora=lora)


def _with_tokenizer(config: ExperimentConfig, saved: str | None, copy: Path) -> ExperimentConfig:
    """The tokenizer that the run began with, from its own copy where the first is gone."""
    if config.data.tokenizer is not None:
        return config
    path = saved if saved is not None and Path(saved).is_file() else str(copy)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=path))


def _checked_tokenizer(config: ExperimentConfig, folder: Path) -> ExperimentConfig:
    path, named = folder / TOKENIZER, config.data.tokenizer
    if not path.is_file():
        if named is None:
            raise ConfigError(
                f"--init_from={folder}: has no {TOKENIZER}, and a new one would give its ids other "
                "meanings; name the model's own with --gin.Data.tokenizer=PATH"
            )
        return config
    if named is None:
        data = dataclasses.replace(config.data, tokenizer=str(path))
        return dataclasses.replace(config, data=data)

    if Tokenizer.load(named).digest != Tokenizer.load(path).digest:
        raise ConfigError(f"Data.tokenizer = {named!r}: is another one than {path}; leave it out")
    return config
