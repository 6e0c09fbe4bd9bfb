"""Documents of every kind of input, and whatever stands in their place that cannot be used.

A reader yields a `Document` or a `Problem`, and keeps one document in memory at a time. What is to
be done about a problem is for the caller to say.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal

from pldr_jax.config import ConfigError
from pldr_jax.data.text.inputs import Piece, compression, needs, open_hub

PROBLEMS = {
    "bad_utf8": "not UTF-8",
    "broken_line": "not a JSON object",
    "no_text": "without a text in the field",
    "empty": "empty",
    "huge": "larger than --max_document_bytes",
    "binary": "not text: a NUL among the first bytes",
    "damaged": "damaged file, whose rest is left out",
}
"""Kinds of problems, and their meaning."""

_LINE_SLACK = 1 << 20
_ESCAPED = 6
"""Bytes of one character at most, written as a JSON escape, over those of UTF-8."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it was found: `file:line`, or `file: byte N`, or `file: row N`."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that gives no document; `kind` is one of `PROBLEMS`."""

    kind: str
    where: str


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """How inputs become documents.

    Attributes:
      text_field: of JSON lines, Parquet, Arrow and hub rows.
      documents: what one document of a text file is.
      max_document_bytes: UTF-8 bytes above which a document is a problem.
    """

    text_field: str = "text"
    documents: Literal["file", "line", "paragraph"] = "file"
    max_document_bytes: int = 64 << 20


def read(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    """The documents of a piece, in order.

    Raises:
      ConfigError: an optional package is missing, or a column that does not exist was named.
    """
    readers: dict[str, Callable[[Piece, ReadSettings], Iterator[Document | Problem]]] = {
        "text": _read_text,
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
        "hub": _read_hub,
    }
    for item in readers[piece.kind](piece, settings):
        yield item if isinstance(item, Problem) else _checked(item, settings)


def _checked(document: Document, settings: ReadSettings) -> Document | Problem:
    if not document.text or document.text.isspace():
        return Problem("empty", document.where)
    try:  # a JSON escape can spell half of a character, which has no UTF-8 form
        size = len(document.text.encode())
    except UnicodeEncodeError:
        return Problem("bad_utf8", document.where)
    return document if size <= settings.max_document_bytes else Problem("huge", document.where)


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    ending = compression(path)
    if ending == ".zst":
        zstandard = needs("zstandard", path)
        with open(path, "rb") as packed, io.BufferedReader(_Zstd(packed, zstandard), 1 << 20) as f:
            yield f
        return
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(ending, open)(path, "rb") as file:
        yield file


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a file; the package's own reader ends a cut file as if
    it were whole.
    """

    def __init__(self, packed: BinaryIO, zstandard: Any) -> None:
        self._packed, self._new = packed, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready = self._left = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; EOFError if the file ends within a frame."""
        while not self._ready:
            content = self._left or self._packed.read(1 << 17)
            if not content:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._left = self._frame.decompress(content), b""
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _is_damage(error: Exception) -> bool:
    """Whether reading failed because of what the file holds; a ConfigError is another matter."""
    known = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError)
    return isinstance(error, known) or type(error).__module__.startswith(("zstandard", "pyarrow"))


def _decoded(content: bytes, where: str) -> Document | Problem:
    try:
        return Document(content.decode("utf-8"), where)
    except UnicodeDecodeError:
        return Problem("bad_utf8", where)


def _read_text(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    if settings.documents == "file":
        yield _whole_file(piece.path, settings.max_document_bytes)
        return
    by_line = settings.documents == "line"
    paragraph, begun, size = [], "", 0
    for line, where in _lines(piece, settings.max_document_bytes):
        if isinstance(line, Problem):
            yield line
        elif by_line:
            yield _decoded(line.rstrip(b"\r\n"), where)
        elif line.strip():
            begun = begun or where
            size += len(line)
            if size <= settings.max_document_bytes:
                paragraph.append(line)
        elif begun:
            yield _paragraph(paragraph, begun, size > settings.max_document_bytes)
            paragraph, begun, size = [], "", 0
    if begun:
        yield _paragraph(paragraph, begun, size > settings.max_document_bytes)


def _paragraph(lines: list[bytes], where: str, huge: bool) -> Document | Problem:
    return Problem("huge", where) if huge else _decoded(b"".join(lines), where)


def _whole_file(path: str, limit: int) -> Document | Problem:
    try:
        with _open(path) as file:
            content = file.read(limit + 1)
    except Exception as error:
        if not _is_damage(error):
            raise
        return Problem("damaged", path)
    if b"\0" in content[:8192]:
        return Problem("binary", path)
    if len(content) > limit:
        return Problem("huge", path)
    return _decoded(content.removeprefix(b"\xef\xbb\xbf"), path)


def _read_jsonl(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    limit = _ESCAPED * settings.max_document_bytes + _LINE_SLACK
    for line, where in _lines(piece, limit):
        if isinstance(line, Problem):
            yield line
            continue
        if not line.strip():
            yield Problem("empty", where)
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield Problem("bad_utf8", where)
        except (ValueError, RecursionError):
            yield Problem("broken_line", where)
        else:
            text = row.get(settings.text_field) if isinstance(row, dict) else None
            kind = "no_text" if isinstance(row, dict) else "broken_line"
            yield Document(text, where) if isinstance(text, str) else Problem(kind, where)


def _lines(piece: Piece, limit: int) -> Iterator[tuple[bytes | Problem, str]]:
    """The lines that begin in a piece, and where; one above `limit` bytes is never in memory."""
    number = offset = 0
    where = piece.path
    try:
        with _open(piece.path) as file:
            if piece.start:  # the line that holds the byte before belongs to the piece before
                file.seek(piece.start - 1)
                offset = piece.start - 1 + _skip_line(file)
            while piece.stop is None or offset < piece.stop:
                number += 1
                where = f"{piece.path}:{number}"
                if piece.start:
                    where = f"{piece.path}: byte {offset}"
                line = file.readline(limit + 1)
                if not line:
                    return
                offset += len(line)
                if len(line) > limit:
                    offset += 0 if line.endswith(b"\n") else _skip_line(file)
                    yield Problem("huge", where), where
                else:
                    yield line, where
    except Exception as error:
        if not _is_damage(error):
            raise
        yield Problem("damaged", where), where


def _skip_line(file: BinaryIO) -> int:
    """Bytes up to and with the next newline."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _read_parquet(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    parquet = needs("pyarrow.parquet", piece.path)
    row = 0
    try:
        file = parquet.ParquetFile(piece.path)
        groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
        _check_column(piece.path, file.schema_arrow.names, settings.text_field)
        row = sum(file.metadata.row_group(k).num_rows for k in range(piece.start))
        for batch in file.iter_batches(256, list(groups), columns=[settings.text_field]):
            yield from _column(batch.column(0), piece.path, row)
            row += batch.num_rows
    except Exception as error:
        if not _is_damage(error):
            raise
        yield Problem("damaged", f"{piece.path}: row {row}")


def _read_arrow(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    """An Arrow file of either layout; datasets that were saved to disk have the streamed one."""
    arrow = needs("pyarrow", piece.path)
    row = 0
    try:
        with arrow.memory_map(piece.path) as source:
            try:
                reader = arrow.ipc.open_file(source)
                batches: Any = (reader.get_batch(k) for k in range(reader.num_record_batches))
            except arrow.ArrowInvalid:
                source.seek(0)
                reader = batches = arrow.ipc.open_stream(source)
            _check_column(piece.path, reader.schema.names, settings.text_field)
            for batch in batches:
                yield from _column(batch.column(settings.text_field), piece.path, row)
                row += batch.num_rows
    except Exception as error:
        if not _is_damage(error):
            raise
        yield Problem("damaged", f"{piece.path}: row {row}")


def _check_column(path: str, names: list[str], field: str) -> None:
    if field not in names:
        raise ConfigError(f"--text_field={field}: {path} has the columns {', '.join(names)}")


def _column(column: Any, path: str, row: int) -> Iterator[Document | Problem]:
    for k, value in enumerate(column):
        where = f"{path}: row {row + k}"
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            yield Problem("bad_utf8", where)
            continue
        if isinstance(text, bytes):
            yield _decoded(text, where)
        else:
            yield Document(text, where) if isinstance(text, str) else Problem("no_text", where)


def _read_hub(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    dataset = open_hub(piece.path)
    if piece.stop is not None and piece.stop > 1:
        dataset = dataset.shard(num_shards=piece.stop, index=piece.start)
    for row, fields in enumerate(dataset):
        where = f"hf:{piece.path}: part {piece.start}, row {row}"
        text = fields.get(settings.text_field)
        yield Document(text, where) if isinstance(text, str) else Problem("no_text", where)
