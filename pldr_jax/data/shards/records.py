"""Shards: token ids in ArrayRecord files, written once, read anywhere without loading them.

A shard `NAME.array_record` holds the tokens of its documents one after another, each document
closed by the end piece, cut into records of `RECORD_TOKENS`: a 32-bit checksum, then the ids as
little-endian integers. So the record of any token is a division away, and a document costs nothing
beside its tokens. `NAME.lengths` holds the tokens of each document, uint32.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from pldr_jax.files import whole_file

RECORD_TOKENS = 2048
KEPT_RECORDS = 4096
"""Records that a process keeps, decompressed and checked: 18 MB of uint16, 35 MB of uint32."""

ENDING, LENGTHS = ".array_record", ".lengths"

_OPEN_FILES = 128
_WRITER_OPTIONS = "group_size:1,zstd:1"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""What the library recommends for random access."""


class DataError(RuntimeError):
    """Text or tokens that cannot be used; one line that names the file and the place in it."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a shard holds.

    Attributes:
      name: of its files, without their endings.
      n_bytes: UTF-8 bytes of the text; the end pieces have none.
      digest: SHA-256 of tokens and lengths, however they are compressed.
      file_size: bytes of the ArrayRecord file, by which a cut one is noticed at once.
      file_crc32, lengths_crc32: of the two files.
    """

    name: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    digest: str
    file_size: int
    file_crc32: int
    lengths_crc32: int

    def __post_init__(self) -> None:
        numbers = dataclasses.astuple(self)
        if any(not isinstance(n, int) or n < 0 for n in (*numbers[1:4], *numbers[5:])):
            raise ValueError(f"shard {self.name!r}: {numbers}")


class ShardWriter:
    """Writes one shard; its files have their names only when `close` has returned."""

    def __init__(self, folder: pathlib.Path, name: str, dtype: str) -> None:
        self._name, self._dtype = name, np.dtype(dtype).newbyteorder("<")
        self._files = contextlib.ExitStack()
        self._tokens_path, self._lengths_path = (
            self._files.enter_context(whole_file(folder / f"{name}{ending}"))
            for ending in (ENDING, LENGTHS)
        )
        with _one_line(self._tokens_path):
            self._writer = ArrayRecordWriter(str(self._tokens_path), _WRITER_OPTIONS)
        self._waiting: list[np.ndarray] = []
        self._n_waiting = self._n_tokens = self._n_bytes = self._n_records = 0
        self._lengths: list[int] = []
        self._digest = hashlib.sha256()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, n_bytes: int) -> None:
        """Adds documents.

        Args:
          tokens: their ids, one document after another, each with its end piece.
          lengths: tokens of each, end piece included.
          n_bytes: UTF-8 bytes of their texts together.
        """
        self._lengths += lengths.tolist()
        self._n_tokens += len(tokens)
        self._n_bytes += n_bytes
        self._waiting.append(tokens.astype(self._dtype))
        self._n_waiting += len(tokens)
        if self._n_waiting >= 64 * RECORD_TOKENS:
            self._write(RECORD_TOKENS)

    def close(self) -> Shard:
        """Writes what is left and gives the files their names."""
        self._write(1)
        with _one_line(self._tokens_path):
            self._writer.close()
        lengths = np.asarray(self._lengths, "<u4").tobytes()
        self._lengths_path.write_bytes(lengths)
        self._digest.update(lengths)
        shard = Shard(
            self._name,
            len(self._lengths),
            self._n_tokens,
            self._n_bytes,
            self._digest.hexdigest(),
            self._tokens_path.stat().st_size,
            crc32_of(self._tokens_path),
            zlib.crc32(lengths),
        )
        self._files.close()
        return shard

    def _write(self, least: int) -> None:
        """Writes records until fewer than `least` tokens are left."""
        tokens = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        start = 0
        while len(tokens) - start >= least:
            payload = tokens[start : start + RECORD_TOKENS].tobytes()
            checksum = _checksum(self._name, self._n_records, payload)
            with _one_line(self._tokens_path):
                self._writer.write(checksum.to_bytes(4, "little") + payload)
            self._digest.update(payload)
            self._n_records += 1
            start += RECORD_TOKENS
        self._waiting = [tokens[start:]]
        self._n_waiting = len(self._waiting[0])


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """A disk that is full, which the library reports as a RuntimeError of several sentences."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(";")[0].removeprefix("write() failed: ")
        raise DataError(
            f"{path.parent}: cannot be written to ({reason}); the same command goes on where it "
            "stopped"
        ) from None


def _checksum(name: str, number: int, payload: bytes | memoryview) -> int:
    """Of a record and its place, so that one that lies in another's place is noticed."""
    return zlib.crc32(payload, zlib.crc32(f"{name} {number}".encode()))


def crc32_of(path: pathlib.Path) -> int:
    """Checksum of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def read_tokens(path: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Tokens [stop - start] of a shard's ArrayRecord file; may be called from several threads.

    Raises:
      DataError: a record is damaged; names the file and the record.
    """
    first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
    tokens = _record(path, first, dtype)
    if last > first:
        rest = [_record(path, k, dtype) for k in range(first + 1, last + 1)]
        tokens = np.concatenate([tokens, *rest])
    begin = first * RECORD_TOKENS
    wanted = tokens[start - begin : stop - begin]
    if len(wanted) != stop - start:
        raise DataError(f"{path}: record {last}: is too short; {_REMEDY}")
    return wanted


def read_lengths(folder: pathlib.Path, shard: Shard) -> np.ndarray:
    """Tokens of each document [n_documents], end piece included.

    Raises:
      DataError: the file is damaged.
    """
    path = folder / f"{shard.name}{LENGTHS}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if zlib.crc32(content) != shard.lengths_crc32 or len(content) != 4 * shard.n_documents:
        raise DataError(f"{path}: is damaged (wrong checksum); {_REMEDY}")
    return np.frombuffer(content, "<u4")


_REMEDY = "copy the shard again, or prepare the text anew"


@functools.lru_cache(KEPT_RECORDS)
def _record(path: str, k: int, dtype: np.dtype) -> np.ndarray:
    """The ids of a record, read-only; a damaged one is never kept."""
    try:  # as a range of one: a list of numbers goes through the library's thread pool
        (record,) = _reader(path).read(k, k + 1)
    except (RuntimeError, IndexError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: record {k}: cannot be read ({reason}); {_REMEDY}") from None
    name = os.path.basename(path).removesuffix(ENDING)
    if _checksum(name, k, memoryview(record)[4:]) != int.from_bytes(record[:4], "little"):
        raise DataError(f"{path}: record {k}: is damaged (wrong checksum); {_REMEDY}")
    return np.frombuffer(record, dtype, offset=4)


@functools.lru_cache(_OPEN_FILES)
def _reader(path: str) -> Any:
    reader = ArrayRecordReader(path, _READER_OPTIONS)
    if not reader.ok():
        raise OSError("not a whole ArrayRecord file")
    return reader


def forget_records() -> None:
    """Closes all shards, whose files are about to be others."""
    _record.cache_clear()
    _reader.cache_clear()
