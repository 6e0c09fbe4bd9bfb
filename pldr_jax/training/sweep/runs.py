"""Runs of a sweep, each a process of its own, and how they stand.

A run is its own process, so that a crash, or memory that runs out, ends that run and no other. What
it prints is kept in `log.txt` of its folder.
"""

import contextlib
import dataclasses
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pldr_jax.runs.checksums import complete_steps
from pldr_jax.runs.metrics import FILE_NAME, read_metrics
from pldr_jax.terminal import duration
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import StopRequest
from pldr_jax.training.sweep.points import SweepRun
from pldr_jax.training.sweep.settings import child_environment

LOG = "log.txt"
FAILED = "failed.txt"
"""Why the last try of a run failed; in its folder, so that every job of an array can report it."""

Status = Literal["finished", "failed", "unfinished"]
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run stands: its status, the last evaluation in its record, and why it failed."""

    run: SweepRun
    status: Status
    evaluation: Mapping[str, Any]
    error: str = ""


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
    runs: Iterable[SweepRun],
    arguments: Callable[[SweepRun], Sequence[str]],
    progress: SweepProgress,
    stop: StopRequest,
) -> dict[str, str]:
    """Runs one after the other what is not finished; a run that fails does not stop the rest.

    Args:
      runs: in order; one is asked for when those before it are over.
      arguments: the command line of the process of a run.
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
        with _Process(run, arguments(run)) as process:
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

    def __init__(self, run: SweepRun, arguments: Sequence[str]) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / FAILED).unlink(missing_ok=True)
        self._path = run.folder / LOG
        self._start = self._read = self._path.stat().st_size if self._path.exists() else 0
        self._asked = False
        with self._path.open("ab") as log:
            # A session of its own: Ctrl-C reaches it once, through ask_to_stop.
            self._process = subprocess.Popen(
                list(arguments),
                env=child_environment(),
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
    metrics = {
        "held-out loss": ("eval/loss", ".4f"),
        "causal gap": ("eval/causal_gap", "+.5f"),
        "order parameter of G_LM": ("eval/order_parameter/G_LM", ".1e"),
    }
    return ", ".join(
        f"{name} {evaluation[metric]:{form}}"
        for name, (metric, form) in metrics.items()
        if isinstance(evaluation.get(metric), (int, float))
    )
