"""Slots and the queue: who gets one, when it is freed, and how the server ends."""

import concurrent.futures
import contextlib
import http.client
import json
import time
from typing import Any

import openai
import pytest
from serving import get, metric, post, serving, wait_for_idle

import pldr_jax
from pldr_jax.config import GenerationConfig
from pldr_jax.serve.server import Server

pytest_plugins = ("serving",)


def long_stream(server: Server, n: int = 128) -> http.client.HTTPConnection:
    """A stream of a text that would go on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": [2], "max_tokens": 31, "stream": True, "n": n, "logit_bias": {"3": -100}}
    kind = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), kind)
    return connection


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_frees_its_slots(server: Server, streamed: bool) -> None:
    wait_for_idle(server)
    before = metric(server, "pldr_cancelled_total")
    connection = long_stream(server)
    if streamed:
        connection.getresponse().fp.readline()
    else:
        while not metric(server, "pldr_slots_in_use"):
            time.sleep(0.01)
    connection.close()
    wait_for_idle(server)
    assert metric(server, "pldr_cancelled_total") > before


def test_a_short_request_does_not_wait_for_a_call_of_many(
    server: Server, api: openai.OpenAI
) -> None:
    connection = long_stream(server)
    while not metric(server, "pldr_waiting"):
        time.sleep(0.005)
    api.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert metric(server, "pldr_waiting") > 0
    connection.close()
    wait_for_idle(server)


def test_a_full_queue_a_timeout_and_keys(lm: pldr_jax.LanguageModel, tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\nother\n")
    flags: dict[str, Any] = {"max_waiting": 2, "timeout": 1e-3, "api_key_file": str(keys)}
    generation = GenerationConfig(g_mode="identity")
    with serving(lm, generation, batch_size=1, allow_origin=("http://a.example",), **flags) as s:
        assert get(s, "/v1/models")[0] == 401
        assert get(s, "/v1/models", Authorization="Bearer secre")[0] == 401
        bearer = {"Authorization": "Bearer other"}
        status, _, headers = get(s, "/v1/models", Origin="http://a.example", **bearer)
        assert status == 200 and headers["access-control-allow-origin"] == "http://a.example"
        body = {"prompt": "a", "max_tokens": 30, "n": 2, "logit_bias": {"3": -100}}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(s, "/v1/completions", body, **bearer), range(8)))
        assert {answer[0] for answer in answers} <= {504, 429}
        full = [answer for answer in answers if answer[0] == 429]
        assert full and all(answer[2]["retry-after"] == "1" for answer in full)
        assert post(s, "/v1/completions", {**body, "g_text": "b"}, **bearer)[1]["error"]["param"]
        tokens = metric_with(s, bearer)
    assert "pldr_cancelled_total" in tokens


def metric_with(server: Server, headers: dict[str, str]) -> str:
    return get(server, "/metrics", **headers)[1].decode()


def test_stopping_lets_streams_end(lm: pldr_jax.LanguageModel) -> None:
    with serving(lm, steps=1, drain_seconds=60) as server:
        answer = long_stream(server, 40).getresponse()
        assert answer.readline().startswith(b"data: ")
        server.stop()
        rest = answer.read()
    assert rest.count(b'"length"') == 40 and rest.endswith(b"data: [DONE]\n\n")


def test_stopping_does_not_wait_for_ever(lm: pldr_jax.LanguageModel) -> None:
    with serving(lm, steps=1, drain_seconds=0) as server:
        answer = long_stream(server, 40).getresponse()
        assert answer.readline().startswith(b"data: ")
        server.stop()
        with contextlib.suppress(http.client.IncompleteRead, OSError):
            assert b"[DONE]" not in answer.read()
