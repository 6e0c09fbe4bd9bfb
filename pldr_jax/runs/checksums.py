"""Sizes and checksums of the files of each checkpoint, since Orbax does not notice flipped bytes.

When a save is complete, `manifests/<step>.json` is written next to the step folders. It is removed
after its step, so that it never vouches for other files. A checkpoint whose run was killed before
the manifest was written has none, and is only checked for its structure.
"""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pldr_jax.files import write_whole
import jax
import numpy as np
from jax.experimental import multihost_utils

ITEMS = ("state", "data", "config")
"""The folders that every step folder holds."""


Log = Callable[[str], None]
"""Takes one line of text."""

Parts = tuple[Any, Any, Any]
"""What is read from a step folder."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one line with the remedy."""


def complete_steps(folder: Path) -> list[int]:
    """Complete checkpoints; a temporary folder's name is no number."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()
    )


def _path(folder: Path, step: int) -> Path:
    return folder / "manifests" / f"{step}.json"


def read_manifest(folder: Path, step: int) -> dict[str, list[int]] | None:
    """File -> size and crc32; None where there is no manifest that can be read."""
    try:
        return json.loads(_path(folder, step).read_bytes())
    except (OSError, ValueError):
        return None


def write_manifest(folder: Path, step: int) -> None:
    """Records the files of a checkpoint that is complete."""
    where = folder / str(step)
    files = [path for path in where.rglob("*") if path.is_file() and path.parent.name != "metrics"]
    manifest = {str(p.relative_to(where)): [p.stat().st_size, _crc32(p)] for p in sorted(files)}
    path = _path(folder, step)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(manifest).encode())


def remove_orphans(folder: Path) -> None:
    """Removes manifests of steps that are gone, and half-written ones."""
    kept = {f"{step}.json" for step in complete_steps(folder)}
    for path in (folder / "manifests").glob("*"):
        if path.name not in kept:
            path.unlink()


def find_damage(folder: Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint; None where nothing is."""
    where = folder / str(step)
    for item in ITEMS:
        if not (where / item).is_dir():
            return f"{item} is missing"
    for name, (size, crc32) in (read_manifest(folder, step) or {}).items():
        path = where / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _crc32(path) != crc32:
            return f"{name} has changed since it was written"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def newest_whole(
    folder: Path, step: int | None, read: Callable[[Path], Parts], log: Log
) -> tuple[int, Parts]:
    """The newest step whose folder is whole, or `step`, and what `read` makes of its folder.

    Raises:
      CheckpointError: there is none, or `read` fails although the folder is whole.
    """
    steps = complete_steps(folder)
    if not steps:
        raise CheckpointError(
            f"{folder}: no complete checkpoint;"
            " train in this folder first, or give another --run_dir"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    damage = []
    for candidate in reversed(steps) if step is None else [step]:
        where = folder / str(candidate)
        reason = find_damage(folder, candidate) if jax.process_index() == 0 else None
        whole, cause = _on_all_processes(reason is None), None
        if whole:
            try:
                parts = read(where.absolute())
            except Exception as error:
                reason, cause = one_line(error), error
            if _on_all_processes(reason is None):
                return candidate, parts
        reason = reason or "another process cannot read it"
        if whole and read_manifest(folder, candidate) and not find_damage(folder, candidate):
            raise CheckpointError(
                f"{where}: is undamaged but cannot be used ({reason});"
                " continue with the configuration that it was saved with"
            ) from cause
        damage.append(f"step {candidate}: {reason}")
        if step is None and jax.process_index() == 0:
            log(f"{where}: damaged checkpoint of step {candidate} is passed over: {reason}")
    raise CheckpointError(
        f"{folder}: no checkpoint can be read ({damage[0]});"
        " put back a copy of the folder, or train anew with another --run_dir"
    )


def _on_all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def one_line(error: Exception) -> str:
    """The first line of what an error says, not too long."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
