"""Chats, asked by the real client."""

import types
from typing import Any

import openai
import pytest
from serving import post

import pldr_jax
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.serve.chat import ask_chat
from pldr_jax.serve.server import Server
from pldr_jax.serve.wire import ApiError

pytest_plugins = ("serving",)


def test_a_chat_is_that_of_the_model(api: openai.OpenAI, lm: pldr_jax.LanguageModel) -> None:
    messages: Any = [
        {"role": "system", "content": "b"}, {"role": "user", "content": "for"},
    ]  # fmt: skip
    alone = lm.chat(messages, max_new_tokens=6, temperature=1.0, seed=4)
    asked: dict[str, Any] = {
        "model": "tiny", "messages": messages, "max_tokens": 6, "seed": 4, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    made = api.chat.completions.create(**asked).choices[0]
    assert (made.message.role, made.message.content) == ("assistant", alone.text)
    told = made.logprobs.content
    assert [one.logprob for one in told] == pytest.approx(alone.logprobs, abs=1e-5)
    assert all(len(one.top_logprobs) == 2 for one in told)
    assert bytes(b for one in told for b in one.bytes).decode(errors="replace") == alone.text
    pieces = [event.choices[0] for event in api.chat.completions.create(stream=True, **asked)]
    assert pieces[0].delta.role == "assistant" and pieces[-1].finish_reason == made.finish_reason
    assert "".join(piece.delta.content or "" for piece in pieces) == alone.text
    rest = api.chat.completions.create(model="tiny", messages=messages[1:], seed=1)
    assert 0 < rest.usage.completion_tokens and rest.usage.total_tokens <= 32
    assert rest.choices[0].message.content and rest.choices[0].logprobs is None


@pytest.mark.parametrize(
    "change",
    [
        {"messages": None}, {"messages": []}, {"messages": "hi"}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "a"}]}, {"messages": [1]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
        {"messages": [{"role": "user", "content": "a " * 40}]},
        {"messages": [{"role": "user", "content": "\udc00"}]},
        {"top_logprobs": 2}, {"prompt": "a"}, {"tools": []}, {"max_tokens": 0},
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_answered(server: Server, change: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **change}
    status, answer, _ = post(server, "/v1/chat/completions", body)
    assert status == 400 and "\n" not in answer["error"]["message"]
    assert answer["error"]["param"] in (*change, "prompt")


def test_a_checkpoint_without_a_template_has_no_chats(lm: pldr_jax.LanguageModel) -> None:
    for tokenizer in (None, Tokenizer(lm.tokenizer.model_bytes)):
        served: Any = types.SimpleNamespace(lm=types.SimpleNamespace(tokenizer=tokenizer))
        with pytest.raises(ApiError, match="no chat template") as caught:
            ask_chat({"messages": [{"role": "user", "content": "a"}]}, served)
        assert caught.value.status == 404
