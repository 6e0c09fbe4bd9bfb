"""Files of tensors: safetensors, one or several with an index, and torch's `.pth`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.interop.config_json import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STATE = "model_state_dict"
"""Where a native `.pth` keeps the tensors."""


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Tensors by name, and how they lay in files.

    Attributes:
      tensors: float32, or another dtype that the files have.
      files: names of the tensors in each file.
      metadata: of the safetensors files.
    """

    tensors: dict[str, np.ndarray]
    files: dict[str, list[str]]
    metadata: dict[str, str]


def read_folder(folder: Path) -> TensorFiles:
    """The tensors of `model.safetensors`, or of the files that the index names.

    Raises:
      ConfigError: a file is missing or cannot be read, or file and index disagree.
    """
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        tensors, metadata = _read_file(folder / SINGLE)
        return TensorFiles(tensors, {SINGLE: list(tensors)}, metadata)
    where = folder / INDEX
    named = read_json(where).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ConfigError(f"{where}: has no weight_map")
    files: dict[str, list[str]] = {}
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{where}: {name!r} is in {file!r}: must be a file of the folder")
        files.setdefault(file, []).append(name)
    tensors = {}
    for file, names in files.items():
        found, metadata = _read_file(folder / file)
        for name in names:
            if name not in found:
                raise ConfigError(f"{folder / file}: the tensor {name!r} of the index is missing")
        for name in found:
            if name not in names:
                raise ConfigError(f"{folder / file}: the tensor {name!r} is not in the index")
        tensors |= found
    return TensorFiles(tensors, files, metadata)


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read, it may be truncated ({error})") from error


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


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The `model_state_dict` of a native `.pth`. Nothing that is pickled in it is executed.

    Raises:
      ConfigError: torch is not installed, or the file holds more than tensors and plain values, or
        no such dict.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path}: is read with torch, which is not installed; pip install 'pldr_jax[torch]'"
        ) from None
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ConfigError(
            f"{path}: cannot be read as weights alone, it is damaged or would run code ({reason})"
        ) from None
    state = stored.get(STATE) if isinstance(stored, Mapping) else None
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path}: holds no {STATE!r}; give the .pth of a PLDR-LLM release")
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
    return {str(name): _to_numpy(torch, tensor) for name, tensor in state.items()}


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
