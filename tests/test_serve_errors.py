"""Requests that cannot be answered, and the small ones."""

from typing import Any

import openai
import pytest
from serving import get, post

import pldr_jax
from pldr_jax.serve.server import Server

pytest_plugins = ("serving",)


@pytest.mark.parametrize(
    "body,status,param",
    [
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": [[1, 2], "a"]}, 400, "prompt"),
        ({"prompt": [1, 999]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [1] * 32}, 400, "prompt"),
        ({"prompt": [1] * 34, "max_tokens": 0, "echo": True, "logprobs": 1}, 400, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens"),
        ({"prompt": "a", "n": 0}, 400, "n"),
        ({"prompt": "a", "n": 10**6}, 400, "n"),
        ({"prompt": ["a"] * 100, "n": 100}, 400, "n"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": True}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "seed": 2**40}, 400, "seed"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "stop": ["x"] * 99}, 400, "stop"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"299999": 1}}, 400, "prompt"),
        ({"prompt": "a", "logit_bias": {"1": 1e9}}, 400, "logit_bias"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "a", "best_of": 2}, 400, "best_of"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ({"prompt": "a", "tempertaure": 1}, 400, "tempertaure"),
        ({"prompt": "a", "model": "gpt-9"}, 404, "model"),
        ({"prompt": "a", "g_mode": "recompute"}, 400, "g_mode"),
        ({"prompt": "a", "gain": [[1, 2]]}, 400, "gain"),
        ({"prompt": "a", "gain": "x"}, 400, "gain"),
        ({"prompt": "a", "g_text": "a", "g_mode": "identity"}, 400, "g_text"),
        ({"prompt": "a", "g_tokens": 2}, 400, "g_tokens"),
        ({"prompt": "a\ud800"}, 400, "prompt"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    server: Server, body: dict[str, Any], status: int, param: str
) -> None:
    made, answer, _ = post(server, "/v1/completions", body)
    assert made == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 1100


@pytest.mark.parametrize(
    "body,status",
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b'{"prompt": "a", "prompt": "b"}', 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "\xff"}', 400),
        (b"[" * 100_000, 400),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
        (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 413),
    ],
)
def test_bodies_that_are_no_request(server: Server, body: bytes, status: int) -> None:
    made, answer, _ = post(server, "/v1/completions", body)
    assert made == status and "\n" not in answer["error"]["message"]


def test_other_paths_methods_and_kinds(server: Server) -> None:
    assert get(server, "/nothing")[0] == 404
    assert get(server, "/v1/completions")[0] == 405
    assert post(server, "/v1/completions", b"a=b", **{"Content-Type": "text/plain"})[0] == 415
    assert get(server, "/v1/models/tiny")[1]["id"] == "tiny"
    assert get(server, "/v1/models/other")[1]["error"]["code"] == "model_not_found"
    for answer in (get(server, "/nothing"), get(server, "/v1/completions")):
        assert set(answer[1]["error"]) == {"message", "type", "param", "code"}
        assert "access-control-allow-origin" not in answer[2]


def test_the_client_raises_its_own_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        api.completions.create(model="tiny", prompt="a", max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="prompt"):
        list(api.completions.create(model="tiny", prompt="", stream=True))
    assert [model.id for model in api.models.list()] == ["tiny"]


def test_tokens_and_back(server: Server, lm: pldr_jax.LanguageModel) -> None:
    text = "def  the\n\u00e9"
    tokens = post(server, "/tokenize", {"prompt": text})[1]["tokens"]
    assert tokens == lm.encode(text)
    assert post(server, "/detokenize", {"tokens": tokens})[1] == {"prompt": text}
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": 1}), ("/tokenize", {"prompt": "a", "b": 1}),
        ("/tokenize", {"prompt": "a", "add_special_tokens": True}),
        ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {"tokens": "a"}),
    ):  # fmt: skip
        assert post(server, path, body)[0] == 400
    assert get(server, "/tokenizer_info")[1]["eos_token"] == "[END]"
