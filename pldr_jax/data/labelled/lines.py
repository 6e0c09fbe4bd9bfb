"""Lines of JSONL with the columns of a task, each checked: what is wrong names file and line."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pldr_jax.config import ConfigError, TaskConfig
from pldr_jax.config.annotations import show
from pldr_jax.data.text.inputs import find_inputs
from pldr_jax.data.text.streams import FORMAT_ERRORS, open_utf8


class Line(NamedTuple):
    """One labelled text.

    Attributes:
      texts: a text, two of them, or the words of one.
      label: of a text; of each word, None where it has none; or the answers, (text, first
        character in the context).
      where: FILE:LINE.
    """

    texts: tuple[str, ...]
    label: Any
    where: str


def read_lines(task: TaskConfig, source: str, field: str) -> list[Line]:
    """The labelled texts of files of JSONL, in their order.

    Args:
      source: a file, a folder or a glob.
      field: that names it, for errors.

    Raises:
      ConfigError: no JSONL, or the first line that cannot be used, by file and line.
    """
    lines = []
    for piece in find_inputs([source]):
        if piece.kind != "jsonl":
            raise ConfigError(f"{field} = {source!r}: {piece.path} is no JSONL; a task needs it")
        lines += list(_lines_of(task, piece.path))
    if not lines:
        raise ConfigError(f"{field} = {source!r}: holds no line")
    return lines


def _lines_of(task: TaskConfig, path: str) -> Iterator[Line]:
    try:
        with open_utf8(path) as file:
            for number, content in enumerate(file, 1):
                if content.strip():
                    yield _line(task, content, f"{path}:{number}")
    except (OSError, *FORMAT_ERRORS) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _line(task: TaskConfig, content: bytes, where: str) -> Line:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: is not a JSON object in UTF-8") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is not a JSON object in UTF-8")
    for column in (*task.text_columns, task.label_column):
        if column not in row:
            raise ConfigError(
                f"{where}: has no column {column!r}; name its own with Task.text and Task.label"
            )
    values, label = [row[column] for column in task.text_columns], row[task.label_column]
    if task.kind == "token":
        return _words(task, values[0], label, where)
    for column, text in zip(task.text_columns, values, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: {column} = {show(text)}: must be a text")
    if task.kind == "sequence":
        return Line(tuple(values), label_name(label, f"{where}: {task.label_column}"), where)
    return Line(tuple(values), _answers(label, values[1], where, task.label_column), where)


def label_name(value: Any, where: str) -> str:
    """A label as the text that names it: true is "true", 3 is "3".

    Raises:
      ConfigError: neither a text, a number nor a truth value.
    """
    if isinstance(value, bool | int) or (isinstance(value, str) and value):
        return value if isinstance(value, str) else json.dumps(value)
    raise ConfigError(f"{where} = {show(value)}: must be a label, a text or an integer")


def _words(task: TaskConfig, words: Any, labels: Any, where: str) -> Line:
    column, name = task.text_columns[0], task.label_column
    if not isinstance(words, list) or not words or not all(_is_word(word) for word in words):
        raise ConfigError(f"{where}: {column} = {show(words)}: must be a list of words")
    if not isinstance(labels, list) or len(labels) != len(words):
        count = len(labels) if isinstance(labels, list) else show(labels)
        raise ConfigError(f"{where}: {name}: must be {len(words)} labels, one a word, not {count}")
    named = [None if x is None else label_name(x, f"{where}: {name}") for x in labels]
    return Line(tuple(words), named, where)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _answers(value: Any, context: str, where: str, column: str) -> list[tuple[str, int]]:
    """Answers as {"text": [...], "answer_start": [...]}, or one of each.

    Raises:
      ConfigError: another form, or a span that is not the answer's in the context.
    """
    texts, starts = (
        (value.get("text"), value.get("answer_start")) if isinstance(value, dict) else (None, None)
    )
    texts = [texts] if isinstance(texts, str) else texts
    starts = [starts] if isinstance(starts, int) else starts
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ConfigError(
            f"{where}: {column} = {show(value)}: must be {{'text': [...], 'answer_start': [...]}}"
        )
    if not texts:
        raise ConfigError(f"{where}: {column}: has no answer; leave the line out")
    for text, start in zip(texts, starts, strict=True):
        whole = isinstance(text, str) and text.strip() and type(start) is int
        if not whole or start < 0 or context[start : start + len(text)] != text:
            raise ConfigError(
                f"{where}: {column}: the answer {show(text)} does not stand at character "
                f"{show(start)} of the text"
            )
    return list(zip(texts, starts, strict=True))
