"""Prepared text: a folder of shards, its manifest and its tokenizer, and the tokens in it."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.records import ENDING, Shard, read_file, read_lengths
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER

MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of its folder.

    Attributes:
      folder: where it lies; not a part of what is written.
      settings: what the shards were made with: inputs, seed, held-out shares, ...
      fingerprint: SHA-256 of inputs, settings and tokenizer.
      tokenizer_digest: SHA-256 of `tokenizer.model`.
      dtype: of the ids, uint16 or uint32.
      problems: what was left out, kind -> count.
      splits: split -> shards, in the order of the text.
    """

    folder: pathlib.Path
    settings: dict[str, Any]
    fingerprint: str
    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    dtype: str
    problems: dict[str, int]
    splits: dict[str, tuple[Shard, ...]]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; ConfigError if it is not there or another one."""
        path = self.folder / TOKENIZER
        tokenizer = Tokenizer.load(path)
        if tokenizer.digest != self.tokenizer_digest:
            raise ConfigError(f"Data.source: {path} is not the tokenizer that made the shards")
        return tokenizer

    def count(self, split: str, what: str) -> int:
        """Documents, tokens or bytes of a split: what = 'n_documents', 'n_tokens', 'n_bytes'."""
        return sum(getattr(shard, what) for shard in self.splits[split])

    def dump(self) -> bytes:
        """The text of `manifest.json`; equal manifests give equal bytes."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["folder"]
        fields["splits"] = {
            split: {
                **{name: self.count(split, name) for name in ("n_documents", "n_tokens")},
                "n_bytes": self.count(split, "n_bytes"),
                "shards": [dataclasses.asdict(shard) for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        return (json.dumps({"format": FORMAT, **fields}, indent=1) + "\n").encode()


def is_prepared(path: str) -> bool:
    """Whether a path is a manifest, or a folder with one."""
    found = pathlib.Path(path).expanduser()
    return found.name == MANIFEST or (found / MANIFEST).is_file()


def read_manifest(path: str | pathlib.Path, field: str = "Data.source") -> Manifest:
    """The manifest of a folder, or at a path; the shards must be there, at their full size.

    Raises:
      ConfigError: there is none, it is damaged, or a shard is missing or cut; starts with `field`.
    """
    file = pathlib.Path(path).expanduser()
    file = file / MANIFEST if file.is_dir() else file
    where = f"{field} = {str(path)!r}"
    try:
        fields = json.loads(file.read_text())
        if fields.pop("format") != FORMAT:
            raise ConfigError(f"{where}: {file} has another format; prepare the text anew")
        splits = {
            split: tuple(Shard(**shard) for shard in content["shards"])
            for split, content in fields.pop("splits").items()
        }
        manifest = Manifest(folder=file.parent, splits=splits, **fields)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{where}: {file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{where}: {file} is not a manifest; prepare the text anew") from None
    for shards in splits.values():
        for shard in shards:
            shard_file = file.parent / f"{shard.name}{ENDING}"
            size = shard_file.stat().st_size if shard_file.is_file() else None
            if size != shard.file_size:
                problem = "is missing" if size is None else "is cut or changed"
                raise ConfigError(f"{where}: {shard_file} {problem}; copy it again")
    return manifest


class ShardedTokens:
    """The tokens of one split of a manifest, read from its shards when they are asked for.

    Pickles as the path of the manifest.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        self._manifest, self._split = manifest, split
        self._shards = manifest.splits.get(split, ())
        self._ends = [0, *itertools.accumulate(shard.n_tokens for shard in self._shards)]
        self._paths = [str(manifest.folder / f"{shard.name}{ENDING}") for shard in self._shards]
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self.n_tokens = self._ends[-1]
        self.n_documents = sum(shard.n_documents for shard in self._shards)
        self.n_bytes = sum(shard.n_bytes for shard in self._shards)

    @property
    def digest(self) -> str:
        """Names the tokens: equal digests, equal tokens."""
        key = [self._manifest.fingerprint, self._split, [s.n_tokens for s in self._shards]]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token."""
        return self.n_bytes / self.n_tokens

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document [n_documents], end piece included."""
        parts = [read_lengths(self._manifest.folder, shard) for shard in self._shards]
        return np.concatenate([np.empty(0, np.uint32), *parts])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the split, over shards where needed."""
        k = bisect.bisect_right(self._ends, start) - 1
        if stop <= self._ends[k + 1]:
            begin = self._ends[k]
            return read_file(self._paths[k], self._dtype, start - begin, stop - begin)
        parts = []
        while start < stop:
            begin, end = self._ends[k], min(stop, self._ends[k + 1])
            parts.append(read_file(self._paths[k], self._dtype, start - begin, end - begin))
            start = end
            k += 1
        return np.concatenate(parts)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return _reopen, (str(self._manifest.folder), self._split)


def _reopen(folder: str, split: str) -> ShardedTokens:
    return ShardedTokens(read_manifest(folder), split)
