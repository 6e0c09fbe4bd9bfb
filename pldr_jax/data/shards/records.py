"""Shards: token ids in ArrayRecord files, written once, read anywhere without loading them.

A shard `NAME.array_record` holds the tokens of its documents one after another, each document
closed by the end piece, cut into records of `RECORD_TOKENS`: a 32-bit CRC of the rest, then the ids
as little-endian integers. So the record of any token is a division away, and a document costs
nothing beside its tokens. `NAME.lengths` holds the tokens of each document, uint32.
"""

import dataclasses
import functools
import os
import pathlib
import zlib
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

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
      file_size: bytes of the ArrayRecord file, by which a cut one is noticed at once.
    """

    name: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    file_size: int


class ShardWriter:
    """Writes one shard; its files have their names only when `close` has returned."""

    def __init__(self, folder: pathlib.Path, name: str, dtype: str) -> None:
        self._folder, self._name = folder, name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._writer = ArrayRecordWriter(str(self._temporary(ENDING)), _WRITER_OPTIONS)
        self._waiting: list[np.ndarray] = []
        self._n_waiting = self._n_tokens = self._n_bytes = 0
        self._lengths: list[int] = []

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
        self._writer.close()
        np.asarray(self._lengths, "<u4").tofile(self._temporary(LENGTHS))
        for ending in (LENGTHS, ENDING):
            os.replace(self._temporary(ending), self._folder / f"{self._name}{ending}")
        return Shard(
            self._name,
            len(self._lengths),
            self._n_tokens,
            self._n_bytes,
            (self._folder / f"{self._name}{ENDING}").stat().st_size,
        )

    def _write(self, least: int) -> None:
        """Writes records until fewer than `least` tokens are left."""
        tokens = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        start = 0
        while len(tokens) - start >= least:
            payload = tokens[start : start + RECORD_TOKENS].tobytes()
            self._writer.write(zlib.crc32(payload).to_bytes(4, "little") + payload)
            start += RECORD_TOKENS
        self._waiting = [tokens[start:]]
        self._n_waiting = len(self._waiting[0])

    def _temporary(self, ending: str) -> pathlib.Path:
        return self._folder / f".{self._name}{ending}.tmp"


def read_tokens(folder: pathlib.Path, shard: Shard, dtype: str, start: int, stop: int) -> Any:
    """Tokens [stop - start] of a shard; may be called from several threads.

    Raises:
      DataError: a record is damaged; names the file and the record.
    """
    return read_file(
        str(folder / f"{shard.name}{ENDING}"), np.dtype(dtype).newbyteorder("<"), start, stop
    )


def read_file(path: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """`read_tokens` of the shard's ArrayRecord file; little is done for each call."""
    first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
    tokens = _record(path, first, dtype)
    if last > first:
        rest = [_record(path, k, dtype) for k in range(first + 1, last + 1)]
        tokens = np.concatenate([tokens, *rest])
    begin = first * RECORD_TOKENS
    found = tokens[start - begin : stop - begin]
    if len(found) != stop - start:
        raise DataError(f"{path}: record {last}: is too short; {_REMEDY}")
    return found


def read_lengths(folder: pathlib.Path, shard: Shard) -> np.ndarray:
    """Tokens of each document [n_documents], end piece included.

    Raises:
      DataError: the file does not agree with the shard.
    """
    path = folder / f"{shard.name}{LENGTHS}"
    try:
        lengths = np.fromfile(path, "<u4")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if len(lengths) != shard.n_documents or int(lengths.sum(dtype=np.int64)) != shard.n_tokens:
        raise DataError(f"{path}: does not agree with the manifest; {_REMEDY}")
    return lengths


_REMEDY = "copy the shard again, or prepare the text anew"


@functools.lru_cache(KEPT_RECORDS)
def _record(path: str, k: int, dtype: np.dtype) -> np.ndarray:
    """The ids of a record, read-only; a damaged one is never kept."""
    try:  # as a range of one: a list of numbers goes through the library's thread pool
        (record,) = _reader(path).read(k, k + 1)
    except (RuntimeError, IndexError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: record {k}: cannot be read ({reason}); {_REMEDY}") from None
    if zlib.crc32(memoryview(record)[4:]) != int.from_bytes(record[:4], "little"):
        raise DataError(f"{path}: record {k}: is damaged (wrong checksum); {_REMEDY}")
    return np.frombuffer(record, dtype, offset=4)


@functools.lru_cache(_OPEN_FILES)
def _reader(path: str) -> Any:
    reader = ArrayRecordReader(path, _READER_OPTIONS)
    if not reader.ok():
        raise OSError("not a whole ArrayRecord file")
    return reader
