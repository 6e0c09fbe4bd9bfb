"""`/v1/completions`: the answer to a request, whole or as it grows."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import jax
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.inference.batch import stable_text
from pldr_jax.inference.request import BROKEN, Request
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.serve.bodies import Asked
from pldr_jax.serve.pieces import Logprobs
from pldr_jax.serve.served import Given, Served
from pldr_jax.serve.wire import ApiError, as_api_error
from pldr_jax.serve.worker import Call, Update

PING_SECONDS = 15.0
"""A stream without news says so, for proxies that end silent connections."""


class Choice:
    """One text as it grows.

    Args:
      tokenizer: None where the checkpoint has none.
      request: of the engine.
      offset: characters of the answer before this text: those of an echoed prompt.
      listed: whether its log-probabilities are asked for.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, request: Request, offset: int, listed: bool
    ) -> None:
        self._tokenizer, self._request = tokenizer, request
        self._tokens: list[int] = []
        self._logprobs = Logprobs(tokenizer, request.prompt, offset) if listed else None
        self._offset, self._shown, self._told = offset, 0, 0
        self.finish_reason: str | None = None

    def add(self, update: Update) -> tuple[str, dict[str, list[object]] | None]:
        """What the text has grown by: characters that stay, and the lists of their tokens.

        Raises:
          ApiError: it cannot be decoded.
        """
        if update.error is not None:
            raise ApiError(500, update.error)
        self._tokens += update.tokens
        if self._logprobs is not None:
            tops = update.top or [[]] * len(update.tokens)
            for token, logprob, top in zip(update.tokens, update.logprobs, tops, strict=True):
                self._logprobs.add(token, logprob, top)
        if update.finish_reason is not None:
            self.finish_reason = "stop" if update.finish_reason == "stop" else "length"
        text, whole = self._stable()
        grown, lists = text[self._shown :], None
        self._shown = max(self._shown, len(text))
        if self._logprobs is not None:
            told = (
                len(self._tokens) if whole else self._logprobs.told_until(self._offset + len(text))
            )
            lists, self._told = self._logprobs.json(self._told, told), max(self._told, told)
        return grown, lists

    def _stable(self) -> tuple[str, bool]:
        """The text that stays, cut before a stop string, and whether all tokens are in it."""
        if self._tokenizer is None:
            return "", True
        text = self._tokenizer.decode_continuation(self._request.prompt, self._tokens)
        stop = self._request.sampling.stop
        if self.finish_reason is None:
            text = stable_text(text, stop)
        else:
            places = [at for at in map(text.find, stop) if at >= 0]
            if not places:
                return text, True
            text = text[: min(places)]
        return text, False


async def updates_of(
    served: Served, asked: Asked, grows: bool
) -> AsyncGenerator[Update | None, None]:
    """What the texts of a request become; None where nothing came for a while. Closing it frees
    their slots.

    Raises:
      ApiError: the time is over.
      Full: too many wait already.
    """
    given = await given_of(served, asked)
    call = Call([dataclasses.replace(r, **vars(given)) for r in asked.requests], grows)
    left, deadline = len(asked.requests), time.monotonic() + served.settings.timeout
    served.worker.submit(call)
    try:
        while left:
            rest = deadline - time.monotonic()
            if rest <= 0:
                timeout = served.settings.timeout
                raise ApiError(504, f"it took more than {timeout:g} seconds")
            update = await call.next(min(rest, PING_SECONDS))
            left -= update is not None and update.finish_reason is not None
            yield update
    finally:
        served.worker.cancel(call)


async def given_of(served: Served, asked: Asked) -> Given:
    """What a request decodes with in place of the model's own."""
    mode = asked.body.g_mode or served.g_mode
    if asked.g_text is None and asked.gain is None:
        return served.given(mode)
    return await served.worker.call(lambda: served.given(mode, asked.g_text, asked.gain))


async def prompt_logprobs(served: Served, asked: Asked) -> list[Logprobs]:
    """The lists of every prompt, for `echo`.

    Raises:
      ApiError: the checkpoint is broken.
    """
    given, n = await given_of(served, asked), asked.body.n
    lists = [await _prompt_logprobs(served, asked, given, r) for r in asked.requests[::n]]
    return [one for one in lists for _ in range(n)]


async def _prompt_logprobs(
    served: Served, asked: Asked, given: Given, request: Request
) -> Logprobs:
    tokens = request.prompt
    logprobs = Logprobs(served.lm.tokenizer, ())
    logprobs.add(tokens[0], None, ())
    if len(tokens) == 1:
        return logprobs
    # As in training, the last token is only predicted; the reading has no use for it.
    g_tokens = min(asked.body.g_tokens or len(tokens) - 1, len(tokens) - 1)
    reading = await served.worker.call(
        lambda: jax.device_get(
            dataclasses.replace(served.read(tokens, given, g_tokens), deductive=DeductiveOutputs())
        )
    )
    count = len(tokens) - 1
    if not np.all(reading.finite_T[:count]):
        raise ApiError(500, BROKEN)
    ids, values = reading.top_token_TY.tolist(), reading.top_logprob_TY.tolist()
    for i, token in enumerate(tokens[1:]):
        top = list(zip(ids[i], values[i], strict=True))[: request.top_logprobs]
        logprobs.add(token, float(reading.logprob_T[i]), top)
    return logprobs


class Answer:
    """The answer to a request of `/v1/completions`, in pieces or whole."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, served: Served, asked: Asked) -> None:
        self._served, self._asked = served, asked
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._new_tokens = 0

    async def pieces(self, grows: bool = True) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream, an empty one where nothing came for a while; without `grows` a
        text comes when it has ended.
        """
        body, requests = self._asked.body, self._asked.requests
        tokenizer = self._served.lm.tokenizer
        offsets = [0] * len(requests)
        if body.echo:
            prompts: list[Any] = [None] * len(requests)
            if self._asked.logprobs is not None:
                prompts = [one.json() for one in await prompt_logprobs(self._served, self._asked)]
            for i, request in enumerate(requests):
                text = "" if tokenizer is None else tokenizer.decode(request.prompt)
                offsets[i] = len(text)
                yield self._object(
                    i, text, prompts[i], None if self._asked.max_tokens else "length"
                )
        if self._asked.max_tokens:
            listed = self._asked.logprobs is not None
            pairs = zip(requests, offsets, strict=True)
            choices = [Choice(tokenizer, *pair, listed) for pair in pairs]
            updates = updates_of(self._served, self._asked, grows)
            async with contextlib.aclosing(updates):
                async for update in updates:
                    if update is None:
                        yield {}
                        continue
                    choice = choices[update.index]
                    self._new_tokens += len(update.tokens)
                    text, logprobs = choice.add(update)
                    if text or choice.finish_reason or (logprobs and logprobs["tokens"]):
                        yield self._object(update.index, text, logprobs, choice.finish_reason)
        if self._asked.include_usage:
            yield {**self._head(), "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """The pieces, joined to one object."""
        return await self._joined(self.pieces(grows=False))

    async def _joined(self, parts: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = [{} for _ in self._asked.requests]
        async with contextlib.aclosing(parts) as pieces:
            async for piece in pieces:
                for new in piece.get("choices", ()):
                    old = choices[new["index"]]
                    if old:
                        new["text"] = old["text"] + new["text"]
                    if old and new["logprobs"] is not None:
                        lists = new["logprobs"]
                        new["logprobs"] = {k: old["logprobs"][k] + lists[k] for k in lists}
                    choices[new["index"]] = new
        return {**self._head(), "choices": choices, "usage": self._usage()}

    def _head(self) -> dict[str, Any]:
        head = {"id": self._id, "object": self.kind, "created": self._created}
        return {**head, "model": self._served.name}

    def _object(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head(), "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        prompts = self._asked.requests[:: self._asked.body.n]
        prompt, new = sum(len(request.prompt) for request in prompts), self._new_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def respond(http: HttpRequest, asked: Asked, answer: Answer) -> Response:
    """The response, whole or streamed; a client that is gone frees its slots."""
    if not asked.body.stream:
        return JSONResponse(await unless_gone(http, answer.whole()))
    events = answer.pieces()
    first = await unless_gone(http, anext(events, None))  # errors before it have a status
    return StreamingResponse(
        _events(first, events),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def unless_gone(http: HttpRequest, work: Any) -> Any:
    """What the work returns.

    Raises:
      ApiError: the client has gone before.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    async def awaited() -> Any:
        return await work

    tasks = [asyncio.ensure_future(awaited()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "the client has gone")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _events(
    first: dict[str, Any] | None, events: AsyncGenerator[dict[str, Any], None]
) -> AsyncIterator[bytes]:
    """Server-sent events of the objects; an error is the last one."""
    try:
        value = first
        while value is not None:
            yield _event(value) if value else b": waiting\n\n"
            value = await anext(events, None)
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _event(as_api_error(error).body())
    finally:
        await events.aclose()


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n\n"
