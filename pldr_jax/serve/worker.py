"""The engine in a thread of its own: requests in as they come, their tokens out as they grow."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax

from pldr_jax.api import LanguageModel
from pldr_jax.inference.request import Completion, DecodeOptions, Request
from pldr_jax.inference.text import find_stop
from pldr_jax.serve.metrics import Metrics

R = TypeVar("R")


class Full(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The engine takes no more requests: it has failed, or the server ends."""


@dataclasses.dataclass(frozen=True)
class Update:
    """What a text has become since the last update.

    Attributes:
      index: of the text among those of its call.
      tokens, logprobs, top: its new tokens, as in `Completion`.
      finish_reason, error: as in `Completion`.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish_reason: str | None
    error: str | None


class Call:
    """The texts that one HTTP request asks for.

    Args:
      requests: one a text.
      grows: send updates as the texts grow, not only when they end.
    """

    def __init__(self, requests: Sequence[Request], grows: bool) -> None:
        self.grows = grows
        self.waiting = collections.deque(enumerate(requests))
        self.cancelled = False
        self.begun = time.monotonic()
        self.updates: asyncio.Queue[Update] = asyncio.Queue()

    async def next(self, seconds: float | None = None) -> Update | None:
        """The next update; None where there is none for some seconds."""
        if not self.updates.empty():
            return self.updates.get_nowait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self.updates.get()
        return None


class Mail:
    """Updates on their way from the engine's thread to the event loop, which is woken once for as
    many as have come until it wakes: each wake-up lets the engine wait for the interpreter's lock.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sent: collections.deque[tuple[Call, Update]] = collections.deque()
        self._woken = False

    def send(self, call: Call, update: Update) -> None:
        """From the engine's thread."""
        self._sent.append((call, update))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the server has ended
                call.cancelled = True

    def _deliver(self) -> None:
        self._woken = False  # before anything is taken: what is sent from now on wakes it again
        while self._sent:
            call, update = self._sent.popleft()
            call.updates.put_nowait(update)


@dataclasses.dataclass
class Running:
    """A text in a slot: its call, its index there, and how many of its tokens were sent."""

    call: Call
    index: int
    sent: int = 0


class Worker:
    """Owns the engine: whatever runs on the device runs in its thread.

    Calls take turns, one text each, so that a call of many texts does not keep others waiting.

    Args:
      lm: the model.
      options: how it decodes.
      g_lm: one G_LM for every request; None is the model's own, or each prompt's.
      max_waiting: texts that may wait.
      metrics: what is counted.
      failed: is called, in the thread, when the engine has failed and nothing is decoded any more.
    """

    def __init__(
        self,
        lm: LanguageModel,
        options: DecodeOptions,
        g_lm: jax.Array | None,
        max_waiting: int,
        metrics: Metrics,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._lm, self._options, self._g_lm = lm, options, g_lm
        self.max_waiting = max_waiting
        self.error: BaseException | None = None
        self._metrics, self._failed, self._mail = metrics, failed, Mail()
        self._changed = threading.Condition()
        self._calls: collections.deque[Call] = collections.deque()
        self._jobs: collections.deque[Callable[[bool], None]] = collections.deque()
        self._running: dict[int, Running] = {}
        self._count = 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(options.batch_size)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Drops what waits and runs, and ends the thread."""
        with self._changed:
            self._closing = True
            for call in [*self._calls, *(r.call for r in self._running.values())]:
                call.cancelled = True
            self._changed.notify()
        self._thread.join(seconds)

    def submit(self, call: Call) -> None:
        """Puts the texts of a call into the queue.

        Raises:
          Full: there are too many already.
          Stopped: nothing is decoded any more.
        """
        with self._changed:
            if self._closing:
                raise Stopped
            waiting = sum(len(other.waiting) for other in self._calls)
            if waiting + len(call.waiting) > self.max_waiting:
                raise Full
            self._calls.append(call)
            self._metrics.waiting.set(waiting + len(call.waiting))
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        """Frees the slots of a call before the next step."""
        with self._changed:
            call.cancelled = True
            call.waiting.clear()

    async def call(self, function: Callable[[], R]) -> R:
        """What a function returns that the thread calls between two steps.

        Raises:
          Full, Stopped: as `submit`.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[R] = loop.create_future()

        def put(set_: Callable[[Any], None], value: Any) -> None:
            if not result.done():
                set_(value)

        def job(end: bool) -> None:
            if result.cancelled():
                return
            try:
                if end:
                    raise Stopped
                done: tuple[Any, Any] = (result.set_result, function())
            except Exception as error:
                done = (result.set_exception, error)
            loop.call_soon_threadsafe(put, *done)

        with self._changed:
            if self._closing:
                raise Stopped
            if len(self._jobs) >= self.max_waiting:
                raise Full
            self._jobs.append(job)
            self._changed.notify()
        return await result

    def _run(self) -> None:
        tokenizer = self._lm.tokenizer
        stop = None if tokenizer is None else partial(find_stop, tokenizer)
        try:
            completions = self._lm.engine.run(self._requests(), self._options, self._g_lm, stop)
            for completion in completions:
                self._deliver(completion)
                self._work()
        except BaseException as error:
            with self._changed:
                self.error = error
                self._closing = True
                calls = {*self._calls, *(r.call for r in self._running.values())}
            while self._jobs:
                self._jobs.popleft()(True)
            last = Update(0, [], [], [], "error", "the engine has failed; see its log")
            for call in calls:
                self._mail.send(call, last)
            self._failed(error)

    def _requests(self) -> Iterator[Request | None]:
        """What the engine is asked for next; None where nothing waits while others run."""
        while True:
            self._work()
            with self._changed:
                while not (self._calls or self._jobs or self._running or self._closing):
                    self._changed.wait()
                taken = self._take()
            if taken is not None:
                yield taken
            elif self._running:
                yield None
            elif self._closing:
                return

    def _take(self) -> Request | None:
        """The first text of the call whose turn it is."""
        while self._calls:
            call = self._calls.popleft()
            if call.cancelled or not call.waiting:
                continue
            index, request = call.waiting.popleft()
            if call.waiting:
                self._calls.append(call)
            self._running[self._count] = Running(call, index)
            self._count += 1
            self._metrics.waiting.set(sum(len(other.waiting) for other in self._calls))
            self._metrics.running.set(len(self._running))
            self._metrics.prompt_tokens.inc(len(request.prompt))
            return request
        self._metrics.waiting.set(0)
        return None

    def _work(self) -> None:
        while self._jobs:
            self._jobs.popleft()(False)

    def _deliver(self, completion: Completion) -> None:
        running = self._running[completion.index]
        call, sent = running.call, running.sent
        if call.cancelled and completion.finish_reason is None:
            completion.finish_reason = "cancelled"
        ended = completion.finish_reason is not None
        if completion.tokens and not sent:
            self._metrics.first_token.observe(time.monotonic() - call.begun)
            self._metrics.count_prefixes()
        self._metrics.new_tokens.inc(len(completion.tokens) - sent)
        running.sent = len(completion.tokens)
        if not call.cancelled and (ended or call.grows):
            start = sent if call.grows else 0
            new = (completion.tokens[start:], completion.logprobs[start:], completion.top[start:])
            update = Update(running.index, *new, completion.finish_reason, completion.error)
            self._mail.send(call, update)
        if ended:
            with self._changed:
                del self._running[completion.index]
            self._metrics.running.set(len(self._running))
            if call.cancelled:
                self._metrics.cancelled.inc()
            else:
                self._metrics.whole.observe(time.monotonic() - call.begun)
