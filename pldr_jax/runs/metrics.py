"""Metrics of a run: `metrics.jsonl` is the record; TensorBoard and Weights & Biases get copies.

A row is one JSON object on one line, `{"step": 10, "time": 1735689600.0, "train/loss": 2.5}`.
Numbers that are not finite are null. After a run was resumed the file has neither gaps nor repeats.
"""

import contextlib
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pldr_jax.files import append_whole, one_line, read_regular_file, write_whole
from pldr_jax.terminal import print_line

FILE_NAME = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"
FLUSH_SECONDS = 10.0
"""Between writes of TensorBoard events to disk."""


class MetricsError(RuntimeError):
    """Metrics that cannot be recorded; the message is one line with the remedy."""


class MetricWriter:
    """Appends rows to the record of a run. A context manager.

    Args:
      run_dir: the folder of the run, made if it does not exist.
      tensorboard: also write event files, where tensorboardX is installed.
      resume_step: the step that the run continues from; rows of later steps, left by the run that
        was stopped, are removed. None: a new run, which must not have a record yet.
      enabled: False writes nothing, for the processes other than the first.
      wandb_project: also send the rows to this project of Weights & Biases.
      config: of the run, for Weights & Biases.

    Raises:
      MetricsError: `resume_step` is None and there is a record, wandb is asked for and missing, or
        the folder cannot be written to.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool,
        resume_step: int | None,
        enabled: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._file: BinaryIO | None = None
        self._events: _Events | None = None
        self._wandb: Any = None
        self._path = path = Path(run_dir) / FILE_NAME
        if not enabled:
            return
        with self._reporting():
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None and path.exists() and path.stat().st_size:
                raise MetricsError(
                    f"{path}: is of an earlier run; resume that, or give another --run_dir"
                )
            if resume_step is not None:
                _truncate(path, resume_step)
            self._file = path.open("ab", buffering=0)
            if tensorboard:
                self._events = _open_events(path.parent / "tensorboard", resume_step)
            if wandb_project is not None:
                self._wandb = _wandb_run(path.parent, wandb_project, config or {})

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row; values are numbers or arrays of one number.

        Raises:
          MetricsError: it cannot be written; what was written before stays.
        """
        if self._file is None:
            return
        now, values = time.time(), {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": int(step), "time": now, **row}, allow_nan=False) + "\n"
        with self._reporting():
            append_whole(self._file, line.encode())
            if self._events is not None:
                self._events.write(int(step), values)
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

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MetricsError(
                f"{error.filename or self._path}: cannot be written ({error.strerror}); see to the "
                "free space, the permissions of the folder and the limit of open files "
                "(ulimit -n), then start the run again: it goes on from its last checkpoint"
            ) from None

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
        lines = read_regular_file(path).split(b"\n")
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = _problem(row)
        except (ValueError, RecursionError):
            problem = "is no row of metrics"
            if number == len(lines):
                break
        if problem is not None:
            raise MetricsError(f"{path}:{number}: {problem}; remove the line")
        rows.append(row)
    return rows


def _problem(row: object) -> str | None:
    """What is wrong with a row, if anything is."""
    if not isinstance(row, dict):
        return "is no row of metrics"
    if type(row.get("step")) is not int or row["step"] < 0:
        return f"step is {row.get('step')!r:.40} and no step number"
    for name, value in row.items():
        if value is not None and type(value) not in (int, float):
            return f"{name!r:.80} is {value!r:.40} and no number"
        if type(value) is int and abs(value) > 2**63:
            return f"{name!r:.80} is too large"
    return None


def _truncate(path: Path, last_step: int) -> None:
    """Removes rows after `last_step` and a half-written line, all at once or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= last_step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class _Events:
    """An event file of TensorBoard, written by the thread that logs: tensorboardX's own writer has
    a thread whose errors nobody sees.

    Args:
      resume_step: TensorBoard leaves out what older files have of later steps; None is nothing.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        import tensorboardX  # noqa: F401
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        folder.mkdir(exist_ok=True)
        self._protos, self._scalar, self._flushed = event_pb2, scalar, 0.0
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordWriter(str(folder / name))
        self._add(file_version="brain.Event:2")
        if resume_step is not None:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers of a step; OSError if that fails, or if it failed before."""
        for name, value in values.items():
            self._add(step=step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with contextlib.suppress(OSError):  # of a copy, at the end
            self._file.flush()
            self._file.close()

    def _add(self, **fields: Any) -> None:
        event = self._protos.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())


def _open_events(folder: Path, resume_step: int | None) -> _Events | None:
    """The TensorBoard writer; None, with a note, where tensorboardX is not installed."""
    try:
        return _Events(folder, resume_step)
    except ImportError:
        print_line(
            f"no TensorBoard files: pip install tensorboardX ({FILE_NAME} has all metrics)",
            to_stderr=True,
        )
        return None


def _wandb_run(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    """The run of Weights & Biases that belongs to a run folder, new or continued."""
    try:
        import wandb
    except ImportError:
        raise MetricsError(
            f"Training.wandb_project = {project!r}: needs wandb; install it with "
            "pip install 'pldr_jax[wandb]', or leave the field out"
        ) from None
    # Of the run, wherever its folder is moved; a new run in the same place is another one.
    path = folder / WANDB_ID
    run_id = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch("[0-9a-f]{16}", run_id):
        run_id = uuid.uuid4().hex[:16]
        write_whole(path, run_id.encode())
    try:
        return wandb.init(
            project=project,
            name=folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
    except Exception as error:
        raise MetricsError(
            f"Training.wandb_project = {project!r}: Weights & Biases cannot be used "
            f"({one_line(error)}); log in, set WANDB_MODE=offline, or leave the field out"
        ) from None
