"""What a run folder holds besides checkpoints and metrics: written, and compared before a run goes
on.
"""

import dataclasses
import re
from pathlib import Path

from pldr_jax.config import HOW_COMPUTED, ConfigError, ExperimentConfig
from pldr_jax.files import write_whole
from pldr_jax.config.load import (describe_differences, dump_config)

SAMPLES = "samples.txt"


def check_same_model(run_dir: Path, saved: ExperimentConfig, config: ExperimentConfig) -> None:
    """ConfigError if a run cannot go on with the config; other differences are printed."""
    how = {f"Model.{name}:" for name in HOW_COMPUTED}
    changed = [
        difference
        for difference in describe_differences(saved, config, ["Model"])
        if difference.split(" ")[0] not in how  # these change how it is computed, not what
    ]
    if changed:
        raise ConfigError(
            f"{run_dir}: holds another model ({'; '.join(changed)}); "
            "take the old values or another --run_dir"
        )
    for name in ("packing", "max_segments") if config.data.packing == "packed" else ("packing",):
        if getattr(saved.data, name) != getattr(config.data, name):
            config.data.fail(
                name,
                f"the run in {run_dir} has {getattr(saved.data, name)!r}; take that, or "
                "another --run_dir",
            )
    for difference in describe_differences(saved, config):
        print(f"note: continuing with {difference}")


def with_its_segments(config: ExperimentConfig, saved: ExperimentConfig) -> ExperimentConfig:
    """The config of a run that goes on: an open `Data.max_segments` is what the run has, whatever
    its text would give now.
    """
    if config.data.packing != "packed" or config.data.max_segments is not None:
        return config
    data = dataclasses.replace(config.data, max_segments=saved.data.max_segments)
    return dataclasses.replace(config, data=data)


def check_same_tokenizer(run_dir: Path, model_bytes: bytes) -> None:
    """ConfigError if the run has another tokenizer: its ids mean nothing to the weights."""
    path = run_dir / "tokenizer.model"
    if path.is_file() and path.read_bytes() != model_bytes:
        raise ConfigError(
            f"{run_dir}: has another tokenizer than the text of Data.source gives now; "
            f"set Data.tokenizer = {str(path)!r}, or take another --run_dir"
        )


def write_run_files(
    run_dir: Path, config: ExperimentConfig, model_bytes: bytes, start: int
) -> None:
    """Writes config and tokenizer, and drops samples of steps after `start`."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "config.gin", dump_config(config).encode())
        write_whole(run_dir / "tokenizer.model", model_bytes)
        samples = run_dir / SAMPLES
        if samples.exists():
            write_whole(samples, _samples_until(samples.read_bytes(), start))
    except OSError as error:
        raise ConfigError(
            f"--run_dir={run_dir}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def append_sample(run_dir: Path, step: int, sample: str) -> None:
    """Adds the sample of an evaluation."""
    with (run_dir / SAMPLES).open("ab") as file:
        file.write(f"--- step {step}\n{sample}\n".encode())


def _samples_until(samples: bytes, last_step: int) -> bytes:
    """The samples up to `last_step`: the steps after it are trained, and sampled, again."""
    for header in re.finditer(rb"^--- step (\d+)$", samples, re.MULTILINE):
        if int(header[1]) > last_step:
            return samples[: header.start()]
    return samples
