"""The points of a sweep: which runs there are, and what each is called."""

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.annotations import shorten
from pldr_jax.config.load import config_to_dict, parse_values
from pldr_jax.training.sweep.settings import Setting, SweepConfig, overrides_of

SEED_FIELDS = ("Training.seed", "Data.seed")
"""Raised by 1 from one repetition of a point to the next."""
MOST_RUNS = 10_000
_NAME_LENGTH, _VALUE_LENGTH = 200, 60
"""Characters of a folder's name, and of a value in it before it is shortened."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A field and the values it takes, as texts of a command line."""

    key: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
      name: of its folder: what varies, `learning_rate=0.001,warmup_steps=200`.
      folder: its run folder.
      settings: `Group.field` -> value, of what varies.
      overrides: the same as texts of a command line, `Group.field=value`.
      config: all of it.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    overrides: tuple[str, ...]
    config: ExperimentConfig


def runs_of(
    config: SweepConfig,
    folder: Path,
    config_of: Callable[[Sequence[Setting]], ExperimentConfig],
) -> list[SweepRun]:
    """The runs of a sweep in `folder`, with their configs.

    Args:
      config_of: the config of a run by what varies.

    Raises:
      ConfigError: a field or value that cannot be, too many runs, or two that are the same.
    """
    axes = [Axis(*parse_values(text, "--sweep")) for text in config.sweep]
    keys = [axis.key for axis in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--sweep: {twice[0]} is given twice; give all its values in one")
    together = max if config.sweep_zip else math.prod
    count = together(len(axis.values) for axis in axes) * (config.sweep_seeds or 1)
    if count > MOST_RUNS:
        raise ConfigError(f"--sweep: makes {count:,} runs; at most {MOST_RUNS:,} are possible")
    points = (zipped if config.sweep_zip else grid)(axes)
    if config.sweep_seeds is not None:
        first = config_of(points[0])
        seeds = {key: value_of(first, key) for key in SEED_FIELDS}
        points = repeated(points, seeds, config.sweep_seeds)
        keys.append("Training.seed")
    return runs_at(points, keys, folder, config_of)


def runs_at(
    points: Sequence[tuple[Setting, ...]],
    keys: Sequence[str],
    folder: Path,
    config_of: Callable[[Sequence[Setting]], ExperimentConfig],
    flag: str = "--sweep",
) -> list[SweepRun]:
    """The runs at some points, in folders named by the fields `keys`; errors begin with `flag`.

    Raises:
      ConfigError: a value that cannot be, or two runs that are the same.
    """
    configs = [config_of(point) for point in points]
    settings = [{key: value_of(one, key) for key in keys} for one in configs]
    names = run_names(settings, flag)
    return [
        SweepRun(name, folder / name, values, overrides_of(point), one)
        for name, values, point, one in zip(names, settings, points, configs, strict=True)
    ]


def value_of(config: ExperimentConfig, key: str) -> Any:
    """The value of `Group.field`."""
    group, _, field = key.partition(".")
    return config_to_dict(config)[group][field]


def grid(axes: Sequence[Axis]) -> list[tuple[Setting, ...]]:
    """Every combination of values; the last axis changes fastest."""
    return list(itertools.product(*([(axis.key, v) for v in axis.values] for axis in axes)))


def zipped(axes: Sequence[Axis]) -> list[tuple[Setting, ...]]:
    """The first values of all axes, the second ones, and so on.

    Raises:
      ConfigError: the axes have different numbers of values.
    """
    if len({len(axis.values) for axis in axes}) > 1:
        lengths = ", ".join(f"{axis.key} has {len(axis.values)}" for axis in axes)
        raise ConfigError(f"--sweep_zip: all fields need as many values as the others; {lengths}")
    return list(zip(*([(axis.key, v) for v in axis.values] for axis in axes), strict=True))


def repeated(
    points: Sequence[tuple[Setting, ...]], seeds: Mapping[str, int], times: int
) -> list[tuple[Setting, ...]]:
    """Each point `times` times, with the fields of `seeds` raised by 0, 1, 2 and so on.

    Raises:
      ConfigError: a seed is swept over as well.
    """
    for key in seeds:
        if any(key == swept for point in points for swept, _ in point):
            raise ConfigError(f"--sweep_seeds: {key} is given by --sweep already; leave one out")
    shifts = [tuple((key, str(seed + k)) for key, seed in seeds.items()) for k in range(times)]
    return [(*point, *shift) for point in points for shift in shifts]


def run_names(settings: Sequence[Mapping[str, Any]], flag: str) -> list[str]:
    """A folder name for the settings of each run; errors begin with `flag`.

    Raises:
      ConfigError: two runs are the same, or would have the same folder.
    """
    keys = list(settings[0])
    names: dict[str, None] = {}
    for one in settings:
        parts = [f"{label(key, keys)}={_plain(one[key])}" for key in keys]
        name = ",".join(parts)
        if name in names:
            raise ConfigError(f"{flag}: gives {name} twice; leave one of the values out")
        if len(name) > _NAME_LENGTH:
            raise ConfigError(f"{flag}: {name[:60]}... is too long a name; sweep fewer fields")
        names[name] = None
    return list(names)


def label(key: str, keys: Sequence[str]) -> str:
    """`Optimizer.learning_rate` -> `learning_rate`; the whole key where two groups have it."""
    field = key.partition(".")[2]
    return key if [other.partition(".")[2] for other in keys].count(field) > 1 else field


def _plain(value: Any) -> str:
    """A value as a part of a file name; a long one ends with a digest of itself."""
    text = value if isinstance(value, str) else repr(value)
    name = re.sub(r"[^\w.+-]", "_", text)
    if len(name) <= _VALUE_LENGTH:
        return name
    return f"{name[: _VALUE_LENGTH - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def share(runs: Sequence[SweepRun], index: str) -> list[SweepRun]:
    """The runs of one job of an array: "3" is run 3, from 0; "3/8" is every eighth from run 3 on.

    Raises:
      ConfigError: the index is malformed or out of range.
    """
    match = re.fullmatch(r"(\d{1,9})(?:/(\d{1,9}))?", index, re.ASCII)
    if match is None:
        raise ConfigError(
            f"--sweep_index={shorten(index)}: expected I or I/N, counted from 0, as in 3 or 3/8"
        )
    first, jobs = int(match[1]), int(match[2] or len(runs))
    if first >= jobs:
        what = "jobs" if match[2] else "runs"
        raise ConfigError(f"--sweep_index={index}: there are {jobs} {what}, 0 to {jobs - 1}")
    return list(runs[first::jobs])
