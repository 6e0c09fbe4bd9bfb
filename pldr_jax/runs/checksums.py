"""Sizes and checksums of the files of each checkpoint, since Orbax does not notice flipped bytes.

When a save is complete, `manifests/<step>.json` is written next to the step folders. It is removed
after its step, so that it never vouches for other files. A checkpoint whose run was killed before
the manifest was written has none: it is only checked for its structure, and that is said.
"""

import contextlib
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pldr_jax.config import ConfigError, UnavailableError
from pldr_jax.files import one_line, read_regular_file, write_whole

ITEMS = ("state", "data", "config")
"""The folders that every step folder holds."""

BEST_METRIC = "eval/loss"
"""The metric whose lowest value `Checkpoint.keep_best` keeps."""

Log = Callable[[str], None]
"""Takes one line of text."""

Parts = tuple[Any, Any, Any]
"""What is read from a step folder."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one line with the remedy."""


def complete_steps(folder: Path) -> list[int]:
    """Complete checkpoints: folders whose name is a step, and nothing else that lies there.

    Raises:
      CheckpointError: the folder cannot be read.
    """
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,18}", name))


def _path(folder: Path, step: int) -> Path:
    return folder / "manifests" / f"{step}.json"


def read_manifest(folder: Path, step: int) -> dict[str, list[int]] | None:
    """File -> size and crc32; None where there is no manifest that can be read."""
    try:
        manifest = json.loads(read_regular_file(_path(folder, step)))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not manifest:
        return None
    for name, entry in manifest.items():
        inside = not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
        pair = isinstance(entry, list) and [type(number) for number in entry] == [int, int]
        if not (inside and pair):
            return None
    return manifest


def write_manifest(folder: Path, step: int) -> None:
    """Records the files of a checkpoint that is complete."""
    where = folder / str(step)
    files = [path for path in where.rglob("*") if path.is_file() and path.parent.name != "metrics"]
    manifest = {str(p.relative_to(where)): [p.stat().st_size, _crc32(p)] for p in sorted(files)}
    path = _path(folder, step)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(manifest).encode())


def remove_orphans(folder: Path) -> None:
    """Removes manifests of steps that are gone, and half-written ones; nothing else."""
    kept = {f"{step}.json" for step in complete_steps(folder)}
    for path in (folder / "manifests").glob("*.json"):
        if re.fullmatch(r"\d+\.json|\.\d+\.\d+\.tmp\.json", path.name) and path.name not in kept:
            with contextlib.suppress(OSError):
                path.unlink()


def find_damage(folder: Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint; None where nothing is."""
    where = folder / str(step)
    for item in ITEMS:
        if not (where / item).is_dir():
            return f"{item} is missing"
    for name, (size, crc32) in (read_manifest(folder, step) or {}).items():
        path = where / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _crc32(path) != crc32:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _why_not(folder: Path, step: int, fetch: Callable[[int], None] | None) -> str | None:
    """Why a step cannot be fetched or is damaged; None where nothing is known against it.

    Raises:
      UnavailableError: the store does not answer, which says nothing of the step.
    """
    try:
        if fetch is not None:
            fetch(step)
        whole_here = fetch is None and jax.process_index() != 0  # the first process has looked
        return None if whole_here else find_damage(folder, step)
    except UnavailableError:
        raise
    except ConfigError as error:
        return str(error)


def newest_whole(
    folder: Path,
    step: int | None,
    read: Callable[[Path], Parts],
    log: Log,
    fetch: Callable[[int], None] | None = None,
) -> tuple[int, Parts]:
    """The newest step whose folder is whole, or `step`, and what `read` makes of its folder.

    Args:
      fetch: puts the files of a step into the folder, which each process then has for itself.

    Raises:
      CheckpointError: there is none, or `read` fails although the folder is whole.
      UnavailableError: `fetch` gets no answer.
    """
    steps = complete_steps(folder)
    if not steps:
        raise CheckpointError(
            f"{folder}: no complete checkpoint; train in this folder first, or name another one"
        )
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{folder}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}"
        )
    damage = []
    for candidate in reversed(steps) if step is None else [step]:
        where = folder / str(candidate)
        reason = _why_not(folder, candidate, fetch)
        whole, cause = _on_all_processes(reason is None), None
        if whole:
            try:
                parts = read(where.absolute())
            except Exception as error:
                reason, cause = one_line(error), error
            if _on_all_processes(reason is None):
                if jax.process_index() == 0 and read_manifest(folder, candidate) is None:
                    log(
                        f"{where}: its files are unchecked: {_path(folder, candidate)} is missing "
                        "or damaged"
                    )
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


def check_fits(stored_tree: Any, abstract_state: Any) -> None:
    """ValueError where names, shapes or dtypes differ: Orbax drops and casts without a word."""
    stored = {leaf.name: f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(stored_tree)}
    wanted = {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(abstract_state)
    }
    for name in {**wanted, **stored}:
        there, here = stored.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise ValueError(f"{name} is {there} in it and {here} in this run")


def readable_metrics(folder: Path) -> bool:
    """Whether the metrics are absent or can be used."""
    try:
        return math.isfinite(json.loads((folder / "metrics" / "metrics").read_bytes())[BEST_METRIC])
    except FileNotFoundError:
        return not (folder / "metrics").exists()
    except (ValueError, KeyError, TypeError):
        return False


def _on_all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))
