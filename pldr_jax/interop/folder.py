"""The files of a folder that somebody else wrote: nothing outside of it is read, and what cannot be
used is one line.
"""

import json
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.files import file_in, read_regular_file

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp")
"""Suffixes of files that hold weights."""
_LARGEST = 32 << 20
"""Bytes of another file that is kept."""


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; ConfigError if it does not."""
    try:
        return parse_json(read_regular_file(path), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(content: bytes, where: object) -> dict[str, Any]:
    """One JSON object; ConfigError, naming `where`, if it is none."""
    try:
        raw = json.loads(content)
    except RecursionError:
        raise ConfigError(f"{where}: cannot be read as JSON (it is nested too deeply)") from None
    except ValueError as error:
        raise ConfigError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: cannot be read as JSON (it is no object)")
    return raw


def listed_file(folder: Path, name: object, where: object) -> Path:
    """A file whose name was read from another file: a plain name, and no link that leads elsewhere,
    unless to the blobs of the hub cache that the folder is a snapshot of.

    Raises:
      ConfigError: the name, or the link, leads elsewhere.
    """
    try:
        return file_in(folder, name, str(where))
    except ConfigError as error:
        if isinstance(name, str) and "/" not in name and _is_hub_link(folder / name):
            return folder / name
        raise ConfigError(f"{error}; it must be a file of the folder") from None


def other_files(folder: Path) -> dict[str, bytes]:
    """Contents of the small files of a folder that hold no weights; links are left out."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file()
        and (not file.is_symlink() or _is_hub_link(file))
        and file.suffix not in WEIGHTS
        and not file.name.startswith(".")
        and file.stat().st_size <= _LARGEST
    }


def _is_hub_link(file: Path) -> bool:
    """Whether a file is a link of `snapshots/REVISION/` to `blobs/`, as the hub cache has them."""
    snapshots = file.parent.resolve().parent
    blobs = snapshots.parent / "blobs"
    return file.is_symlink() and snapshots.name == "snapshots" and file.resolve().parent == blobs
