"""Batch jobs: prompts from files, and results to a file that outlives a killed job. No JAX."""

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pldr_jax.config import ConfigError, GenerationConfig

JobId = str | int

NUMBERS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
}
"""Settings that a row may state for itself; `GenerationConfig` has their bounds."""
LISTS: dict[str, type] = {"stop": str, "stop_ids": int}
KEYS = ("id", "prompt", "tokens", *NUMBERS, *LISTS)
"""All keys of a row."""

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_ROW_START = b'{"id": '
"""How every line of an output begins."""
_SYNC_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt.

    Attributes:
      id: what the row calls itself, or its line number.
      prompt: text, or token ids.
      settings: the row's own values of `NUMBERS` and `LISTS`.
      index: of the row, from 0; blank lines do not count, rows that cannot be read do.
    """

    id: JobId
    prompt: str | list[int]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: int = 0


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why in one line."""

    line_number: int
    reason: str


def read_prompts(
    prompts: Sequence[str] = (), source: str | None = None, stdin: BinaryIO | None = None
) -> Iterator[Job | BadRow]:
    """The jobs of `prompts`, or else of `source`, read line by line as they are asked for.

    Only the ids stay in memory, so that one that comes twice is noticed.

    Args:
      prompts: texts; their ids are 1, 2, ...
      source: a text file (a prompt a line), a JSONL file (an object a line, see `KEYS`), or "-"
        for `stdin`. The suffix says which (.txt; .jsonl, .json or .ndjson); without one of them it
        is JSONL if the first character that is not white space is "{".
      stdin: None is that of the process.

    Raises:
      ConfigError: at once, if the source cannot be opened.
    """
    if source is None:
        return (Job(i + 1, prompt, index=i) for i, prompt in enumerate(prompts))
    suffix = Path(source).suffix.lower()
    if source == "-":
        file, suffix = stdin or sys.stdin.buffer, ""
    else:
        file = _open(source)
    is_json = True if suffix in _JSON_SUFFIXES else False if suffix == ".txt" else None
    return _read_lines(file, is_json)


def count_prompts(source: str) -> int | None:
    """Rows of a file, without those that are blank; None where it can be read only once."""
    if not Path(source).is_file():
        return None
    with _open(source) as file:
        return sum(1 for line in file if line.strip())


def _open(source: str) -> BinaryIO:
    try:
        return open(source, "rb")
    except OSError as error:
        raise ConfigError(f"--prompt_file {source!r}: {error.strerror or error}") from None


def _read_lines(file: BinaryIO, is_json: bool | None) -> Iterator[Job | BadRow]:
    seen: set[JobId] = set()
    index = 0
    with file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            if is_json is None:
                is_json = raw.lstrip().startswith(b"{")
            yield _parse_line(raw, number, index, is_json, seen)
            index += 1


def _parse_line(
    raw: bytes, number: int, index: int, is_json: bool, seen: set[JobId]
) -> Job | BadRow:
    try:
        line = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        if not is_json:
            return Job(number, line, index=index)
        job = _parse_row(line, number, index)
    except UnicodeDecodeError:
        return BadRow(number, "is not UTF-8")
    except ValueError as error:
        return BadRow(number, str(error))
    if job.id in seen:
        return BadRow(number, f"the id {job.id!r} was there before")
    seen.add(job.id)
    return job


def _parse_row(line: str, number: int, index: int) -> Job:
    """The job of a JSONL row; ValueError with one line if it is none."""
    try:
        row = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError('is not an object, such as {"prompt": "..."}')
    for key in row:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; the keys are {', '.join(KEYS)}")
    row_id = row.get("id", number)
    if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
        raise ValueError("id must be a string or an integer")
    if ("prompt" in row) == ("tokens" in row):
        raise ValueError("must have either prompt or tokens")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise ValueError("prompt must be a string; token ids are given as tokens")
    if "tokens" in row and not _is_list(row["tokens"], int):
        raise ValueError("tokens must be a list of integers")
    settings = {key: row[key] for key in (*NUMBERS, *LISTS) if key in row}
    _check_settings(settings)
    return Job(row_id, row["prompt"] if "prompt" in row else row["tokens"], settings, index)


def _check_settings(settings: dict[str, Any]) -> None:
    for name, kind in NUMBERS.items():
        value = settings.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError(f"{name} must be {'an integer' if kind is int else 'a number'}")
    for name, kind in LISTS.items():
        if not _is_list(settings.get(name, []), kind):
            word = "strings" if kind is str else "integers"
            raise ValueError(f"{name} must be a list of {word}")
    if "" in settings.get("stop", []):
        raise ValueError("stop has an empty string")
    try:
        settings |= {
            name: kind(settings[name]) for name, kind in NUMBERS.items() if name in settings
        }
        GenerationConfig(**{name: settings[name] for name in NUMBERS if name in settings})
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("Generation.")) from None
    except OverflowError:
        raise ValueError("a number is too large") from None


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


class JsonlWriter:
    """Appends results to a file, a JSON object a line; each is in the file when `write` returns.

    Args:
      path: the file.
      resume: continue the file of a job that was stopped; a half-written last line is dropped.

    Attributes:
      done: ids that the file had.
      failed: how many of those ended with an error.

    Raises:
      ConfigError: the file cannot be written, is not empty without `resume`, or holds something
        else than results.
    """

    def __init__(
        self, path: str | Path, resume: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.done: set[JobId] = set()
        self.failed = 0
        self._clock, self._path = clock, Path(path)
        try:
            size = self._path.stat().st_size if self._path.exists() else 0
            if size and not resume:
                raise ConfigError(
                    f"--output {str(path)!r}: is there already; add --resume to continue it, or "
                    "name another file"
                )
            whole = self._read() if size else 0
            self._file = open(self._path, "ab", buffering=0)
            if whole < size:
                self._file.truncate(whole)
        except OSError as error:
            raise ConfigError(f"--output {str(path)!r}: {error.strerror or error}") from None
        self._synced = clock()

    def _read(self) -> int:
        """Notes the rows that are there; returns the bytes of the whole lines."""
        whole = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    if not line.startswith(_ROW_START[: len(line)]):
                        raise self._foreign(number)
                    break
                try:
                    row = json.loads(line)
                    self.done.add(row["id"])
                    self.failed += row["finish_reason"] == "error"
                except (ValueError, KeyError, TypeError):
                    raise self._foreign(number) from None
                whole += len(line)
        return whole

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"--output {str(self._path)!r}: line {number} is not a result; --resume continues only "
            "a file that this program wrote"
        )

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, whose first key is `id`."""
        data = memoryview(encode_row(row))
        while data:  # an unbuffered file may take a part
            data = data[self._file.write(data) :]
        if self._clock() - self._synced >= _SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Brings everything to the disk."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not a file, but a pipe
                raise
        self._synced = self._clock()


def encode_row(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can spell
        return (json.dumps(row) + "\n").encode("utf-8")
