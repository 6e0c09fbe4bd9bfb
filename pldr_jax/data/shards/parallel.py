"""Units of work, in this process or in several."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import queue
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pldr_jax.data.shards.progress import BuildProgress
from pldr_jax.data.shards.records import DataError
from pldr_jax.data.shards.units import Report, UnitSettings, write_unit
from pldr_jax.data.text.inputs import Unit
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import write_whole


@dataclasses.dataclass
class Job:
    """What every unit of a preparation needs; pickled once for each process."""

    work: pathlib.Path
    settings: UnitSettings
    model_bytes: bytes

    def result_path(self, unit: Unit) -> pathlib.Path:
        """The file whose presence says that a unit is done, and what its shards hold."""
        return self.work / "units" / f"{unit.number:06d}.json"

    def run(self, unit: Unit, report: Report) -> None:
        """Writes the shards of a unit, then its result, all at once."""
        tokenizer = _process.setdefault(self.model_bytes, Tokenizer(self.model_bytes))
        data = self.work / "data"
        result = write_unit(unit, data, self.settings, tokenizer, report)
        write_whole(self.result_path(unit), json.dumps(result).encode())


_process: dict[Any, Any] = {}
"""What a process keeps from one unit to the next: its tokenizer; a worker's job and reports."""


def run_units(job: Job, units: Sequence[Unit], workers: int, progress: BuildProgress) -> None:
    """Runs units, in processes of their own where there are to be several; the first failure ends
    the others.

    Raises:
      DataError: a document that cannot be used, or a process that was killed.
    """
    if workers < 2:
        for unit in units:
            job.run(unit, progress.add)
        return
    # Not fork: the parent may hold threads, of the progress bar or of JAX.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, reports, os.getpid()))
    try:
        pending = {pool.submit(_run_in_worker, unit) for unit in units}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            _pass_on(reports, progress, 0)
    except BrokenProcessPool:
        raise DataError(
            "a process was killed, perhaps for want of memory; the same command with fewer "
            "--workers goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _pass_on(reports, progress, 0.05)
        reports.close()


def _pass_on(reports: Any, progress: BuildProgress, timeout: float) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            progress.add(*(reports.get(timeout=timeout) if timeout else reports.get_nowait()))


def _start_worker(job: Job, reports: Any, parent: int) -> None:
    _process.update(job=job, reports=reports)
    # Ctrl-C reaches every process of the terminal: what is begun is finished, and kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent, of that process id, was killed: perhaps already."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run_in_worker(unit: Unit) -> None:
    reports = _process["reports"]
    _process["job"].run(unit, lambda *counts: reports.put(counts))
