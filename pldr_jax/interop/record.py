"""What an imported run folder keeps of its source, so that exporting it gives the same files back.

Parameters here are float32 and stacked. The record in the folder `transformers/` says what that
loses: dtypes, the split into files, `decoder.past_G_values` whole, and every other small file.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from pldr_jax.config import ConfigError
from pldr_jax.interop.config_json import read_json
from pldr_jax.interop.tensors import INDEX, TensorFiles
from pldr_jax.interop.transformers import G_STATUS, G_VALUES

_FOLDER = "transformers"
_LAYOUT, _G = "layout.json", "past_g_values.safetensors"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".h5", ".msgpack", ".gguf", ".onnx")
_LARGEST = 32 << 20
"""Bytes of another file that is kept."""


@dataclasses.dataclass(frozen=True)
class Record:
    """The source of an import.

    Attributes:
      name: of its folder or file.
      files, metadata: of `TensorFiles`; no files where it was a `.pth`.
      dtypes: of the tensors that are not float32.
      g_tensors: `past_G_values` and its status, where the source had them.
      others: contents of its other files, by their names.
    """

    name: str
    files: dict[str, list[str]]
    metadata: dict[str, str]
    dtypes: dict[str, str]
    g_tensors: dict[str, np.ndarray]
    others: dict[str, bytes]

    def restored(self, tensors: Mapping[str, np.ndarray]) -> TensorFiles | None:
        """Tensors of ours as they were in the source; None if they are not those."""
        restored = dict(tensors)
        for name, kept in self.g_tensors.items():
            if name in restored and _plane(restored[name]) != _plane(kept):
                return None
            restored[name] = kept
        for name, dtype in self.dtypes.items():
            if name not in restored:
                return None
            cast = restored[name].astype(_dtype(dtype))
            if cast.astype(restored[name].dtype).tobytes() != restored[name].tobytes():
                return None
            restored[name] = cast
        named = {name for names in self.files.values() for name in names}
        if named and named != set(restored):
            return None
        return TensorFiles(restored, self.files, self.metadata)


def make_record(source: TensorFiles, path: Path, leave_out: Sequence[str] = ()) -> Record:
    """The record of a source, a folder or a `.pth`, without the files of some names."""
    left_out = (INDEX, "README.md", *leave_out)
    others = {
        file.name: file.read_bytes()
        for file in (sorted(path.iterdir()) if path.is_dir() else [])
        if file.is_file()
        and file.suffix not in _WEIGHTS
        and file.name not in left_out
        and not file.name.startswith(".")
        and file.stat().st_size <= _LARGEST
    }
    tensors = source.tensors
    return Record(
        name=path.resolve().name,
        files=source.files,
        metadata=source.metadata,
        dtypes={
            name: str(tensor.dtype)
            for name, tensor in tensors.items()
            if tensor.dtype != np.float32 and name not in (G_VALUES, G_STATUS)
        },
        g_tensors={name: tensors[name] for name in (G_VALUES, G_STATUS) if name in tensors},
        others=others,
    )


def record_files(record: Record) -> dict[str, bytes]:
    """The files of a record, by their paths in a run folder."""
    layout = {
        "name": record.name,
        "files": record.files,
        "metadata": record.metadata,
        "dtypes": record.dtypes,
        "others": sorted(record.others),
    }
    files = {f"{_FOLDER}/{_LAYOUT}": (json.dumps(layout, indent=1) + "\n").encode()}
    if record.g_tensors:
        files[f"{_FOLDER}/{_G}"] = save(record.g_tensors)
    return files | {f"{_FOLDER}/source/{name}": data for name, data in record.others.items()}


def read_record(run_dir: Path) -> Record | None:
    """The record of an imported run folder; None where there is none."""
    folder = run_dir / _FOLDER
    if not (folder / _LAYOUT).is_file():
        return None
    layout = read_json(folder / _LAYOUT)
    try:
        g_file = folder / _G
        return Record(
            name=layout["name"],
            files=layout["files"],
            metadata=layout["metadata"],
            dtypes=layout["dtypes"],
            g_tensors=load(g_file.read_bytes()) if g_file.is_file() else {},
            others={name: (folder / "source" / name).read_bytes() for name in layout["others"]},
        )
    except Exception as error:
        raise ConfigError(
            f"{folder}: is damaged ({error}); remove it to export without it"
        ) from None


def _plane(values: np.ndarray) -> bytes:
    """The part of a G_LM tensor that the model uses, as float32 bytes; of a status, nothing."""
    return values[:, 2].astype(np.float32).tobytes() if values.ndim > 1 else b""


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
