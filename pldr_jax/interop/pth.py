"""Files that torch writes: `.pth` state dicts, and pickled lists of tensors. Nothing that is
pickled in them is executed.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError

_STATES = (("model_state_dict",), ("app", "model"), ("model",), ("state_dict",), ())
"""Where a file keeps the tensors: in a release, a distributed checkpoint made one file, or bare."""
_WRAPPED = re.compile(r"^((_orig_mod|module)\.)+")
"""What compiled and data-parallel models put before every name."""


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a file of torch.

    Raises:
      ConfigError: torch is not installed, or the file holds more than tensors and plain values, or
        no state dict.
    """
    torch = _torch(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None
    for keys in _STATES:
        state: Any = stored
        for key in keys:
            state = state.get(key) if isinstance(state, Mapping) else None
        if isinstance(state, Mapping) and any(isinstance(x, torch.Tensor) for x in state.values()):
            break
    else:
        raise ConfigError(
            f"{path}: holds no 'model_state_dict', nor is it one; give a PLDR-LLM's .pth"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
    return {
        _WRAPPED.sub("", str(name)): _to_numpy(torch, tensor, f"{path}: {name!r}")
        for name, tensor in state.items()
    }


def refuse_distributed(folder: Path) -> None:
    """ConfigError, with the conversion to run, for a distributed checkpoint of torch (DCP)."""
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        raise ConfigError(
            f"{folder}: is a distributed checkpoint of torch; make one file of it with python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} model.pth, and "
            "import that"
        )


def read_pickled_g_lm(path: Path) -> np.ndarray:
    """G_LM [L,N,H,J] of a pickle of tensors in lists, as the native code keeps it: one tensor, or
    one a layer, each [N,H,J] or A, A_LM and G_LM of that shape; axes of length 1 are dropped.

    Raises:
      ConfigError: torch is not installed, or the file holds anything but tensors in lists.
    """
    torch = _torch(path)
    try:
        stored = _Reader(io.BytesIO(path.read_bytes()), torch).load()
    except Exception as error:
        raise ConfigError(f"{path}: {_problem(error)}") from None
    arrays = _arrays(torch, stored, str(path))
    found = [] if isinstance(arrays, np.ndarray) and not arrays.ndim else list(map(_layer, arrays))
    layers = [layer for layer in found if layer is not None]
    if len(layers) < len(found) or len({layer.shape for layer in layers}) != 1:
        raise ConfigError(f"{path}: holds no G_LM [L,N,H,H], nor a list of one a layer")
    return np.stack(layers).astype(np.float32)


def _layer(value: Any) -> np.ndarray | None:
    """G_LM [N,H,J] of one layer; None where it is not that."""
    while True:
        if isinstance(value, np.ndarray) and value.ndim > 3:
            value = list(value)
        if not (isinstance(value, list) and len(value) in (1, 3)):
            break
        value = value[-1]  # of a batch of one, or of A, A_LM and G_LM
    matrix = isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[1] == value.shape[2]
    return value if matrix else None


class _Reader(pickle.Unpickler):
    """A pickle reader that knows tensors and nothing else: no other function is ever called."""

    def __init__(self, file: io.BytesIO, torch: Any) -> None:
        super().__init__(file)
        self._torch = torch

    def find_class(self, module: str, name: str) -> Any:
        torch = self._torch
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("collections", "OrderedDict"): dict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return known[module, name]

    def _storage(self, content: bytes) -> Any:
        return self._torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _arrays(torch: Any, value: Any, where: str) -> Any:
    """The same nested lists, with NumPy's arrays for tensors."""
    if isinstance(value, torch.Tensor):
        return _to_numpy(torch, value, where)
    if isinstance(value, (list, tuple)):
        return [_arrays(torch, item, where) for item in value]
    raise ConfigError(f"{where}: holds a {type(value).__name__}; only tensors in lists are read")


def _torch(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"{path}: is read with torch, which is not installed; pip install 'pldr_jax[torch]'"
        ) from None
    return torch


def _problem(error: Exception) -> str:
    """What is wrong with a file; torch's own messages tell how to run the code in it."""
    text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)|class (\S+)", text):
        return (
            f"would run code ({found[1] or found[2]}) to be read, which was not done; ask for "
            "safetensors, or for the state dict alone"
        )
    reason = "" if "weights_only" in text or not text else f" ({text.splitlines()[0][:200]})"
    return f"cannot be read, it is damaged or no file of tensors{reason}"


def _to_numpy(torch: Any, tensor: Any, where: str) -> np.ndarray:
    import ml_dtypes

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(f"{where} has the dtype {dtype}; make it bfloat16 or float32") from None
