"""Metrics of a run: `metrics.jsonl` is the record; TensorBoard and Weights & Biases get copies.

A row is one JSON object on one line, `{"step": 10, "time": 1735689600.0, "train/loss": 2.5}`.
Numbers that are not finite are null. After a run was resumed the file has neither gaps nor repeats.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_jax.files import write_whole

FILE_NAME = "metrics.jsonl"


class MetricsError(RuntimeError):
    """Metrics that cannot be recorded; the message is one line with the remedy."""


class MetricWriter:
    """Appends rows to the record of a run.

    Args:
      run_dir: the folder of the run, made if it does not exist.
      tensorboard: also write event files, where tensorboardX is installed.
      resume_step: the step that the run continues from; rows of later steps, left by the run that
        was stopped, are removed. None: a new run, which must not have a record yet.
      enabled: False writes nothing, for the processes other than the first.
      wandb_project: also send the rows to this project of Weights & Biases.

    Raises:
      MetricsError: `resume_step` is None and there is a record, or wandb is asked for and missing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool,
        resume_step: int | None,
        enabled: bool = True,
        wandb_project: str | None = None,
    ) -> None:
        self._file: Any = None
        self._events: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        path = Path(run_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None and path.exists() and path.stat().st_size:
            raise MetricsError(
                f"{path}: is of an earlier run; resume that, or give another --run_dir"
            )
        if resume_step is not None:
            _truncate(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            self._events = _event_writer(path.parent, resume_step)
        if wandb_project is not None:
            self._wandb = _wandb_run(path.parent, wandb_project)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row; values are numbers or arrays of one number."""
        if self._file is None:
            return
        now, values = time.time(), {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(
            json.dumps({"step": int(step), "time": now, **row}, allow_nan=False) + "\n"
        )
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, int(step), walltime=now)
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def close(self) -> None:
        """Closes the files; what is written later is lost."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a record in the order of the file; a last line that is half written is left out.

    `path` is the file or the folder of the run.

    Raises:
      MetricsError: there is no such file, or another line than the last cannot be read.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise MetricsError(f"{path}:{number}: is no row of metrics; remove the line") from None
        rows.append(row)
    return rows


def _truncate(path: Path, last_step: int) -> None:
    """Removes rows after `last_step` and a half-written line, all at once or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def _event_writer(folder: Path, resume_step: int | None) -> Any:
    """The TensorBoard writer; None, with a note, where tensorboardX is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print(
            f"no TensorBoard files: pip install tensorboardX ({FILE_NAME} has all metrics)",
            file=sys.stderr,
        )
        return None
    purge_step = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step, flush_secs=10)


def _wandb_run(folder: Path, project: str) -> Any:
    """The run of Weights & Biases that belongs to a run folder, new or continued."""
    try:
        import wandb
    except ImportError:
        raise MetricsError(
            f"Training.wandb_project = {project!r}: needs wandb; install it with "
            "pip install 'pldr_jax[wandb]', or leave the field out"
        ) from None
    name = folder.resolve().name
    # Its own id would be another one after a restart.
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=name, id=run_id, resume="allow", dir=str(folder))
