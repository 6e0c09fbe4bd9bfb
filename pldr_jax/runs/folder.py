"""What a run folder holds beside checkpoints and metrics; run folders made of weights alone."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pldr_jax.config import HOW_COMPUTED, CheckpointConfig, ConfigError, ExperimentConfig
from pldr_jax.config.load import describe_differences, dump_config
from pldr_jax.files import TOKENIZER, append_whole, new_folder, with_digest, write_whole
from pldr_jax.model.decoder import Params
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.terminal import print_line

SAMPLES = "samples.txt"


def check_same_model(
    where: str,
    saved: ExperimentConfig,
    config: ExperimentConfig,
    remedy: str,
    may_differ: Sequence[str] = HOW_COMPUTED,
) -> None:
    """Refuses weights of another model.

    Args:
      where: the weights, for the message.
      saved: their config.
      config: of the run that is to use them.
      may_differ: fields of `ModelConfig` that change nothing here.

    Raises:
      ConfigError: names the fields.
    """
    same = {name: getattr(config.model, name) for name in may_differ}
    before = ExperimentConfig(model=dataclasses.replace(saved.model, **same))
    if changed := describe_differences(before, ExperimentConfig(model=config.model), ["Model"]):
        raise ConfigError(f"{where} another model ({'; '.join(changed)}); {remedy}")


def check_same_run(
    run_dir: Path, saved: ExperimentConfig | None, config: ExperimentConfig, tokenizer: bytes
) -> None:
    """Refuses to continue a run with another model, packing or tokenizer; other differences are
    printed.

    Args:
      saved: the config it had; None where no checkpoint says it.
      tokenizer: the model that the text gives now.

    Raises:
      ConfigError: names the fields.
    """
    if saved is not None:
        remedy = "take the old values or another --run_dir"
        check_same_model(f"{run_dir}: holds", saved, config, remedy)
        for name in ("rank", "alpha", "targets", "base_digest"):
            same = getattr(saved.lora, name) == getattr(config.lora, name)
            if not same and (name != "base_digest" or config.lora.base_digest is not None):
                config.lora.fail(
                    name,
                    f"the run in {run_dir} has {getattr(saved.lora, name)!r}; take that, or "
                    "another --run_dir",
                )
        packed = config.data.packing == "packed"
        for name in ("packing", "max_segments") if packed else ("packing",):
            if getattr(saved.data, name) != getattr(config.data, name):
                config.data.fail(
                    name,
                    f"the run in {run_dir} has {getattr(saved.data, name)!r}; take that, or "
                    "another --run_dir",
                )
        _check_same_memory(run_dir, saved, config)
        for difference in describe_differences(saved, config):
            print_line(f"note: continuing with {difference}")
    path = run_dir / TOKENIZER
    if path.is_file() and path.read_bytes() != tokenizer:
        raise ConfigError(
            f"{run_dir}: has another tokenizer than the text of Data.source gives now; "
            f"set Data.tokenizer = {str(path)!r}, or take another --run_dir"
        )


def _check_same_memory(run_dir: Path, saved: ExperimentConfig, config: ExperimentConfig) -> None:
    """ConfigError where the optimiser would remember other things than the checkpoint holds."""
    facts = {
        "name": lambda one: one.optimizer.name,
        "generator_learning_rate": lambda one: one.optimizer.generator_learning_rate is None,
        "metric_learner_weight_decay": lambda one: (
            one.optimizer.metric_learner_weight_decay is None
        ),
        "average_decay": lambda one: one.optimizer.average_decay is None,
        "freeze": lambda one: {group for group, step in one.training.freeze if step == 0},
    }
    for name, fact in facts.items():
        if fact(saved) == fact(config):
            continue
        group, before = (
            (config.training, saved.training)
            if name == "freeze"
            else (config.optimizer, saved.optimizer)
        )
        group.fail(
            name,
            f"the run in {run_dir} has {getattr(before, name)!r}, with which its optimiser "
            "remembers other things; take that, or begin another run with these weights: "
            "--init_from and another --run_dir",
        )


def write_run_files(
    run_dir: Path,
    config: ExperimentConfig,
    model_bytes: bytes,
    start: int,
    others: Mapping[str, bytes],
) -> None:
    """Writes config, tokenizer and other files by their paths, and drops samples of steps after
    `start`.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.gin", dump_config(config).encode())
        for name, content in {**with_digest(TOKENIZER, model_bytes), **others}.items():
            (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(run_dir / name, content)
        samples = run_dir / SAMPLES
        if samples.exists():
            write_whole(samples, _samples_until(samples.read_bytes(), start))
    except OSError as error:
        raise ConfigError(
            f"--run_dir={run_dir}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def append_sample(run_dir: Path, step: int, sample: str) -> None:
    """Adds the sample of an evaluation; OSError if it cannot be written."""
    with (run_dir / SAMPLES).open("ab", buffering=0) as file:
        append_whole(file, f"--- step {step}\n{sample}\n".encode(errors="backslashreplace"))


def _samples_until(samples: bytes, last_step: int) -> bytes:
    """The samples up to `last_step`: the steps after it are trained, and sampled, again."""
    for header in re.finditer(rb"^--- step (\d+)$", samples, re.MULTILINE):
        if int(header[1]) > last_step:
            return samples[: header.start()]
    return samples


def fill_run(
    folder: Path,
    step: int,
    params: Params,
    g_lm: jax.Array | None,
    config_dict: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint without optimiser state, and other files, into a folder.

    Args:
      step: of the checkpoint.
      g_lm: [L,1,N,H,J], None where it is learned or the identity.
      config_dict: the config that belongs to the parameters.
      files: contents of other files by their names.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        state = {"params": params, "g_lm": g_lm}
        checkpointer.save(step, state, {}, config_dict, {}, wait=True)
    digest = with_digest(TOKENIZER, files[TOKENIZER]) if TOKENIZER in files else {}
    for name, content in {**files, **digest}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_run(
    output: str | Path,
    step: int,
    params: Params,
    g_lm: jax.Array | None,
    config_dict: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """A new run folder of weights alone, which `pldr_jax.load` opens: all of it or nothing.

    Raises:
      ConfigError: as `new_folder`.
      CheckpointError: as `fill_run`.
    """
    with new_folder(output) as folder:
        fill_run(folder, step, params, g_lm, config_dict, files)
