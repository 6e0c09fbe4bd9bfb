"""Safetensors: one file, or several with an index."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.interop.folder import listed_file, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


class StoredTensor:
    """A tensor of a file that stays open: what is not asked for is not read."""

    def __init__(self, part: Any) -> None:
        self._part = part
        self.shape: tuple[int, ...] = tuple(part.get_shape())
        self.dtype: np.dtype = np.dtype(part[tuple(slice(0, 0) for _ in self.shape)].dtype)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The values between bounds on every axis."""
        return self._part[index]


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Tensors by name, and how they lay in files.

    Attributes:
      tensors: float32, or another dtype that the files have; arrays, or `StoredTensor`s.
      files: names of the tensors in each file.
      metadata: of the safetensors files.
    """

    tensors: dict[str, Any]
    files: dict[str, list[str]]
    metadata: dict[str, str]


def read_folder(folder: Path, in_parts: bool = False) -> TensorFiles:
    """The tensors of `model.safetensors`, or of the files that the index names.

    Args:
      in_parts: opens them only, as `StoredTensor`s.

    Raises:
      ConfigError: a file is missing or cannot be read, or file and index disagree.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        tensors, metadata = read_safetensors(folder / SINGLE, in_parts)
        return TensorFiles(tensors, {SINGLE: list(tensors)}, metadata)
    where = folder / INDEX
    named = read_json(where).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"{where}: has no weight_map")
    files: dict[str, list[str]] = {}
    for name, file in named.items():
        listed_file(folder, file, f"{where}: {name!r}")
        files.setdefault(file, []).append(name)
    tensors = {}
    for file, names in files.items():
        found, metadata = read_safetensors(folder / file, in_parts)
        for name in names:
            if name not in found:
                raise ConfigError(f"{folder / file}: the tensor {name!r} of the index is missing")
        for name in found:
            if name not in names:
                raise ConfigError(f"{folder / file}: the tensor {name!r} is not in the index")
        tensors |= found
    return TensorFiles(tensors, files, metadata)


def read_safetensors(path: Path, in_parts: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of one file; `in_parts` as in `read_folder`.

    Raises:
      ConfigError: there is none, it cannot be read, or has a dtype that NumPy lacks.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            tensors = {
                # A tensor without axes has no parts.
                name: StoredTensor(file.get_slice(name))
                if in_parts and file.get_slice(name).get_shape()
                else file.get_tensor(name)
                for name, dtype in dtypes.items()
                if dtype in _DTYPES
            }
            metadata = file.metadata() or {}
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: cannot be read, it may be truncated ({reason})") from None
    for name, dtype in dtypes.items():
        if name not in tensors:
            raise ConfigError(f"{path}: {name!r} is {dtype}; make it bfloat16 or float32")
    return tensors, metadata


def write_folder(folder: Path, content: TensorFiles) -> None:
    """Writes safetensors files, with an index where they are several."""
    from safetensors.numpy import save_file

    for file, names in content.files.items():
        chosen = {name: content.tensors[name] for name in names}
        save_file(chosen, folder / file, content.metadata or None)
    if list(content.files) == [SINGLE]:
        return
    total = sum(tensor.nbytes for tensor in content.tensors.values())
    placed = {name: file for file, names in content.files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
