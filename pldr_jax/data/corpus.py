"""Tokenised text in a cache folder: one flat file of token ids per split.

A cache entry is a folder named after a digest of everything that its contents depend on: names and
contents of the source files, tokenizer, vocabulary size and held-out share.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

import numpy as np
import sentencepiece

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data import cache
from pldr_jax.data.shards.records import LENGTHS
from pldr_jax.data.text import sources
from pldr_jax.data.text.tokenizer import TRAINING_BLOCK, Tokenizer
from pldr_jax.files import cache_folder

_FORMAT = 2
"""Part of the cache key: raised whenever the same settings would give other tokens."""
_SPLITS = ("train", "validation")

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """The token ids of one split, documents one after another, each closed by the end piece.

    n_bytes counts the UTF-8 bytes of the text; the end pieces have none.
    """

    path: pathlib.Path
    dtype: Literal["uint16", "uint32"]
    n_documents: int
    n_tokens: int
    n_bytes: int

    @property
    def tokens(self) -> np.ndarray:
        """All ids [n_tokens], mapped from the file, read-only."""
        return np.memmap(self.path, self.dtype, "r", shape=(self.n_tokens,))

    @property
    def digest(self) -> str:
        """Names the tokens: the cache entry is named after what they were made of."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document [n_documents], end piece included."""
        return np.fromfile(self.path.with_suffix(LENGTHS), "<u4", self.n_documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop."""
        return self._map[start:stop]

    @functools.cached_property
    def _map(self) -> np.ndarray:
        return self.tokens

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_map"}

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token: bits a byte = nats a token / (ln 2 * bytes_per_token)."""
        return self.n_bytes / self.n_tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenizer and both splits; `folder` is the cache entry, `digest` names its contents."""

    tokenizer: Tokenizer
    train: TokenFile
    validation: TokenFile
    folder: pathlib.Path
    digest: str


def prepare(config: DataConfig, vocab_size: int, log: Log = print) -> Corpus:
    """Finds the text, the tokenizer and the tokens, from the cache where it has them.

    vocab_size: Model.vocab_size; a new tokenizer gets as many pieces, a loaded one must have them.
    log: takes each line of progress and notes. ConfigError for whatever the user can put right.
    """
    tokenizer = None if config.tokenizer is None else _load_tokenizer(config.tokenizer, vocab_size)
    source = sources.open_source(config.source)
    digest = _cache_key(config, vocab_size, source, tokenizer)
    folder = cache_folder(config.cache_dir)
    entry = folder / digest[:32]
    corpus = _read_entry(entry)
    if corpus is None:
        if entry.exists():
            log(f"tokenised text in {entry} is damaged and is made again")
        with cache.new_entry(entry, lambda path: _read_entry(path) is not None) as temporary:
            _write_entry(temporary, config, vocab_size, source, tokenizer, digest, log)
        corpus = _read_entry(entry)
    if corpus is None:
        raise RuntimeError(f"{entry} was damaged or removed while it was being written")
    return corpus


def _load_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"Model.vocab_size = {vocab_size}: the tokenizer Data.tokenizer = {path!r} has "
            f"{tokenizer.vocab_size} pieces; set Model.vocab_size = {tokenizer.vocab_size}"
        )
    if tokenizer.eos_id < 0:
        raise ConfigError(f"Data.tokenizer = {path!r}: has no end piece to close documents with")
    return tokenizer


def _cache_key(
    config: DataConfig, vocab_size: int, source: sources.Source, tokenizer: Tokenizer | None
) -> str:
    trained = [vocab_size, config.tokenizer_sample_bytes, sentencepiece.__version__]
    key = {
        "format": _FORMAT,
        "source": source.digest,
        "validation_fraction": config.validation_fraction,
        "tokenizer": trained if tokenizer is None else tokenizer.digest,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _write_entry(
    folder: pathlib.Path,
    config: DataConfig,
    vocab_size: int,
    source: sources.Source,
    tokenizer: Tokenizer | None,
    digest: str,
    log: Log,
) -> None:
    names, n_empty, n_repaired = [], 0, 0
    for document in sources.documents(source):
        n_empty += not document.text.strip()
        n_repaired += document.repaired
        if document.text.strip():
            names.append(document.name)
    if len(names) < 2:
        raise ConfigError(
            f"Data.source = {config.source!r}: holds {len(names)} document(s) with text, too "
            "few to hold one out for validation; give more text"
        )
    if n_empty:
        log(f"{n_empty} of {len(names) + n_empty} documents are empty and left out")
    if n_repaired:
        log(f"{n_repaired} documents are not UTF-8 throughout: other bytes are replaced by U+FFFD")
    held_out = sources.held_out(names, config.validation_fraction)
    if tokenizer is None:
        start = time.monotonic()
        sample = _sample(source, held_out, config)
        tokenizer = Tokenizer.train(sample, vocab_size)
        sample_bytes = sum(len(text.encode()) for text in sample)
        log(
            f"trained a tokenizer of {vocab_size} pieces on {sample_bytes:,} bytes "
            f"in {time.monotonic() - start:.1f} s"
        )
    tokenizer.save(folder / "tokenizer.model")
    start = time.monotonic()
    counts = _write_tokens(folder, source, held_out, tokenizer)
    for split in _SPLITS:
        log("{}: {n_documents:,} documents, {n_tokens:,} tokens".format(split, **counts[split]))
    log(
        f"tokenised {source.n_bytes:,} bytes in {time.monotonic() - start:.1f} s, kept in the cache"
    )
    meta = {"digest": digest, "tokenizer": tokenizer.digest, "source": source.digest, **counts}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _sample(source: sources.Source, held_out: frozenset[str], config: DataConfig) -> list[str]:
    """About Data.tokenizer_sample_bytes of training text, in blocks spread evenly over it."""
    share = config.tokenizer_sample_bytes / (source.n_bytes * (1 - config.validation_fraction))
    blocks, owed = [], 0.0
    for document in sources.documents(source):
        if document.name in held_out:
            continue
        for start in range(0, len(document.text), TRAINING_BLOCK):
            block = document.text[start : start + TRAINING_BLOCK]
            owed += share * len(block)
            if owed > 0:
                owed -= len(block)
                blocks.append(block)
    return blocks


def _write_tokens(
    folder: pathlib.Path,
    source: sources.Source,
    held_out: frozenset[str],
    tokenizer: Tokenizer,
) -> dict[str, dict[str, Any]]:
    """Writes the tokens of both splits, and the lengths of their documents; gives the counts that
    `TokenFile` has, by split.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts: dict[str, dict[str, Any]] = {
        split: {"dtype": dtype, "n_documents": 0, "n_tokens": 0, "n_bytes": 0} for split in _SPLITS
    }
    lengths: dict[str, list[int]] = {split: [] for split in _SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as held:
        files: dict[str, BinaryIO] = {"train": train, "validation": held}
        for group in _groups(sources.documents(source), 64):
            rows = tokenizer.encode_arrays([document.text for document in group])
            for document, row in zip(group, rows, strict=True):
                split = "validation" if document.name in held_out else "train"
                files[split].write(np.append(row, tokenizer.eos_id).astype(dtype).tobytes())
                lengths[split].append(len(row) + 1)
                counts[split]["n_documents"] += 1
                counts[split]["n_tokens"] += len(row) + 1
                counts[split]["n_bytes"] += len(document.text.encode())
    for split in _SPLITS:
        np.asarray(lengths[split], "<u4").tofile(folder / f"{split}{LENGTHS}")
    return counts


def _groups(documents: Iterator[sources.Document], size: int) -> Iterator[list[sources.Document]]:
    with_text = (document for document in documents if document.text.strip())
    while group := list(itertools.islice(with_text, size)):
        yield group


def _read_entry(entry: pathlib.Path) -> Corpus | None:
    """The corpus of a cache entry; None if it is missing or does not agree with its meta.json."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        tokenizer = Tokenizer.load(entry / "tokenizer.model")
        files = {s: TokenFile(path=entry / f"{s}.bin", **meta[s]) for s in _SPLITS}
        for file in files.values():
            if file.path.stat().st_size != file.n_tokens * np.dtype(file.dtype).itemsize:
                return None
            if file.path.with_suffix(LENGTHS).stat().st_size != 4 * file.n_documents:
                return None
        if tokenizer.digest != meta["tokenizer"]:
            return None
        return Corpus(tokenizer, files["train"], files["validation"], entry, meta["digest"])
    except (OSError, ValueError, KeyError, TypeError):  # ConfigError is a ValueError
        return None
