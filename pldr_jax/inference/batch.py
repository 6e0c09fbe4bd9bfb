"""A batch job: prompts in, results out in the order in which they finish."""

import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import jax

from pldr_jax.config import ConfigError, GenerationConfig, ModelConfig, SamplingConfig
from pldr_jax.inference.jobs import BadLine, Job, JsonlWriter, encode_result
from pldr_jax.inference.progress import JobProgress
from pldr_jax.inference.request import DecodeOptions, Generation, Request
from pldr_jax.inference.text import TextDecoder
from pldr_jax.model.decoder import ModelOutputs
from pldr_jax.model.deductive import identity_g_lm, read_g_lm
from pldr_jax.terminal import visible

STDOUT = "stdout"


class BatchModel(Protocol):
    """What a job asks of `pldr_jax.LanguageModel`."""

    @property
    def config(self) -> ModelConfig:
        """Of the model."""

    @property
    def tokenizer(self) -> TextDecoder | None:
        """None where the checkpoint has none."""

    def __call__(self, tokens_BT: Sequence[Sequence[int]]) -> ModelOutputs:
        """A forward pass."""

    def request(
        self, prompt: str | Sequence[int], sampling: SamplingConfig, cut_left: bool
    ) -> Request:
        """What the engine is asked for a prompt."""

    def run(
        self, requests: Iterable[Request], options: DecodeOptions, g_lm: jax.Array | None
    ) -> Iterator[tuple[int, Generation]]:
        """The results, as they grow."""


@dataclasses.dataclass
class Running:
    """A job that is being decoded: its digest, stop strings, tokens counted and text shown."""

    job: Job
    digest: str
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

    def grow(self, running: Running, result: Generation) -> None:
        """A text has grown, and has perhaps ended."""
        self.progress.add_tokens(max(len(result.tokens) - running.counted, 0))
        running.counted = max(len(result.tokens), running.counted)
        if self.stream is None:
            return
        if self.stream == "text" and not self._begun and result.error is None:
            print_text(str(running.job.prompt))
            self._begun = True
        text = result.text if result.finish_reason else stable_text(result.text, running.stop)
        if text.startswith(running.shown) and text != running.shown:
            piece = text[len(running.shown) :]
            if self.stream == "pieces":
                escaped = piece.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
                piece = f"[{running.job.id}] {escaped}\n"
            print_text(piece)
            running.shown = text

    def finish(self, running: Running, result: Generation, prompt: str) -> None:
        """A job has ended; `prompt` is its text."""
        job = running.job
        if self._begun:
            print_text("\n")
        if self._takes_json:
            line: dict[str, Any] = {
                "id": job.id,
                "text": result.text,
                "tokens": result.tokens,
                "finish_reason": result.finish_reason,
            }
            if self._logprobs:
                line["logprobs"] = [x if math.isfinite(x) else None for x in result.logprobs]
            if result.error is not None:
                line["error"] = result.error
            self._write({**line, "input": running.digest})
        elif self.stream is None and result.error is None:
            text = result.text if result.text or not result.tokens else f" {result.tokens}"
            print_text(f"{prompt}{text}\n--- {len(result.tokens)} tokens, {result.finish_reason}\n")
        if result.error is not None:
            self.progress.print(f"error: prompt {job.id}: {result.error}")
        elif self.stream == "text":
            self.progress.print(f"--- {len(result.tokens)} tokens, {result.finish_reason}")
        self.progress.finish(failed=result.error is not None)

    def bad(self, line: BadLine) -> None:
        """A line could not be read: it leaves a result that says so, once."""
        if self.writer is not None:
            if ((line.number,) if line.id is None else line.id) in self.writer.done:
                return
        if self._takes_json:
            failure = {"text": "", "tokens": [], "finish_reason": "error", "error": line.reason}
            self._write({"id": line.id, "line": line.number, **failure})
        self.progress.print(f"error: line {line.number}: {line.reason}")
        self.progress.finish(failed=True)

    @property
    def _takes_json(self) -> bool:
        return self._json or self.writer is not None

    def _write(self, result: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(result)
        else:
            _write_stdout(encode_result(result))


def run_batch(
    lm: BatchModel,
    lines: Iterator[Job | BadLine],
    settings: GenerationConfig,
    output: Output,
    total: int | None = None,
) -> None:
    """Continues every job; none is kept once it is written.

    Args:
      lines: as `read_prompts` gives them.
      settings: of all jobs; a line's own ones win. Job i draws with the seed `settings.seed` + i.
      total: how many there are, if it is known.

    Raises:
      ConfigError: settings that this model rules out, or a result that is there already and is
        that of another prompt.
      OSError: the output cannot be written; its file name says which.
    """
    g_lm, lines = shared_g_lm(lm, lines, settings)
    running: dict[int, Running] = {}
    numbers = itertools.count()

    def requests() -> Iterator[Request]:
        for line in lines:
            if isinstance(line, BadLine):
                output.bad(line)
                continue
            sampling = _sampling(line, settings)
            digest = line.digest(sampling)
            if output.writer is None or not output.writer.has(line, digest):
                running[next(numbers)] = Running(line, digest, sampling.stop)
                yield lm.request(line.prompt, sampling, settings.truncate == "left")

    options = decode_options(settings)
    if output.stream == "text":
        options = dataclasses.replace(options, steps=1)
    if total is not None:
        several = max(1, min(options.batch_size, total))
        options = dataclasses.replace(options, batch_size=several)
    # One prompt needs no cache of the whole context.
    queue = list(requests()) if output.stream == "text" else requests()
    for index, result in output.progress.first_of(lm.run(queue, options, g_lm)):
        output.grow(running[index], result)
        if result.finish_reason is not None:
            ended = running.pop(index)
            output.finish(ended, result, _shown(lm, ended.job))


def decode_options(settings: GenerationConfig) -> DecodeOptions:
    """What is cached, and for how many prompts side by side."""
    recomputed = settings.g_mode == "recompute" or not (settings.kv_cache or settings.g_cache)
    if recomputed:
        return DecodeOptions(settings.batch_size, kv_cache=False, g_cache="none")
    kept: Literal["G_LM", "A"] = "G_LM" if settings.g_cache else "A"
    return DecodeOptions(
        settings.batch_size,
        kv_cache=settings.kv_cache,
        g_cache=kept,
        prefix_cache_mb=settings.prefix_cache_mb,
    )


def _sampling(job: Job, settings: GenerationConfig) -> SamplingConfig:
    return dataclasses.replace(settings.sampling.of_prompt(job.index), **job.settings)


def shared_g_lm(
    lm: BatchModel, lines: Iterator[Job | BadLine], settings: GenerationConfig
) -> tuple[jax.Array | None, Iterator[Job | BadLine]]:
    """G_LM for every job (None: each its own), and all lines from the start."""
    kind, learned = settings.g_mode, lm.config.g_source == "learned"
    if kind == "identity":
        return identity_g_lm(lm.config), lines
    if kind == "frozen" and settings.g_file is not None:
        return read_g_lm(settings.g_file, lm.config, "Generation.g_file"), lines
    if kind == "frozen" and learned:
        raise ConfigError(
            "Generation.g_mode = 'frozen': this checkpoint learned its G_LM and has none of its "
            "own; name one with Generation.g_file"
        )
    if kind == "first" and learned:
        # Not left to the engine: a resumed job starts with another prompt than the first one.
        passed = []
        for line in lines:
            passed.append(line)
            if isinstance(line, Job):
                cut = settings.truncate == "left"
                request = lm.request(line.prompt, _sampling(line, settings), cut)
                if request.error is None:
                    g_lm = lm([request.prompt]).deductive.G_LM
                    return g_lm, itertools.chain(passed, lines)
        return None, iter(passed)
    return None, lines


def _shown(lm: BatchModel, job: Job) -> str:
    """A job's prompt as text."""
    if isinstance(job.prompt, str):
        return job.prompt
    tokenizer = lm.tokenizer
    known = tokenizer is not None and all(0 <= t < tokenizer.vocab_size for t in job.prompt)
    return tokenizer.decode(job.prompt) if tokenizer is not None and known else str(job.prompt)


def stable_text(text: str, stop: Sequence[str]) -> str:
    """What stays of a growing text: not half a character, nor half a stop string."""
    text = text.rstrip("\ufffd")
    halves = (string[:n] for string in stop for n in range(len(string) - 1, 0, -1))
    return text[: len(text) - max((len(h) for h in halves if text.endswith(h)), default=0)]


def print_text(text: str) -> None:
    """Text for people: what would steer a terminal is spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    _write_stdout(visible(text).encode(encoding, "backslashreplace"))


def _write_stdout(data: bytes) -> None:
    """Bytes as they are, whatever the locale.

    Raises:
      OSError: they cannot be written; the file name is "stdout".
    """
    try:
        sys.stdout.flush()
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is None:  # a notebook's
            sys.stdout.write(data.decode(sys.stdout.encoding or "utf-8", "replace"))
        else:
            buffer.write(data)
        sys.stdout.flush()
    except OSError as error:
        error.filename = STDOUT
        raise
    except ValueError:
        raise OSError(9, os.strerror(9), STDOUT) from None
