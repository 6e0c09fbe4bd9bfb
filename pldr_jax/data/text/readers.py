"""Documents of every kind of input, and whatever stands in their place that cannot be used.

A reader yields a `Document` or a `Problem`, and keeps one document in memory at a time. What is to
be done about a problem is for the caller to say.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal

from pldr_jax.config import ConfigError
from pldr_jax.data.text.chat import ChatError, ChatFormat, Pair, find_template, is_conversation
from pldr_jax.data.text.inputs import Piece, needs, open_hub
from pldr_jax.data.text.streams import FORMAT_ERRORS, open_utf8
from pldr_jax.data.text.tokenizer import Tokenizer

PROBLEMS = {
    "bad_utf8": "not UTF-8",
    "broken_line": "not a JSON object",
    "no_text": "without a text in the field",
    "empty": "empty",
    "huge": "larger than --max_document_bytes",
    "binary": "not text: a NUL among the first bytes",
    "damaged": "damaged file, whose rest is left out",
    "unreadable": "cannot be read",
    "special": "no file to read from",
    "roles": "without a conversation whose messages are in order",
    "template": "refused by the chat template",
}
"""Kinds of problems, and their meaning."""

_LINE_SLACK = 1 << 20
_ESCAPED = 6
"""Bytes of one character at most, written as a JSON escape, over those of UTF-8."""
_MARK = b"\xef\xbb\xbf"
"""UTF-8's byte-order mark, which some programs write at the start of a file."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it was found: `file:line`, or `file: byte N`, or `file: row N`.

    Attributes:
      pairs: of a conversation, its prompts and answers; the text is the whole of it.
    """

    text: str
    where: str
    pairs: tuple[Pair, ...] = ()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that gives no document; `kind` is one of `PROBLEMS`."""

    kind: str
    where: str
    reason: str = ""

    @property
    def place(self) -> str:
        """`a.txt (Permission denied)`."""
        return f"{self.where} ({self.reason})" if self.reason else self.where

    def __str__(self) -> str:
        return f"{self.place}: {PROBLEMS[self.kind]}"


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """How inputs become documents.

    Attributes:
      text_field: of JSON lines, Parquet, Arrow and hub rows.
      documents: what one document of a text file is; a "block" is a file, or some `block_bytes` of
        one that is larger than four of them, cut at a newline.
      max_document_bytes: UTF-8 bytes above which a document is a problem.
      chat: how the conversations of JSON lines are written; None where these are texts.
    """

    text_field: str = "text"
    documents: Literal["file", "line", "paragraph", "block"] = "file"
    max_document_bytes: int = 64 << 20
    block_bytes: int = 64 << 10
    chat: ChatFormat | None = None


def read_documents(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
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
        "unreadable": lambda piece, _: iter([Problem(piece.kind, piece.path, piece.reason)]),
        "special": lambda piece, _: iter([Problem(piece.kind, piece.path, piece.reason)]),
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


def _failure(error: Exception, where: str) -> Problem:
    """What stopped the reading of a file; any other error is raised again."""
    if isinstance(error, UnicodeError):
        return Problem("bad_utf8", where)
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not a format's
        return Problem("unreadable", where, str(error.strerror))
    if isinstance(error, FORMAT_ERRORS) or type(error).__module__.startswith(
        ("zstandard", "pyarrow")
    ):
        return Problem("damaged", where)
    raise error


def _decoded(content: bytes, where: str) -> Document | Problem:
    try:
        return Document(content.decode("utf-8"), where)
    except UnicodeDecodeError:
        return Problem("bad_utf8", where)


def _read_text(piece: Piece, settings: ReadSettings) -> Iterator[Document | Problem]:
    limit = settings.max_document_bytes
    if settings.documents == "file":
        yield from _blocks(piece.path, limit, limit)
    elif settings.documents == "block":
        yield from _blocks(piece.path, 4 * settings.block_bytes, settings.block_bytes)
    elif settings.documents == "line":
        for line, where in _lines(piece, limit):
            yield line if isinstance(line, Problem) else _decoded(line.rstrip(b"\r\n"), where)
    else:
        yield from _paragraphs(piece, limit)


def _paragraphs(piece: Piece, limit: int) -> Iterator[Document | Problem]:
    lines, start, size = [], "", 0
    for line, where in _lines(piece, limit):
        if isinstance(line, Problem):
            yield line
        elif line.strip():
            start = start or where
            size += len(line)
            if size <= limit:
                lines.append(line)
        elif start:
            yield _decoded(b"".join(lines), start) if size <= limit else Problem("huge", start)
            lines, start, size = [], "", 0
    if start:
        yield _decoded(b"".join(lines), start) if size <= limit else Problem("huge", start)


def _blocks(path: str, whole: int, block: int) -> Iterator[Document | Problem]:
    """A text file as one document, or, above `whole` bytes, in blocks of `block` to twice as much.

    Blocks end behind a newline where there is one, else between two characters. A file of one block
    that is too large is a problem.
    """
    offset = 0
    try:
        with open_utf8(path) as file:
            content = file.read(whole + 1)
            if b"\0" in content[:8192]:
                yield Problem("binary", path)
                return
            content = content.removeprefix(_MARK)
            if len(content) <= whole:
                yield _decoded(content, path)
                return
            if block == whole:
                yield Problem("huge", path)
                return
            while content:
                content += file.read(max(2 * block - len(content), 0))
                end = _block_end(content, block)
                yield _decoded(content[:end], f"{path}: byte {offset}")
                content, offset = content[end:], offset + end
    except Exception as error:
        yield _failure(error, f"{path}: byte {offset}" if offset else path)


def _block_end(content: bytes, block: int) -> int:
    newline = content.find(b"\n", block - 1, 2 * block)
    if newline >= 0:
        return newline + 1
    end = min(block, len(content))
    while end < len(content) and content[end] & 0xC0 == 0x80:
        end += 1
    return end


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
            yield _of_row(row, settings, where)


def _of_row(row: Any, settings: ReadSettings, where: str) -> Document | Problem:
    if not isinstance(row, dict):
        return Problem("broken_line", where)
    if settings.chat is None:
        text = row.get(settings.text_field)
        return Document(text, where) if isinstance(text, str) else Problem("no_text", where)
    if not is_conversation(row):
        return Problem("roles", where, "neither messages, nor prompt and completion")
    try:
        pairs = settings.chat.pairs(row)
    except ChatError as error:
        return Problem(error.kind, where, str(error))
    return Document("".join(pairs[-1]), where, pairs)


def with_chat(
    settings: ReadSettings,
    pieces: Sequence[Piece],
    template: str | None,
    tokenizer_path: str | None,
    tokenizer: Tokenizer | None,
) -> ReadSettings:
    """The settings, with the chat format of the inputs where they hold conversations.

    Args:
      template: file that was named for it.
      tokenizer_path: of the tokenizer, beside which there may be a template.
      tokenizer: None is one that will be trained.

    Raises:
      ConfigError: there is no such template, or it was named for other inputs.
    """
    if not holds_conversations(pieces, settings):
        if template is not None:
            raise ConfigError(
                f"Data.chat_template = {template!r}: is for JSON lines of messages, or of prompt "
                "and completion, and the inputs hold others; leave it at None"
            )
        return settings
    chat = ChatFormat.of(find_template(template, tokenizer_path), tokenizer)
    return dataclasses.replace(settings, chat=chat)


def holds_conversations(pieces: Sequence[Piece], settings: ReadSettings) -> bool:
    """Whether inputs are JSON lines, the first of which that can be read is a conversation."""
    files = [piece for piece in pieces if not piece.reason]
    if any(piece.kind != "jsonl" for piece in files):
        return False
    limit = _ESCAPED * settings.max_document_bytes + _LINE_SLACK
    for piece in files:
        for line, _ in itertools.islice(_lines(piece, limit), 100):
            try:
                row = {} if isinstance(line, Problem) else json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and row:
                text = row.get(settings.text_field)
                return not isinstance(text, str) and is_conversation(row)
    return False


def _lines(piece: Piece, limit: int) -> Iterator[tuple[bytes | Problem, str]]:
    """The lines that begin in a piece, and where; one above `limit` bytes is never in memory."""
    number = offset = 0
    where = piece.path
    try:
        with open_utf8(piece.path) as file:
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
                is_first, offset = offset == 0, offset + len(line)
                if len(line) > limit:
                    offset += 0 if line.endswith(b"\n") else _skip_line(file)
                    yield Problem("huge", where), where
                else:
                    yield line.removeprefix(_MARK) if is_first else line, where
    except Exception as error:
        yield _failure(error, where), where


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
        yield _failure(error, f"{piece.path}: row {row}")


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
        yield _failure(error, f"{piece.path}: row {row}")


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
