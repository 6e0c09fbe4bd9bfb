"""What text there is to prepare: files, globs, folders, hub datasets and Python's own sources, cut
into units of work.

A unit depends on the inputs alone, never on how many processes there are, and its shards hold its
documents and no others. So the result does not depend on the processes either, and work that was
interrupted goes on with the units that are not done.
"""

import dataclasses
import fnmatch
import glob
import math
import os
import pathlib
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path

Kind = Literal["text", "jsonl", "parquet", "arrow", "hub", "unreadable", "special"]

STDLIB, HUB = "stdlib", "hf:"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Of a file name's ending, without that of a compression; any other file is text."""

WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
"""What UTF-16 and UTF-32 text begins with."""

_DATASET_FILES = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""What stands beside the Arrow files of a saved Hugging Face dataset."""
_DATASET_CACHE = re.compile(r"(cache-|tmp).*\.arrow")
"""Files that `datasets` leaves there: results of a map or filter, not the dataset."""
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one input.

    Attributes:
      path: of a file, or NAME[:CONFIG[:SPLIT]] of a hub dataset.
      kind: how it is read; "unreadable" is a file or folder that cannot be, "special" a pipe, a
        device or a broken link.
      size: bytes of the input that it stands for, for the progress; 0 where not known.
      start, stop: bytes of an uncompressed file of lines, row groups of a Parquet file, or
        (part, parts) of a hub dataset; None is the whole.
      reason: why there is nothing to read.
    """

    path: str
    kind: Kind
    size: int
    start: int = 0
    stop: int | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some pieces that one process turns into one shard a split; numbered from 0."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for piece in self.pieces)


def needs(module: str, what: str) -> Any:
    """An optional module; ConfigError that names the extra to install where it is missing."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise ConfigError(
            f"Data.source = {what!r}: needs {module.split('.')[0]}; pip install 'pldr_jax[data]'"
        ) from None


def compression(path: str) -> str:
    """`.gz` of `a.jsonl.gz`, or nothing."""
    return next((ending for ending in COMPRESSIONS if path.lower().endswith(ending)), "")


def kind_of(path: str) -> Kind:
    """By the ending of the name."""
    bare = path.lower().removesuffix(compression(path))
    return KINDS.get(pathlib.PurePath(bare).suffix, "text")


def find_inputs(inputs: Sequence[str]) -> list[Piece]:
    """Every file behind the inputs, whole, in the order of the inputs and then of the names.

    An input is 'stdlib' (the sources of the running interpreter's library), a file, a folder
    (searched recursively, hidden files left out), a glob ('**' is recursive), or
    hf:NAME[:CONFIG[:SPLIT]]. A file that two inputs, or two links, lead to is taken once. What
    cannot be read is a piece too, so that it is counted and named.

    Raises:
      ConfigError: an input names nothing.
    """
    pieces, seen = [], set()
    for pattern in inputs:
        found = _hub(pattern) if pattern.startswith(HUB) else _files(pattern)
        if all(piece.reason for piece in found):
            reason = f"; {found[0].path}: {found[0].reason}" if found else ""
            raise ConfigError(
                f"Data.source = {pattern!r}: no text files found{reason}; name a file, folder or "
                "glob"
            )
        for piece in found:
            key = piece.path if piece.kind == "hub" else os.path.realpath(piece.path)
            if (key, piece.start) not in seen:
                seen.add((key, piece.start))
                pieces.append(piece)
    return pieces


def plan_units(pieces: Iterable[Piece], unit_bytes: int, by_line: bool) -> list[Unit]:
    """Units of about `unit_bytes`: large files in several, small ones together.

    Files of lines (JSONL; text too where `by_line`) are cut between lines and Parquet files between
    row groups; compressed and other files stay whole.
    """
    units: list[list[Piece]] = []
    unit_size = 0
    for piece in pieces:
        for part in _parts(piece, unit_bytes, by_line):
            if not units or unit_size + part.size > unit_bytes or part.kind == "hub":
                units.append([])
                unit_size = 0
            units[-1].append(part)
            unit_size += part.size
    return [Unit(number, tuple(parts)) for number, parts in enumerate(units)]


def _parts(piece: Piece, unit_bytes: int, by_line: bool) -> list[Piece]:
    n = math.ceil(piece.size / unit_bytes)
    lines = piece.kind == "jsonl" or (piece.kind == "text" and by_line)
    if n < 2 or piece.kind in ("arrow", "hub") or compression(piece.path):
        return [piece]
    if piece.kind == "parquet":
        whole = _row_groups(piece.path)
        n = min(n, whole)
    elif lines and not _is_wide(piece.path):
        whole = piece.size
    else:
        return [piece]
    if n < 2:
        return [piece]
    cuts = [whole * k // n for k in range(n + 1)]
    sizes = [piece.size * k // n for k in range(n + 1)]
    return [
        dataclasses.replace(piece, start=cuts[k], stop=cuts[k + 1], size=sizes[k + 1] - sizes[k])
        for k in range(n)
    ]


def _row_groups(path: str) -> int:
    """Row groups of a Parquet file; 0 of one that cannot be opened, which its reader will name."""
    parquet = needs("pyarrow.parquet", path)
    try:
        return int(parquet.ParquetFile(path).num_row_groups)
    except (OSError, ValueError):  # of ValueError pyarrow derives ArrowInvalid
        return 0


def _is_wide(path: str) -> bool:
    """Whether a text file is UTF-16 or UTF-32, where a newline is not one byte."""
    try:
        with open(path, "rb") as file:
            return file.read(4).startswith(WIDE_MARKS)
    except OSError:
        return True  # it stays whole, and its reader names it


def _files(pattern: str) -> list[Piece]:
    errors: list[OSError] = []
    if pattern == STDLIB:
        root = sysconfig.get_path("stdlib")
        paths = [path for path in _below(root, errors, _STDLIB_LEFT_OUT) if path.endswith(".py")]
    else:
        path = readable_path(pattern, "Data.source")
        if path.is_dir():
            paths = list(_below(str(path), errors))
        elif os.path.lexists(path):
            paths = [str(path)]
        else:
            first, *rest = path.parts if path.is_absolute() else (".", *path.parts)
            matches = set(_expand(first, rest, errors))
            paths = [match for match in matches if not os.path.isdir(match)]
    pieces = [_piece(path) for path in sorted(map(pathlib.Path, paths))]
    return pieces + [
        Piece(str(error.filename), "unreadable", 0, reason=str(error.strerror)) for error in errors
    ]


def _piece(path: pathlib.Path) -> Piece:
    try:
        status = path.stat()
    except FileNotFoundError:
        return Piece(path.as_posix(), "special", 0, reason="a link to a file that is not there")
    except OSError as error:
        return Piece(path.as_posix(), "unreadable", 0, reason=str(error.strerror))
    if not stat.S_ISREG(status.st_mode):
        return Piece(path.as_posix(), "special", 0, reason="not a regular file")
    return Piece(path.as_posix(), kind_of(path.name), status.st_size)


def _below(root: str, errors: list[OSError], left_out: Iterable[str] = ()) -> Iterator[str]:
    """The files under a folder that are not hidden and no by-products."""
    for folder, names in _folders(root, errors, left_out):
        is_dataset = not _DATASET_FILES.isdisjoint(names)
        for name in names:
            by_product = name in _DATASET_FILES or (is_dataset and _DATASET_CACHE.fullmatch(name))
            if name[0] != "." and not by_product:
                yield os.path.join(folder, name)


def _folders(
    root: str, errors: list[OSError], left_out: Iterable[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those under it, each with the names of its files.

    Links are followed, but each folder comes once, whatever leads to it, and a link to a folder
    that it lies in leads nowhere.
    """
    seen = {os.path.realpath(root)}
    for folder, below, names in os.walk(root, onerror=errors.append, followlinks=True):
        here, new = os.path.realpath(folder), []
        for name in sorted(below):
            target = os.path.realpath(os.path.join(folder, name))
            hidden = name[0] == "." or name == "__pycache__" or name in left_out
            if hidden or target in seen or os.path.commonpath([here, target]) == target:
                continue
            seen.add(target)
            new.append(name)
        below[:] = new
        yield folder, names


def _expand(folder: str, parts: Sequence[str], errors: list[OSError]) -> Iterator[str]:
    """Paths under a folder that match the parts of a glob."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        for below, _ in _folders(folder, errors):
            yield from _expand(below, rest or ("*",), errors)
    elif not glob.has_magic(first):
        path = os.path.join(folder, first)
        if os.path.lexists(path):
            yield from _expand(path, rest, errors)
    elif os.path.isdir(folder):
        try:
            names = os.listdir(folder)
        except OSError as error:
            errors.append(error)
            return
        is_dataset = not _DATASET_FILES.isdisjoint(names)
        for name in fnmatch.filter(names, first):
            by_product = is_dataset and _DATASET_CACHE.fullmatch(name)
            if not by_product and (name[0] != "." or first[0] == "."):
                yield from _expand(os.path.join(folder, name), rest, errors)


def _hub(pattern: str) -> list[Piece]:
    name = pattern.removeprefix(HUB)
    parts = open_hub(name).num_shards
    return [Piece(name, "hub", 0, part, parts) for part in range(parts)]


def open_hub(name: str) -> Any:
    """The streamed Hugging Face dataset NAME[:CONFIG[:SPLIT]]; the split is `train` unless given.

    Raises:
      ConfigError: without the `datasets` package or the network, or if there is no such dataset.
    """
    datasets = needs("datasets", HUB + name)
    path, config, split = (*name.split(":"), "", "")[:3]
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"Data.source = {HUB + name!r}: cannot be streamed; is there a network, and such a "
            f"dataset? ({type(error).__name__}: {reason})"
        ) from None
