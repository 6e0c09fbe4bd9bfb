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
from pldr_jax.copies import readable_path
from pldr_jax.data.shards.records import (
    ENDING,
    LENGTHS,
    DataError,
    Shard,
    crc32_of,
    read_lengths,
    read_tokens,
)
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER, file_in, read_regular_file

MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")
FORMAT = 2


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
      examples: kind -> the place of the first of them.
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
    examples: dict[str, str]
    splits: dict[str, tuple[Shard, ...]]

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {self.dtype!r} of token ids")

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; ConfigError if it is not there or another one."""
        path = self.folder / TOKENIZER
        tokenizer = Tokenizer.load(path)
        if tokenizer.digest != self.tokenizer_digest:
            raise ConfigError(f"Data.source: {path} is not the tokenizer that made the shards")
        return tokenizer

    @property
    def chat_template(self) -> str | None:
        """Of conversations, whose answers alone are targets; None of text."""
        chat = self.settings.get("read", {}).get("chat")
        return None if chat is None else str(chat["template"])

    @property
    def held_out_rule(self) -> tuple[Any, ...]:
        """What decides, with its text, in which split a document is."""
        names = ("seed", "validation_fraction", "test_fraction")
        return tuple(self.settings.get(name) for name in names)

    def count(self, split: str, what: str) -> int:
        """Documents, tokens or bytes of a split: what = 'n_documents', 'n_tokens', 'n_bytes'."""
        return sum(getattr(shard, what) for shard in self.splits.get(split, ()))

    def digest(self, *splits: str) -> str:
        """Names the tokens of some splits: equal digests, equal tokens in equal documents."""
        key = [[shard.digest for shard in self.splits.get(split, ())] for split in splits]
        return hashlib.sha256(json.dumps([self.tokenizer_digest, key]).encode()).hexdigest()

    def dump(self) -> bytes:
        """The text of `manifest.json`, with its checksum; equal manifests give equal bytes."""
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
        checked = {"checksum": _checksum(fields), **fields}
        return (json.dumps({"format": FORMAT, **checked}, indent=1) + "\n").encode()

    def check_files(self) -> None:
        """Reads all files and compares their checksums.

        Raises:
          ConfigError, DataError: a file is damaged, or the tokenizer another one.
        """
        _ = self.tokenizer
        for shard in itertools.chain.from_iterable(self.splits.values()):
            read_lengths(self.folder, shard)
            path = self.folder / f"{shard.name}{ENDING}"
            if crc32_of(path) != shard.file_crc32:
                raise DataError(f"{path}: is damaged (wrong checksum)")


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def is_prepared(path: str) -> bool:
    """Whether a path is a manifest, or a folder with one."""
    folder = readable_path(path, "Data.source")
    return folder.name == MANIFEST or (folder / MANIFEST).is_file()


def read_prepared(path: str | pathlib.Path, field: str = "Data.source") -> Manifest:
    """The manifest of a folder, or at a path; the shards must be there, at their full size.

    Raises:
      ConfigError: there is none, it is damaged, or a shard is missing or cut; starts with `field`.
    """
    file = readable_path(path, field)
    file = file / MANIFEST if file.is_dir() else file
    where = f"{field} = {str(path)!r}"
    try:
        fields = json.loads(read_regular_file(file))
        if fields.pop("format") != FORMAT:
            raise ConfigError(
                f"{where}: {file} was written by another version; prepare the text anew"
            )
        if fields.pop("checksum") != _checksum(fields):
            raise ConfigError(
                f"{where}: {file} is damaged; copy it again, or prepare the text anew"
            )
        splits = {
            split: tuple(Shard(**shard) for shard in content["shards"])
            for split, content in fields.pop("splits").items()
        }
        manifest = Manifest(folder=file.parent, splits=splits, **fields)
        for shard in itertools.chain.from_iterable(splits.values()):
            _check_files_of(shard, file.parent, where)
        file_in(file.parent, TOKENIZER, where)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{where}: {file} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{where}: {file} is not a manifest; prepare the text anew") from None
    return manifest


def _check_files_of(shard: Shard, folder: pathlib.Path, where: str) -> None:
    for ending, size in ((ENDING, shard.file_size), (LENGTHS, 4 * shard.n_documents)):
        file = file_in(folder, f"{shard.name}{ending}", where)
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            problem = "is missing" if there is None else "is cut or changed"
            raise ConfigError(f"{where}: {file} {problem}; copy it again")


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
        self.n_documents = manifest.count(split, "n_documents")
        self.n_bytes = manifest.count(split, "n_bytes")

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token: bits a byte = nats a token / (ln 2 * bytes_per_token)."""
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
            return read_tokens(self._paths[k], self._dtype, start - begin, stop - begin)
        parts = []
        while start < stop:
            begin, end = self._ends[k], min(stop, self._ends[k + 1])
            parts.append(read_tokens(self._paths[k], self._dtype, start - begin, end - begin))
            start = end
            k += 1
        return np.concatenate(parts)

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return _reopen, (str(self._manifest.folder), self._split)


class ShardedAnswers(ShardedTokens):
    """`ShardedTokens` of conversations: each document is a prompt and its answer, which alone is a
    target.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        super().__init__(manifest, split)
        self._vocab_size = manifest.vocab_size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the split."""
        return super().read(start, stop) % self._vocab_size

    def targets(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop as targets, int32: -1 in place of those of prompts."""
        return np.maximum(super().read(start, stop).astype(np.int32) - self._vocab_size, -1)


def open_tokens(manifest: Manifest, split: str) -> ShardedTokens:
    """The tokens of a split, text or conversations."""
    kind = ShardedTokens if manifest.chat_template is None else ShardedAnswers
    return kind(manifest, split)


def _reopen(folder: str, split: str) -> ShardedTokens:
    return open_tokens(read_prepared(folder), split)
