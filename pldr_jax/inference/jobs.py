"""Batch jobs: prompts from files, and results to a file that outlives a killed job. No JAX."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pldr_jax.config import ConfigError, SamplingConfig
from pldr_jax.config.annotations import show
from pldr_jax.files import hold, whole_file

JobId = str | int

SETTINGS = tuple(one.name for one in dataclasses.fields(SamplingConfig))
"""What a line may state for itself."""
KEYS = ("id", "prompt", "tokens", *SETTINGS)
"""All keys of a line."""

LONGEST_LINE = 1 << 26
"""Bytes; what is longer, such as a device without an end, is no prompt."""
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_RESULT_START = b'{"id": '
"""How every line of an output begins."""
_SYNC_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt.

    Attributes:
      id: what the line calls itself, or its number.
      prompt: text, or token ids.
      settings: the line's own fields of `SamplingConfig`.
      index: of the line, from 0; blank ones do not count, those that cannot be read do.
    """

    id: JobId
    prompt: str | list[int]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    index: int = 0

    def digest(self, sampling: SamplingConfig) -> str:
        """Names the prompt and its settings, so that a job that goes on notices others."""
        stated = json.dumps([self.prompt, dataclasses.asdict(sampling)])
        return hashlib.sha256(stated.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that cannot be read, why in one line, and its id, if it has one of its own."""

    number: int
    reason: str
    id: JobId | None = None


def read_prompts(
    prompts: Sequence[str] = (), source: str | None = None, stdin: BinaryIO | None = None
) -> Iterator[Job | BadLine]:
    """The jobs of `prompts`, or else of `source`, read line by line as they are asked for.

    Only the ids stay in memory, so that one that comes twice is noticed.

    Args:
      prompts: texts; their ids are 1, 2, ...
      source: a text file (a prompt a line), a JSONL file (an object a line, see `KEYS`), or "-"
        for `stdin`. The suffix says which (.txt; .jsonl, .json or .ndjson); without one of them it
        is JSONL if the first character that is not white space is "{".
      stdin: None is that of the process.

    Raises:
      ConfigError: at once, if the source cannot be opened; later, if a line has no end.
    """
    if source is None:
        return (Job(i + 1, prompt, index=i) for i, prompt in enumerate(prompts))
    suffix = Path(source).suffix.lower()
    if source == "-":
        file, suffix, source = stdin or sys.stdin.buffer, "", "stdin"
    else:
        file = _open(source)
    is_json = True if suffix in _JSON_SUFFIXES else False if suffix == ".txt" else None
    return _read_lines(file, source, is_json)


def count_prompts(source: str) -> int | None:
    """Lines of a file, without those that are blank; None where it can be read only once."""
    if not Path(source).is_file():
        return None
    return sum(1 for line in _lines(_open(source), source) if line.strip())


def _open(source: str) -> BinaryIO:
    try:
        return open(source, "rb")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"--prompt_file {source!r}: {reason}; name a file of prompts, or - for stdin"
        ) from None


def _lines(file: BinaryIO, source: str) -> Iterator[bytes]:
    """The lines of a file, of bounded length.

    Raises:
      ConfigError: it cannot be read, or a line has no end.
    """
    with file:
        try:
            while raw := file.readline(LONGEST_LINE):
                if len(raw) == LONGEST_LINE:
                    raise ConfigError(
                        f"--prompt_file {source!r}: has a line of {LONGEST_LINE:,} bytes; is it a "
                        "file of prompts?"
                    )
                yield raw
        except OSError as error:
            raise ConfigError(f"--prompt_file {source!r}: {error.strerror or error}") from None


def _read_lines(file: BinaryIO, source: str, is_json: bool | None) -> Iterator[Job | BadLine]:
    seen: set[JobId] = set()
    index = 0
    for number, raw in enumerate(_lines(file, source), start=1):
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
) -> Job | BadLine:
    try:
        line = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        return BadLine(number, "is not UTF-8")
    if not is_json:
        return Job(number, line, index=index)
    try:
        entry = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return BadLine(number, f"is not JSON ({error})")
    if not isinstance(entry, dict):
        return BadLine(number, 'is not an object, such as {"prompt": "..."}')
    name = entry.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        return BadLine(number, "id must be a string or an integer")
    if name in seen:
        return BadLine(number, f"the id {show(name)} was there before")
    seen.add(name)
    try:
        return _job(entry, name, index)
    except ValueError as error:  # a ConfigError is one
        return BadLine(number, str(error), name)


def _job(entry: dict[str, Any], name: JobId, index: int) -> Job:
    """The job of an object; ValueError with one line if it is none."""
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"unknown key {show(key)}; the keys are {', '.join(KEYS)}")
    if ("prompt" in entry) == ("tokens" in entry):
        raise ValueError("must have either prompt or tokens")
    prompt, tokens = entry.get("prompt", ""), entry.get("tokens", [])
    if not isinstance(prompt, str):
        raise ValueError("prompt must be a string; token ids are given as tokens")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of integers")
    stated = {key: entry[key] for key in SETTINGS if key in entry}
    checked = SamplingConfig(**stated)
    settings = {key: getattr(checked, key) for key in stated}
    return Job(name, prompt if "prompt" in entry else tokens, settings, index)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


class JsonlWriter:
    """Appends results to a file, a JSON object a line; each is in the file when `write` returns.

    Args:
      path: the file; no other job can write to it meanwhile.
      resume: continue the file of a job that was stopped; a half-written last line, and zeros that
        a loss of power left in its place, are dropped.
      retry_failed: as `resume`, and the results that are errors are dropped, too.

    Attributes:
      done: ids that the file had, each with the digest of its prompt and settings; lines without
        an id have their number.
      failed: how many of those ended with an error.

    Raises:
      ConfigError: the file cannot be written, is in use, is not empty without `resume`, or holds
        something else than results.
    """

    def __init__(
        self,
        path: str | Path,
        resume: bool = False,
        retry_failed: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done: dict[JobId | tuple[int], str | None] = {}
        self.failed = 0
        self._clock, self._path = clock, Path(path)
        try:
            self._file = self._opened()
            try:
                self._continue(resume or retry_failed, retry_failed)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise ConfigError(f"--output {str(path)!r}: {error.strerror or error}") from None
        self._synced = clock()

    def _opened(self) -> BinaryIO:
        file: Any = open(self._path, "ab", buffering=0)
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and not hold(file):
            file.close()
            raise ConfigError(
                f"--output {str(self._path)!r}: another job is writing to it; wait for its end, or "
                "name another file"
            )
        return file

    def _continue(self, resume: bool, retry_failed: bool) -> None:
        """Notes the results that are there, and cuts what is not to stay."""
        size = os.fstat(self._file.fileno()).st_size
        if size and not resume:
            raise ConfigError(
                f"--output {str(self._path)!r}: is there already; add --resume to continue it, or "
                "name another file"
            )
        if not size:
            return
        whole = self._read()
        if whole < size:
            self._file.truncate(whole)
        if retry_failed and self.failed:
            with whole_file(self._path) as temporary, open(temporary, "wb") as kept:
                with open(self._path, "rb") as lines:
                    kept.writelines(x for x in lines if json.loads(x)["finish_reason"] != "error")
                kept.flush()
                os.fsync(kept.fileno())
            self._file.close()
            self._file, self.done, self.failed = self._opened(), {}, 0
            self._read()

    def _read(self) -> int:
        """Notes the results that are there; returns the bytes of the whole lines."""
        whole = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    half = line.rstrip(b"\0")[: len(_RESULT_START)]
                    if not _RESULT_START.startswith(half):
                        raise self._foreign(number)
                    break
                try:
                    result = json.loads(line)
                    name = result["id"]
                    self.done[(result["line"],) if name is None else name] = result.get("input")
                    self.failed += result["finish_reason"] == "error"
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise self._foreign(number) from None
                whole += len(line)
        return whole

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(
            f"--output {str(self._path)!r}: line {number} is not a result; --resume continues only "
            "a file that this program wrote"
        )

    def has(self, job: Job, digest: str) -> bool:
        """Whether the file had the result of a job.

        Raises:
          ConfigError: it is that of another prompt, or of other settings.
        """
        if job.id not in self.done:
            return False
        if self.done[job.id] not in (None, digest):
            raise ConfigError(
                f"--output {str(self._path)!r}: the result with id {show(job.id)} is that of "
                "another prompt, or of other settings; resume with the ones of then, or name "
                "another file"
            )
        return True

    def write(self, result: dict[str, Any]) -> None:
        """Appends a result, whose first key is `id`."""
        data = memoryview(encode_result(result))
        try:
            while data:  # an unbuffered file may take a part
                data = data[self._file.write(data) :]
            if self._clock() - self._synced >= _SYNC_SECONDS:
                self._sync()
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Brings everything to the disk."""
        if not self._file.closed:
            with contextlib.closing(self._file):
                self._sync()

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


def encode_result(result: dict[str, Any]) -> bytes:
    """A result as a line of JSON."""
    try:
        return (json.dumps(result, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can spell
        return (json.dumps(result) + "\n").encode("utf-8")
