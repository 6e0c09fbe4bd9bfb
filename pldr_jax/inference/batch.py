"""The loop of `infer.py`: jobs in, results out in the order in which they finish."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import jax

from pldr_jax.api import Generation, LanguageModel
from pldr_jax.config import ConfigError, GenerationConfig
from pldr_jax.inference.jobs import (
    NUMBERS,
    BadRow,
    Job,
    JsonlWriter,
    encode_row,
)
from pldr_jax.inference.progress import JobProgress
from pldr_jax.inference.request import CacheMode, Request, check_request
from pldr_jax.model.deductive import identity_g_lm, read_g_lm

SEEDS = 2**32
TOGETHER = 8
"""Tokens decoded between two looks at the texts, where none is shown as it grows."""


@dataclasses.dataclass
class Running:
    """A job that is being decoded: its stop strings, the tokens counted and the text shown."""

    job: Job
    stop: tuple[str, ...]
    counted: int = 0
    shown: str = ""


class Output:
    """Where results go.

    Args:
      progress: counts them.
      writer: JSONL file; None is stdout.
      json: stdout takes JSONL and not text.
      logprobs: JSONL has the log-probabilities.
      stream: texts as they grow: "text" (of one prompt), "pieces" (lines of [id] piece), or None.
    """

    def __init__(
        self,
        progress: JobProgress,
        writer: JsonlWriter | None = None,
        json: bool = False,
        logprobs: bool = False,
        stream: Literal["text", "pieces"] | None = None,
    ) -> None:
        self.progress, self.writer, self.stream = progress, writer, stream
        self._json, self._logprobs = json, logprobs
        self._begun = False

    @property
    def steps(self) -> int:
        """Tokens decoded between two looks at the texts."""
        return 1 if self.stream == "text" else TOGETHER

    def grow(self, running: Running, result: Generation) -> None:
        """A text has grown, and has perhaps ended."""
        self.progress.add_tokens(max(len(result.tokens) - running.counted, 0))
        running.counted = max(len(result.tokens), running.counted)
        if self.stream is None:
            return
        if self.stream == "text" and not self._begun and result.error is None:
            _print(str(running.job.prompt))
            self._begun = True
        text = result.text if result.finish_reason else _settled(result.text, running.stop)
        if text.startswith(running.shown) and text != running.shown:
            piece = text[len(running.shown) :]
            if self.stream == "pieces":
                escaped = piece.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
                piece = f"[{running.job.id}] {escaped}\n"
            _print(piece)
            running.shown = text

    def finish(self, job: Job, result: Generation, prompt: str = "") -> None:
        """A job has ended; `prompt` is its text."""
        if self._begun:
            _print("\n")
        if self.writer is not None or self._json:
            row = self._row(job, result)
            if self.writer is not None:
                self.writer.write(row)
            else:
                _print(encode_row(row).decode())
        elif self.stream is None and result.error is None:
            text = result.text if result.text or not result.tokens else f" {result.tokens}"
            _print(f"{prompt}{text}\n--- {len(result.tokens)} tokens, {result.finish_reason}\n")
        if result.error is not None:
            self.progress.print(f"error: prompt {job.id}: {result.error}")
        elif self.stream == "text":
            self.progress.print(f"--- {len(result.tokens)} tokens, {result.finish_reason}")
        self.progress.finish(failed=result.error is not None)

    def bad(self, row: BadRow) -> None:
        """A row could not be read."""
        self.progress.print(f"error: line {row.line_number}: {row.reason}")
        self.progress.finish(failed=True)

    def _row(self, job: Job, result: Generation) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": job.id,
            "text": result.text,
            "tokens": result.tokens,
            "finish_reason": result.finish_reason,
        }
        if self._logprobs:
            row["logprobs"] = [x if math.isfinite(x) else None for x in result.logprobs]
        if result.error is not None:
            row["error"] = result.error
        return row


def run_batch(
    lm: LanguageModel,
    rows: Iterator[Job | BadRow],
    settings: GenerationConfig,
    output: Output,
    stop: Sequence[str] = (),
    total: int | None = None,
) -> None:
    """Continues every job; none is kept once it is written.

    Args:
      rows: as `read_prompts` gives them.
      settings: of all jobs; a row's own ones win.
      stop: strings that end a text, for jobs without their own.
      total: how many there are, if it is known.

    Raises:
      ConfigError: settings that this model rules out.
    """
    g_lm, mode, rows = _g_lm(lm, rows, settings, stop)
    done = output.writer.done if output.writer is not None else set()
    running: dict[int, Running] = {}

    def requests() -> Iterator[Request]:
        for row in rows:
            if isinstance(row, BadRow):
                output.bad(row)
            elif row.id not in done:
                try:
                    request = make_request(lm, row, settings, stop)
                except ConfigError as error:
                    output.finish(row, Generation([], [], "", "error", [], str(error)))
                    continue
                running[next(numbers)] = Running(row, request.stop_strings)
                yield request

    numbers = itertools.count()
    side_by_side = settings.rows if total is None else max(1, min(settings.rows, total))
    # One prompt needs no cache of the whole context.
    queue = list(requests()) if output.stream == "text" else requests()
    for index, result in lm.run(queue, rows=side_by_side, g_lm=g_lm, mode=mode, steps=output.steps):
        output.grow(running[index], result)
        if result.finish_reason is not None:
            job = running.pop(index).job
            output.finish(job, result, _shown(lm, job))


def make_request(
    lm: LanguageModel, job: Job, settings: GenerationConfig, stop: Sequence[str] = ()
) -> Request:
    """What the engine is asked for a job. The draws of row i have the seed `settings.seed` + i.

    Raises:
      ConfigError: the model has no tokenizer and the job needs one, or a prompt cannot be cut.
    """
    numbers = {name: getattr(settings, name) for name in NUMBERS}
    numbers["seed"] = (settings.seed + job.index) % SEEDS
    numbers |= {name: value for name, value in job.settings.items() if name in NUMBERS}
    strings = tuple(job.settings.get("stop", stop))
    if strings and lm.tokenizer is None:
        raise ConfigError("stop: this checkpoint has no tokenizer; use stop_ids")
    ends = [lm.tokenizer.eos_id] if lm.tokenizer is not None else []
    tokens = lm.encode(job.prompt)
    if settings.truncate == "left":
        tokens = cut_left(tokens, numbers["max_new_tokens"], lm.config.context_length)
    return Request(
        prompt=tuple(tokens),
        stop_ids=tuple(job.settings.get("stop_ids", ends)),
        stop_strings=strings,
        **numbers,
    )


def _g_lm(
    lm: LanguageModel,
    rows: Iterator[Job | BadRow],
    settings: GenerationConfig,
    stop: Sequence[str],
) -> tuple[jax.Array | None, CacheMode, Iterator[Job | BadRow]]:
    """G_LM for every job (None: each its own), what is cached, and the rows, all of them still."""
    kind = settings.g_mode
    if kind == "recompute" or not (settings.kv_cache or settings.g_cache):
        mode = CacheMode(kv=False, g="none")
    else:
        mode = CacheMode(kv=settings.kv_cache, g="G_LM" if settings.g_cache else "A")
    if kind == "identity":
        return identity_g_lm(lm.config), mode, rows
    if kind == "frozen" and settings.g_file is not None:
        return read_g_lm(settings.g_file, lm.config, "Generation.g_file"), mode, rows
    if kind == "frozen" and lm.config.g_source == "learned":
        raise ConfigError(
            "Generation.g_mode = 'frozen': this checkpoint learned its G_LM and has none of its "
            "own; name one with Generation.g_file"
        )
    if kind == "first" and lm.config.g_source == "learned":
        # Not left to the engine: a resumed job starts with another prompt than the first one.
        job, rows = _first_and_rest(rows, lambda job: _decodable(lm, job, settings, stop))
        if job is not None:
            first = make_request(lm, job, settings, stop).prompt
            return lm([first]).deductive.G_LM, mode, rows
    return None, mode, rows


def _decodable(
    lm: LanguageModel, job: Job, settings: GenerationConfig, stop: Sequence[str]
) -> bool:
    try:
        request = make_request(lm, job, settings, stop)
    except ConfigError:
        return False
    return check_request(request, lm.config.context_length, lm.config.vocab_size) is None


def _first_and_rest(
    rows: Iterable[Job | BadRow], wanted: Callable[[Job], bool]
) -> tuple[Job | None, Iterator[Job | BadRow]]:
    """The first job that is `wanted`, and all rows from the start."""
    rows, passed = iter(rows), []
    for row in rows:
        passed.append(row)
        if isinstance(row, Job) and wanted(row):
            return row, itertools.chain(passed, rows)
    return None, iter(passed)


def cut_left(tokens: Sequence[int], max_new_tokens: int, context_length: int) -> list[int]:
    """The end of a prompt that leaves room for the new tokens; all of it where they fit.

    Raises:
      ConfigError: the new tokens alone fill the context.
    """
    room = context_length - max_new_tokens
    if len(tokens) > room and room < 1:
        raise ConfigError(
            f"max_new_tokens = {max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {context_length}; lower it"
        )
    return list(tokens[-room:]) if len(tokens) > room else list(tokens)


def _shown(lm: LanguageModel, job: Job) -> str:
    """A job's prompt as text."""
    if isinstance(job.prompt, str):
        return job.prompt
    known = all(0 <= token < lm.config.vocab_size for token in job.prompt)
    return lm.tokenizer.decode(job.prompt) if lm.tokenizer and known else str(job.prompt)


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that stays: not half a character, nor half a stop string."""
    text = text.rstrip("\ufffd")
    halves = (string[:n] for string in stop for n in range(len(string) - 1, 0, -1))
    return text[: len(text) - max((len(h) for h in halves if text.endswith(h)), default=0)]


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
