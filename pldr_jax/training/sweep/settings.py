"""What a sweep varies, and what all of its runs have in common; imported before JAX is."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.fields import FlagGroup, field
from pldr_jax.config.load import load_run

Setting = tuple[str, str]
"""`Group.field` and the text of a value."""


@dataclasses.dataclass(frozen=True)
class SweepConfig(FlagGroup):
    """The points of a sweep."""

    sweep: tuple[str, ...] = field(
        (),
        "run every combination of the values given for some config fields, each in its own folder "
        "under --run_dir; a table, a phase diagram and curves at the end",
        metavar="Group.field=A,B,...",
    )
    sweep_zip: bool = field(False, "take the first values together, then the second, and so on")
    sweep_seeds: int | None = field(
        None, "repeat each point with this many seeds", low=1, high=10_000, metavar="N"
    )
    sweep_index: str | None = field(
        None,
        "of a job array: only run I, from 0; or I/N, every Nth run from I on",
        metavar="I",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for one in dataclasses.fields(self)[1:]:
            if not self.sweep and getattr(self, one.name) not in (None, False):
                raise ConfigError(f"--{one.name}: needs --sweep Group.field=A,B")


@dataclasses.dataclass(frozen=True)
class CriticalConfig(FlagGroup):
    """Where between two values of a field G_LM becomes invariant."""

    critical: str | None = field(
        None,
        "search a field between A and B, by bisection on a log scale, for the value at which the "
        "order parameter of G_LM falls below a threshold; it is above at A and below at B",
        metavar="Group.field=A:B",
    )
    over: tuple[str, ...] = field(
        (),
        "search anew for every combination of the values given for other fields; a table and a "
        "figure of the line at the end",
        metavar="Group.field=A,B,...",
    )
    critical_seeds: int = field(
        3, "runs of a point at most: most of them decide", low=1, high=1000, metavar="N"
    )
    critical_below: float = field(1e-3, "the threshold", above=0, metavar="X")
    critical_factor: float = field(
        1.25,
        "neighbouring values of the search differ by this factor at most",
        above=1,
        metavar="X",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for one in dataclasses.fields(self)[1:]:
            if self.critical is None and getattr(self, one.name) != one.default:
                raise ConfigError(f"--{one.name}: needs --critical Group.field=A:B")


@dataclasses.dataclass(frozen=True)
class Command:
    """What each run of a sweep is started with, besides what varies.

    Attributes:
      gin_files, overrides: for `load_run`.
      init_from: checkpoint whose weights every run begins with.
      flags: other flags of `train.py`.
    """

    gin_files: Sequence[str] = ()
    overrides: Sequence[str] = ()
    init_from: str | None = None
    flags: Sequence[str] = ()

    def config(
        self, point: Sequence[Setting], base: ExperimentConfig | None = None
    ) -> ExperimentConfig:
        """The config of a run, on top of `base`.

        Raises:
          ConfigError: a field or value that cannot be.
        """
        return load_run(self.gin_files, [*self.overrides, *overrides_of(point)], base)

    def arguments(self, overrides: Sequence[str], folder: Path) -> list[str]:
        """The command line of the process of a run."""
        shared = [*(f"--gin_file={path}" for path in self.gin_files), *self.flags]
        shared += [] if self.init_from is None else [f"--init_from={self.init_from}"]
        settings = [f"--gin.{override}" for override in (*self.overrides, *overrides)]
        program = [sys.executable, "-m", "pldr_jax.cli.training.train"]
        return [*program, *shared, *settings, f"--run_dir={folder}"]


def overrides_of(point: Sequence[Setting]) -> tuple[str, ...]:
    """The settings as texts for `load_config`."""
    return tuple(f"{key}={value}" for key, value in point)


def child_environment() -> dict[str, str]:
    """This process's environment, in which the same package is imported."""
    paths = [str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
