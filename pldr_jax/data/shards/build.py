"""Preparing text: inputs to a folder of shards and a manifest, by several processes.

Work goes on in `OUTPUT.building`, unit by unit; what an interruption leaves there is continued by
the same command. The output folder appears when all is done, complete, in one step. Nothing in it
depends on the number of processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.parallel import Job, run_units
from pldr_jax.data.shards.prepared import MANIFEST, SPLITS, Manifest, read_prepared
from pldr_jax.data.shards.progress import BuildProgress
from pldr_jax.data.shards.records import Shard
from pldr_jax.data.shards.units import UnitSettings, describe_problems
from pldr_jax.data.text.chat import template_file
from pldr_jax.data.text.inputs import Piece, Unit, plan_units
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import LOCK, TOKENIZER, TOKENIZER_CONFIG, locked, move_into_place

Log = Callable[[str], None]

WORTH_A_PROCESS = 16 << 20
"""Bytes of input for each process that is started: to start it takes as long as to prepare them."""


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """How text is prepared.

    Attributes:
      units: how documents become shards.
      unit_bytes: input that becomes one shard.
      workers: processes; None is one a core, and as few as small text is worth.
    """

    units: UnitSettings = UnitSettings()
    unit_bytes: int = 64 << 20
    workers: int | None = None

    def plan(self, pieces: Sequence[Piece]) -> list[Unit]:
        """The units of work of some inputs."""
        return plan_units(pieces, self.unit_bytes, self.units.read.documents == "line")


def build(
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    output: pathlib.Path,
    settings: BuildSettings,
    log: Log = print,
) -> Manifest:
    """Prepares text in a new folder, or goes on where an interruption left it.

    Raises:
      ConfigError: an input, the tokenizer or the output cannot be used.
      DataError: a document cannot be used and `on_error` is "fail"; what was done before stays.
    """
    inputs = [[piece.path, piece.size, piece.start] for piece in pieces]
    if output.exists():
        fingerprint = _fingerprint(_stated(inputs, settings), tokenizer)
        if (output / MANIFEST).is_file():
            manifest = read_prepared(output, "--output")
            if manifest.fingerprint == fingerprint:
                log(f"{output} is already there, made of the same inputs and settings")
                return manifest
        raise ConfigError(f"--output={output}: is already there and something else; name another")
    with work_folder(output, "--output") as work:
        return build_in(work, pieces, tokenizer, output, settings, inputs, log)


@contextlib.contextmanager
def work_folder(output: pathlib.Path, flag: str, wait: bool = False) -> Iterator[pathlib.Path]:
    """The folder of the unfinished work, for this process alone; what nothing was done in goes.

    Args:
      wait: for another process that is at work there, instead of an error.
    """
    work = output.with_name(output.name + ".building")
    try:
        with locked(work, flag, wait=wait):
            (work / "units").mkdir(exist_ok=True)
            try:
                yield work
            finally:
                if output.exists() or not any((work / "units").glob("*.json")):
                    _empty(work)
    except OSError as error:
        raise ConfigError(
            f"{flag}={output}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def _empty(work: pathlib.Path) -> None:
    """Removes all but the lock, with which the folder goes."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


def build_in(
    work: pathlib.Path,
    pieces: Sequence[Piece],
    tokenizer: Tokenizer,
    output: pathlib.Path,
    settings: BuildSettings,
    inputs: Any,
    log: Log,
) -> Manifest:
    """`build`, in a work folder that is held.

    Args:
      inputs: names the text, fit for JSON.
    """
    if tokenizer.eos_id < 0:
        raise ConfigError("Data.tokenizer: has no end piece to close documents with")
    stated = _stated(inputs, settings)
    fingerprint = _fingerprint(stated, tokenizer)
    state = work / "fingerprint"
    if state.is_file() and state.read_text() != fingerprint:
        raise ConfigError(
            f"--output: {work} holds unfinished work on other inputs or settings; remove it, or "
            "name another --output"
        )
    state.write_text(fingerprint)
    data = work / "data"
    data.mkdir(exist_ok=True)
    results = _build_units(work, settings, settings.plan(pieces), tokenizer, log)
    manifest = Manifest(
        folder=output,
        settings=stated,
        fingerprint=fingerprint,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype=settings.units.dtype(tokenizer),
        problems=_total([result["problems"] for result in results]),
        examples={k: v for result in reversed(results) for k, v in result["examples"].items()},
        splits={
            split: tuple(
                Shard(**result["splits"][split]) for result in results if split in result["splits"]
            )
            for split in SPLITS
        },
    )
    problems = describe_problems(manifest.problems, manifest.examples)
    if not any(manifest.count(split, "n_documents") for split in SPLITS):
        _empty(work)
        raise ConfigError("; ".join(["Data.source: holds no document with text", *problems]))
    for line in problems:
        log(line)
    _remove_temporary_files(data)
    tokenizer.save(data / TOKENIZER)
    if settings.units.read.chat is not None:
        template = template_file(settings.units.read.chat.template)
        (data / TOKENIZER_CONFIG).write_bytes(template)
    (data / MANIFEST).write_bytes(manifest.dump())
    move_into_place(data, output)
    return read_prepared(output, "--output")


def _stated(inputs: Any, settings: BuildSettings) -> dict[str, Any]:
    units = dataclasses.asdict(settings.units)
    if settings.units.read.chat is None:  # of text, the fingerprint is that of older versions
        del units["read"]["chat"]
    return {"inputs": inputs, "unit_bytes": settings.unit_bytes, **units}


def _fingerprint(stated: dict[str, Any], tokenizer: Tokenizer) -> str:
    key = json.dumps([stated, tokenizer.digest], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()


def _total(counts: list[dict[str, int]]) -> dict[str, int]:
    kinds = sorted({kind for count in counts for kind in count})
    return {kind: sum(count.get(kind, 0) for count in counts) for kind in kinds}


def _remove_temporary_files(data: pathlib.Path) -> None:
    """What killed processes left."""
    for path in data.glob(".*"):
        path.unlink(missing_ok=True)


def _build_units(
    work: pathlib.Path, settings: BuildSettings, units: list[Unit], tokenizer: Tokenizer, log: Log
) -> list[dict[str, Any]]:
    """The results of all units, in their order; done ones are not done again."""
    job = Job(work, settings.units, tokenizer.model_bytes)
    todo = [unit for unit in units if not job.result_path(unit).is_file()]
    total, left = (sum(unit.size for unit in some) for some in (units, todo))
    if len(todo) < len(units):
        log(f"continuing: {len(units) - len(todo)} of {len(units)} shards are done")
    workers = settings.workers
    if workers is None:
        workers = min(os.cpu_count() or 1, left // WORTH_A_PROCESS if left else len(todo))
    with BuildProgress(total, total - left) as progress:
        run_units(job, todo, min(workers, len(todo)), progress)
        log(progress.text())
    return [json.loads(job.result_path(unit).read_text()) for unit in units]
