"""`/v1/chat/completions`: a completion of what the chat template writes, in the shape of a chat."""

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.config.fields import field
from pldr_jax.data.text.chat import prompt_ids
from pldr_jax.inference.slots import MAX_TOP_LOGPROBS
from pldr_jax.serve.bodies import Asked, Body, asked_of, read_body
from pldr_jax.serve.completions import Answer
from pldr_jax.serve.served import Served
from pldr_jax.serve.wire import ApiError, checked_text


@dataclasses.dataclass(frozen=True)
class ChatBody(Body):
    """The plain fields of `/v1/chat/completions`; `messages` is an object."""

    max_completion_tokens: int | None = field(
        None, "new tokens; none: what the model's context leaves", low=1
    )
    max_tokens: int | None = field(None, "the same, by its former name", low=1)
    logprobs: bool = field(False, "tell the log-probabilities of the new tokens")
    top_logprobs: int = field(
        0, "and of so many others; needs logprobs", low=0, high=MAX_TOP_LOGPROBS
    )

    echo = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs and not self.logprobs:
            self.fail("top_logprobs", "needs logprobs = true")


_DEFAULTS = ChatBody()


def ask_chat(values: Mapping[str, Any], served: Served) -> Asked:
    """What a body asks for.

    Raises:
      ApiError: it cannot be done, and why; 404 where the checkpoint has no chat template.
    """
    plain = dict(values)
    messages = plain.pop("messages", None)
    tokenizer = served.lm.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ApiError(404, "this checkpoint has no chat template; use /v1/completions")
    body, objects = read_body(plain, served, _DEFAULTS)
    listed = messages if isinstance(messages, list) else []
    for message in listed:
        for name in message if isinstance(message, dict) else ():
            if name not in ("role", "content", "name"):
                raise ApiError(400, f"messages: {name!r} is not supported", "messages")
            if isinstance(message[name], str):
                checked_text(message[name], "messages")
    try:
        prompt = prompt_ids(tokenizer, messages)
    except ConfigError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    left = max(served.capacity - len(prompt), 1)
    count = body.max_completion_tokens or body.max_tokens or left
    top = body.top_logprobs if body.logprobs else None
    return asked_of(body, objects, served, [prompt], count, top)


class ChatAnswer(Answer):
    """The answer to a request of `/v1/chat/completions`."""

    kind, prefix = "chat.completion", "chatcmpl"

    async def pieces(self, grows: bool = True) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream: the first of a choice says who speaks."""
        begun: set[int] = set()
        async with contextlib.aclosing(super().pieces(grows)) as pieces:
            async for piece in pieces:
                for choice in piece.get("choices", ()):
                    role = {} if choice["index"] in begun else {"role": "assistant"}
                    begun.add(choice["index"])
                    choice["delta"] = {**role, "content": choice.pop("text")}
                    choice["logprobs"] = self._of_chat(choice["logprobs"])
                yield piece and {**piece, "object": "chat.completion.chunk"}

    async def whole(self) -> dict[str, Any]:
        """All of it in one object."""
        answer = await self._joined(super().pieces(grows=False))
        for choice in answer["choices"]:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
            choice["logprobs"] = self._of_chat(choice["logprobs"])
        return answer

    def _of_chat(self, lists: Any) -> Any:
        """Lists of log-probabilities as the chat API writes them."""
        if lists is None:
            return None
        content, count = [], self._asked.body.top_logprobs
        tops = lists["top_logprobs"]
        for token, logprob, top in zip(lists["tokens"], lists["token_logprobs"], tops, strict=True):
            others = [_token(name, value) for name, value in list(top.items())[:count]]
            content.append({**_token(token, logprob), "top_logprobs": others})
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    part = text.removeprefix("bytes:\\x")
    data = text.encode() if part == text else bytes.fromhex(part)
    return {"token": text, "logprob": logprob, "bytes": list(data)}
