"""Sweeps: many runs of one config that differ in a few values, each a process of its own.

A sweep folder holds a folder for each run, named by what varies, then `sweep.csv`, `phase.png` and
`curves.png`.
A run is its own process, so that a crash, or memory that runs out, ends that run and no other. What
it prints is kept in `log.txt` of its folder.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.runs.checksums import complete_steps
from pldr_jax.runs.metrics import FILE_NAME, read_metrics
from pldr_jax.terminal import duration
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import StopRequest

LOG = "log.txt"
FAILED = "failed.txt"
"""Why the last try of a run failed; in its folder, so that every job of an array can report it."""
SEED_FIELDS = ("Training.seed", "Data.seed")
"""Raised by 1 from one repetition of a point to the next."""

Status = Literal["finished", "failed", "unfinished"]
Setting = tuple[str, str]
"""`Group.field` and the text of a value."""
_POLL_SECONDS = 0.2
_NAME_LENGTH = 200


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


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run stands: its status, the last evaluation in its record, and why it failed."""

    run: SweepRun
    status: Status
    evaluation: Mapping[str, Any]
    error: str = ""


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


def run_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder name for the settings of each run.

    Raises:
      ConfigError: two runs are the same, or would have the same folder.
    """
    keys = list(settings[0])
    names: list[str] = []
    for one in settings:
        parts = [f"{label(key, keys)}={_plain(one[key])}" for key in keys]
        name = ",".join(parts)
        if name in names:
            raise ConfigError(f"--sweep: gives {name} twice; leave one of the values out")
        if len(name) > _NAME_LENGTH:
            raise ConfigError(f"--sweep: {name[:60]}... is too long a name; sweep fewer fields")
        names.append(name)
    return names


def label(key: str, keys: Sequence[str]) -> str:
    """`Optimizer.learning_rate` -> `learning_rate`; the whole key where two groups have it."""
    field = key.partition(".")[2]
    return key if [other.partition(".")[2] for other in keys].count(field) > 1 else field


def _plain(value: Any) -> str:
    """A value as a part of a file name."""
    text = value if isinstance(value, str) else repr(value)
    return re.sub(r"[^\w.+-]", "_", text)


def share(runs: Sequence[SweepRun], index: str) -> list[SweepRun]:
    """The runs of one job of an array: "3" is run 3, from 0; "3/8" is every eighth from run 3 on.

    Raises:
      ConfigError: the index is malformed or out of range.
    """
    match = re.fullmatch(r"(\d+)(?:/(\d+))?", index)
    if match is None:
        raise ConfigError(
            f"--sweep_index={index}: expected I or I/N, counted from 0, as in 3 or 3/8"
        )
    first, jobs = int(match[1]), int(match[2] or len(runs))
    if first >= jobs:
        what = "jobs" if match[2] else "runs"
        raise ConfigError(f"--sweep_index={index}: there are {jobs} {what}, 0 to {jobs - 1}")
    return list(runs[first::jobs])


def last_evaluation(folder: Path) -> dict[str, Any]:
    """The newest row of evaluation in the record of a run; empty where there is none.

    Raises:
      MetricsError: the record cannot be read.
    """
    if not (folder / FILE_NAME).is_file():
        return {}
    rows = [row for row in read_metrics(folder) if "eval/loss" in row]
    return rows[-1] if rows else {}


def outcome(run: SweepRun) -> Outcome:
    """How the run stands, from its folder: finished where its last step is evaluated and saved."""
    evaluation = last_evaluation(run.folder)
    steps = run.config.training.steps
    done = evaluation.get("step") == steps and steps in complete_steps(run.folder / "checkpoints")
    if done:
        return Outcome(run, "finished", evaluation)
    failed = run.folder / FAILED
    error = failed.read_text(encoding="utf-8").strip() if failed.is_file() else ""
    return Outcome(run, "failed" if error else "unfinished", evaluation, error)


def execute(
    runs: Sequence[SweepRun],
    command: Callable[[SweepRun], Sequence[str]],
    environment: Mapping[str, str],
    progress: SweepProgress,
    stop: StopRequest,
) -> dict[str, str]:
    """Runs one after the other what is not finished; a run that fails does not stop the rest.

    Args:
      runs: in order.
      command: the arguments of the process of a run.
      environment: of the processes.
      progress: is told how far each is.
      stop: when set, the run at work is asked to save and stop, and no other is started.

    Returns:
      Name -> reason, of the runs that failed.
    """
    failures: dict[str, str] = {}
    for number, run in enumerate(runs):
        if stop.signal_name is not None:
            break
        if outcome(run).status == "finished":
            progress.finish(number, run.name, "finished before, skipped")
            continue
        begun = time.monotonic()
        resumed = complete_steps(run.folder / "checkpoints")
        progress.start(number, run.name, f"resumed at step {resumed[-1]}" if resumed else "started")
        with _Process(run, command(run), environment) as process:
            while (status := process.poll()) is None:
                for line in process.new_lines():
                    progress.echo(line)
                if stop.signal_name is not None:
                    process.ask_to_stop()
                time.sleep(_POLL_SECONDS)
            lines = process.all_lines()
        after = outcome(run)
        if after.status == "finished":
            report = f"finished in {duration(time.monotonic() - begun)}: {_brief(after.evaluation)}"
        elif stop.signal_name is not None:
            report = f"stopped by {stop.signal_name}"
        else:
            failures[run.name] = _reason(status, lines)
            (run.folder / FAILED).write_text(failures[run.name] + "\n", encoding="utf-8")
            report = f"failed: {failures[run.name]}"
        progress.finish(number, run.name, report)
    return failures


class _Process:
    """The process of a run, whose output goes to `log.txt`; stopped when the block is left."""

    def __init__(
        self, run: SweepRun, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / FAILED).unlink(missing_ok=True)
        self._path = run.folder / LOG
        self._start = self._read = self._path.stat().st_size if self._path.exists() else 0
        self._asked = False
        with self._path.open("ab") as log:
            # A session of its own: Ctrl-C reaches it once, through ask_to_stop.
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """SIGTERM, once: a second one would end it without saving."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    def new_lines(self) -> Iterator[str]:
        """Whole lines since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            text, newline, _ = file.read().rpartition(b"\n")
        self._read += len(text) + len(newline)
        yield from (line for line in text.decode(errors="replace").splitlines() if line.strip())

    def all_lines(self) -> list[str]:
        """Every line of this process."""
        with self._path.open("rb") as file:
            file.seek(self._start)
            lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()]

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                self._process.terminate()
            self._process.wait()


def _reason(status: int, lines: Sequence[str]) -> str:
    """Why a process failed, from its status and what it printed: one line."""
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    errors = [line for line in lines if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else lines[-1].strip() if lines else ""
    if status == 0 and not errors:
        return "it ended before its last step"
    return f"{said} ({how})" if said else how


def _brief(evaluation: Mapping[str, Any]) -> str:
    """The numbers of a finished run in a line."""
    names = {
        "held-out loss": "eval/loss",
        "causal gap": "eval/causal_gap",
        "order parameter of G_LM": "eval/order_parameter/G_LM",
    }
    shown = {"held-out loss": ".4f", "causal gap": "+.5f", "order parameter of G_LM": ".1e"}
    values = {name: evaluation.get(metric) for name, metric in names.items()}
    return ", ".join(
        f"{name} {value:{shown[name]}}" for name, value in values.items() if value is not None
    )


def child_environment(package_parent: Path) -> dict[str, str]:
    """This process's environment, in which the same package is imported."""
    paths = [str(package_parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
