"""What a run folder keeps of the checkpoint of others that it comes from, in `transformers/`.

Parameters here are float32 and stacked. The record of an import says what that loses: dtypes, the
split into files, `decoder.past_G_values` whole, and every other small file. So the export is the
original again. A run that was trained further or frozen keeps the other files alone.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from pldr_jax.config import ConfigError
from pldr_jax.files import TOKENIZER, TOKENIZER_CONFIG, read_regular_file
from pldr_jax.interop.folder import WEIGHTS, listed_file, other_files, read_json
from pldr_jax.interop.tensors import INDEX, TensorFiles, read_safetensors
from pldr_jax.interop.transformers import CONFIG, G_STATUS, G_VALUES

_FOLDER, _SOURCE = "transformers", "source"
_LAYOUT, _G = "layout.json", "past_g_values.safetensors"
ON_DISK: Mapping[str, str] = MappingProxyType({})
"""The origin of what came from no hub."""

_LEFT_OUT = (INDEX, "README.md", TOKENIZER)
_DTYPES: dict[str, Any] = {"float16": np.dtype(np.float16), "float64": np.dtype(np.float64)}
_DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Record:
    """Where a run folder comes from.

    Attributes:
      name: of the folder, file or repository that was imported; None where its weights were
        changed since.
      files, metadata: of `TensorFiles`; no files where it was a `.pth`.
      dtypes: of the tensors that are not float32.
      g_tensors: `past_G_values` and its status, where the source had them.
      others: contents of its other files, by their names.
      origin: of one of the hub, `hub.Source.origin`.
    """

    name: str | None = None
    files: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    g_tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    others: dict[str, bytes] = dataclasses.field(default_factory=dict)
    origin: dict[str, str] = dataclasses.field(default_factory=dict)

    def restored(self, tensors: Mapping[str, np.ndarray]) -> TensorFiles | None:
        """Tensors of ours as they were in the source; None if they are not those."""
        if self.name is None:
            return None
        restored = dict(tensors)
        for name, kept in self.g_tensors.items():
            if name in restored and _used(restored[name]) != _used(kept):
                return None
            restored[name] = kept
        for name, dtype in self.dtypes.items():
            if name not in restored:
                return None
            cast = restored[name].astype(_DTYPES[dtype])
            if cast.astype(restored[name].dtype).tobytes() != restored[name].tobytes():
                return None
            restored[name] = cast
        named = {name for names in self.files.values() for name in names}
        if named and named != set(restored):
            return None
        return TensorFiles(restored, self.files, self.metadata)


def make_record(source: TensorFiles, path: Path, origin: Mapping[str, str] = ON_DISK) -> Record:
    """The record of a source, a folder or a `.pth`; `origin` says where on the hub it is from."""
    tensors = source.tensors
    return Record(
        name=origin.get("repository", path.resolve().name),
        origin=dict(origin),
        files=source.files,
        metadata=source.metadata,
        dtypes={
            name: str(tensor.dtype)
            for name, tensor in tensors.items()
            if tensor.dtype != np.float32 and name not in (G_VALUES, G_STATUS)
        },
        g_tensors={name: tensors[name] for name in (G_VALUES, G_STATUS) if name in tensors},
        others=_others(path) if path.is_dir() else {},
    )


def record_files(record: Record) -> dict[str, bytes]:
    """The files of a record, by their paths in a run folder."""
    layout = {
        "name": record.name,
        "files": record.files,
        "metadata": record.metadata,
        "dtypes": record.dtypes,
        "others": sorted(record.others),
        "origin": record.origin,
    }
    files = {f"{_FOLDER}/{_LAYOUT}": (json.dumps(layout, indent=1) + "\n").encode()}
    if record.g_tensors:
        files[f"{_FOLDER}/{_G}"] = save(record.g_tensors)
    others = {f"{_FOLDER}/{_SOURCE}/{name}": data for name, data in record.others.items()}
    return files | others


def inherited_files(folder: Path, origin: Mapping[str, str] = ON_DISK) -> dict[str, bytes]:
    """What a run that begins with the weights of a checkpoint keeps of it, by paths in the run
    folder: the files that are no weights, of a folder in the transformers layout or an import, and
    the chat template of a run.
    """
    own = {}
    if (folder / CONFIG).is_file():
        record = Record(others=_others(folder), origin=dict(origin))
    else:
        record = dataclasses.replace(read_record(folder) or Record(), name=None)
        if (folder / TOKENIZER_CONFIG).is_file():
            own = {TOKENIZER_CONFIG: read_regular_file(folder / TOKENIZER_CONFIG)}
    kept = Record(others=record.others, origin=record.origin)
    return own | (record_files(kept) if kept != Record() else {})


def read_record(run_dir: Path) -> Record | None:
    """The record of a run folder; None where there is none.

    Raises:
      ConfigError: it is damaged, or names files outside of its folder.
    """
    folder = run_dir / _FOLDER
    if not (folder / _LAYOUT).is_file():
        return None
    layout = read_json(folder / _LAYOUT)
    try:
        name, files, metadata, dtypes, others = (
            layout[key] for key in ("name", "files", "metadata", "dtypes", "others")
        )
        known = isinstance(name, str | None) and _maps(metadata, str) and _maps(dtypes, str)
        origin = layout.get("origin", {})
        known = (
            known
            and _maps(origin, str)
            and _maps(files, list)
            and set(dtypes.values()) <= set(_DTYPES)
        )
        if not known or not isinstance(others, list):
            raise ValueError("layout.json is not what an import writes")
        for file in files:
            if listed_file(folder, file, _LAYOUT).suffix != ".safetensors":
                raise ValueError(f"{file!r} is no file of weights")
        for file in others:
            if listed_file(folder, file, _LAYOUT).suffix in WEIGHTS or file in _LEFT_OUT:
                raise ValueError(f"{file!r} is none of the other files")
        kept = {n: listed_file(folder / _SOURCE, n, _LAYOUT) for n in others}
        g_file = folder / _G
        return Record(
            name=name,
            files=files,
            metadata=metadata,
            dtypes=dtypes,
            g_tensors=read_safetensors(g_file)[0] if g_file.is_file() else {},
            others={n: read_regular_file(file) for n, file in kept.items()},
            origin=origin,
        )
    except (ValueError, KeyError, OSError) as error:  # a ConfigError is a ValueError
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ConfigError(
            f"{folder}: is damaged ({reason}); remove it to export without it"
        ) from None


def _others(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in other_files(folder).items() if name not in _LEFT_OUT}


def _maps(value: Any, kind: type) -> bool:
    """Whether this is a dict of strings to values of a kind."""
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


def _used(values: np.ndarray) -> bytes:
    """The part of a G_LM tensor that the model uses, as float32 bytes; of a status, nothing."""
    return values[:, 2].astype(np.float32).tobytes() if values.ndim > 1 else b""
