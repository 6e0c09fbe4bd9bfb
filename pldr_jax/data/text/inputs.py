"""What text there is to prepare: files, globs, folders and hub datasets, cut into units of work.

A unit depends on the inputs alone, never on how many processes there are, and its shards hold its
documents and no others. So the result does not depend on the processes either, and work that was
interrupted goes on with the units that are not done.
"""

import dataclasses
import glob
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pldr_jax.config import ConfigError

Kind = Literal["text", "jsonl", "parquet", "arrow", "hub"]

HUB = "hf:"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Of a file name's ending, without that of a compression; any other file is text."""

_DATASET_FILES = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""What stands beside the Arrow files of a saved Hugging Face dataset."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one input.

    Attributes:
      path: of a file, or NAME[:CONFIG[:SPLIT]] of a hub dataset.
      kind: how it is read.
      size: bytes of the input that it stands for, for the progress; 0 where not known.
      start, stop: bytes of an uncompressed file of lines, row groups of a Parquet file, or
        (part, parts) of a hub dataset; None is the whole.
    """

    path: str
    kind: Kind
    size: int
    start: int = 0
    stop: int | None = None


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
            f"--input={what}: needs {module.split('.')[0]}; pip install 'pldr_jax[data]'"
        ) from None


def compression(path: str) -> str:
    """`.gz` of `a.jsonl.gz`, or nothing."""
    return next((ending for ending in COMPRESSIONS if path.lower().endswith(ending)), "")


def kind_of(path: str) -> Kind:
    """By the ending of the name."""
    bare = path.lower().removesuffix(compression(path))
    return KINDS.get(pathlib.PurePath(bare).suffix, "text")


def find(inputs: Sequence[str]) -> list[Piece]:
    """Every file behind the inputs, whole, in the order of the inputs and then of the names.

    An input is a file, a folder (searched recursively, hidden files left out), a glob ('**' is
    recursive), or hf:NAME[:CONFIG[:SPLIT]]. A file that two inputs name is taken once.

    Raises:
      ConfigError: an input names nothing, or what cannot be read.
    """
    pieces, seen = [], set()
    for pattern in inputs:
        found = _hub(pattern) if pattern.startswith(HUB) else _files(pattern)
        if not found:
            raise ConfigError(f"--input={pattern}: no such file, folder or glob")
        for piece in found:
            key = piece.path if piece.kind == "hub" else os.path.realpath(piece.path)
            if (key, piece.start) not in seen:
                seen.add((key, piece.start))
                pieces.append(piece)
    return pieces


def plan(pieces: Iterable[Piece], unit_bytes: int, by_line: bool) -> list[Unit]:
    """Units of about `unit_bytes`: large files in several, small ones together.

    Files of lines (JSONL; text too where `by_line`) are cut between lines and Parquet files between
    row groups; compressed and other files stay whole.
    """
    units: list[list[Piece]] = []
    filling = 0
    for piece in pieces:
        for part in _parts(piece, unit_bytes, by_line):
            if not units or filling + part.size > unit_bytes or part.kind == "hub":
                units.append([])
                filling = 0
            units[-1].append(part)
            filling += part.size
    return [Unit(number, tuple(parts)) for number, parts in enumerate(units)]


def _parts(piece: Piece, unit_bytes: int, by_line: bool) -> list[Piece]:
    n = math.ceil(piece.size / unit_bytes)
    lines = piece.kind == "jsonl" or (piece.kind == "text" and by_line)
    if n < 2 or piece.kind in ("arrow", "hub") or compression(piece.path):
        return [piece]
    if piece.kind == "parquet":
        groups = needs("pyarrow.parquet", piece.path).ParquetFile(piece.path).num_row_groups
        n, whole = min(n, groups), groups
    elif lines:
        whole = piece.size
    else:
        return [piece]
    cuts = [whole * k // n for k in range(n + 1)]
    sizes = [piece.size * k // n for k in range(n + 1)]
    return [
        dataclasses.replace(piece, start=cuts[k], stop=cuts[k + 1], size=sizes[k + 1] - sizes[k])
        for k in range(n)
    ]


def _files(pattern: str) -> list[Piece]:
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
        paths = [
            pathlib.Path(folder, name)
            for folder, name in _walk(path)
            if name[0] != "." and name not in _DATASET_FILES
        ]
    elif path.is_file():
        paths = [path]
    else:
        paths = [pathlib.Path(match) for match in glob.glob(str(path), recursive=True)]
    try:
        return [
            Piece(p.as_posix(), kind_of(p.name), p.stat().st_size)
            for p in sorted(paths)
            if p.is_file()
        ]
    except OSError as error:
        raise ConfigError(f"--input={pattern}: cannot be read ({error.strerror})") from None


def _walk(root: pathlib.Path) -> Iterable[tuple[str, str]]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in names:
            yield folder, name


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
            f"--input={HUB}{name}: cannot be streamed; is there a network, and such a dataset? "
            f"({type(error).__name__}: {reason})"
        ) from None
