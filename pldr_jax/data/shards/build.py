"""Preparing text: inputs to a folder of shards and a manifest, by several processes.

Work goes on in `OUTPUT.building`, unit by unit; what an interruption leaves there is continued by
the same command. The output folder appears when all is done, complete, in one step. Nothing in it
depends on the number of processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.prepared import MANIFEST, SPLITS, Manifest, read_manifest
from pldr_jax.data.shards.progress import BuildProgress
from pldr_jax.data.shards.records import DataError, Shard
from pldr_jax.data.shards.units import Report, UnitSettings, save_result, write_unit
from pldr_jax.data.text import inputs
from pldr_jax.data.text.inputs import Unit
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """What to prepare, how, and where to.

    Attributes:
      inputs: files, folders, globs, hf:NAME.
      output: a folder that does not exist yet.
      tokenizer: SentencePiece model file.
      units: how documents become shards.
      unit_bytes: input that becomes one shard.
      workers: processes.
    """

    inputs: tuple[str, ...]
    output: str
    tokenizer: str
    units: UnitSettings = UnitSettings()
    unit_bytes: int = 64 << 20
    workers: int = 1


def build(settings: BuildSettings, log: Log = print) -> Manifest:
    """Prepares the text, or goes on where an interruption left it.

    Raises:
      ConfigError: an input, the tokenizer or the output cannot be used.
      DataError: a document cannot be used and `on_error` is "fail"; what was done before stays.
    """
    tokenizer = Tokenizer.load(settings.tokenizer)
    if tokenizer.eos_id < 0:
        raise ConfigError(
            f"--tokenizer={settings.tokenizer}: has no end piece to close documents with"
        )
    pieces = inputs.find(settings.inputs)
    units = inputs.plan(pieces, settings.unit_bytes, settings.units.read.documents == "line")
    stated = {
        "inputs": [[piece.path, piece.size, piece.start] for piece in pieces],
        "unit_bytes": settings.unit_bytes,
        **dataclasses.asdict(settings.units),
    }
    key = json.dumps([stated, tokenizer.digest], sort_keys=True)
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    output = pathlib.Path(settings.output).expanduser()
    if output.exists():
        return _already_there(output, fingerprint, log)
    work = output.with_name(output.name + ".building")
    with _locked(work):
        _check_same_work(work, fingerprint)
        results = _build_units(work, settings, units, tokenizer, log)
        manifest = Manifest(
            folder=output,
            settings=stated,
            fingerprint=fingerprint,
            tokenizer_digest=tokenizer.digest,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            dtype=_dtype(tokenizer),
            problems=_total([result["problems"] for result in results]),
            splits={
                split: tuple(
                    Shard(**result["splits"][split])
                    for result in results
                    if split in result["splits"]
                )
                for split in SPLITS
            },
        )
        if not any(manifest.count(split, "n_documents") for split in SPLITS):
            raise ConfigError("--input: holds no document with text; `problems` says why")
        tokenizer.save(work / "data" / TOKENIZER)
        (work / "data" / MANIFEST).write_bytes(manifest.dump())
        os.replace(work / "data", output)
    shutil.rmtree(work, ignore_errors=True)
    return read_manifest(output, "--output")


def _dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _total(counts: list[dict[str, int]]) -> dict[str, int]:
    kinds = sorted({kind for count in counts for kind in count})
    return {kind: sum(count.get(kind, 0) for count in counts) for kind in kinds}


def _already_there(output: pathlib.Path, fingerprint: str, log: Log) -> Manifest:
    if (output / MANIFEST).is_file():
        manifest = read_manifest(output, "--output")
        if manifest.fingerprint == fingerprint:
            log(f"{output} is already there, made of the same inputs and settings")
            return manifest
    raise ConfigError(f"--output={output}: is already there and something else; name another")


@contextlib.contextmanager
def _locked(work: pathlib.Path) -> Iterator[None]:
    """The work folder, made where needed, for this process alone."""
    try:
        (work / "data").mkdir(parents=True, exist_ok=True)
        (work / "units").mkdir(exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"--output: {work} cannot be written to ({error.strerror}); name another folder"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--output: another process is at work in {work}") from None
        with (work / "workers").open("w") as workers:
            fcntl.flock(workers, fcntl.LOCK_EX)  # waits for those whose parent was just killed
        yield


def _check_same_work(work: pathlib.Path, fingerprint: str) -> None:
    state = work / "fingerprint"
    if state.is_file() and state.read_text() != fingerprint:
        raise ConfigError(
            f"--output: {work} holds unfinished work on other inputs or settings; remove it, or "
            "name another --output"
        )
    state.write_text(fingerprint)


def _build_units(
    work: pathlib.Path, settings: BuildSettings, units: list[Unit], tokenizer: Tokenizer, log: Log
) -> list[dict[str, Any]]:
    """The results of all units, in their order; done ones are not done again."""
    paths = {unit.number: work / "units" / f"{unit.number:06d}.json" for unit in units}
    todo = [unit for unit in units if not paths[unit.number].is_file()]
    total, left = (sum(unit.size for unit in some) for some in (units, todo))
    if len(todo) < len(units):
        log(f"continuing: {len(units) - len(todo)} of {len(units)} shards are done")
    job = _Job(work, settings.units, tokenizer.model_bytes)
    with BuildProgress(total, total - left) as progress:
        if settings.workers == 1 or len(todo) < 2:
            for unit in todo:
                job.run(unit, progress.add)
        else:
            _run_parallel(job, todo, min(settings.workers, len(todo)), progress)
        log(progress.text())
    return [json.loads(path.read_text()) for path in paths.values()]


@dataclasses.dataclass
class _Job:
    """What every unit of a preparation needs; pickled once for each process."""

    work: pathlib.Path
    settings: UnitSettings
    model_bytes: bytes

    def run(self, unit: Unit, report: Report) -> None:
        tokenizer = _tokenizer(self.model_bytes)
        dtype = _dtype(tokenizer)
        folder = self.work / "data"
        result = write_unit(unit, folder, self.settings, tokenizer, dtype, report)
        save_result(self.work / "units" / f"{unit.number:06d}.json", result)


_process: dict[str, Any] = {}
"""Of a worker: its job, the queue of its reports, and the lock that it holds while it lives."""


def _tokenizer(model_bytes: bytes) -> Tokenizer:
    return _process.setdefault("tokenizer", {}).setdefault(model_bytes, Tokenizer(model_bytes))


def _start_worker(job: _Job, reports: Any, parent: int) -> None:
    workers = (job.work / "workers").open("w")
    fcntl.flock(workers, fcntl.LOCK_SH)
    _process.update(job=job, reports=reports, workers=workers)
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


def _run_parallel(job: _Job, units: list[Unit], workers: int, progress: BuildProgress) -> None:
    """Runs units in processes of their own; the first failure ends the others."""
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
            with contextlib.suppress(queue.Empty):
                while True:
                    progress.add(*reports.get_nowait())
    except BrokenProcessPool:
        raise DataError(
            "a process was killed, perhaps for want of memory; the same command with fewer "
            "--workers goes on where it stopped"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while True:
                progress.add(*reports.get(timeout=0.05))
        reports.close()
