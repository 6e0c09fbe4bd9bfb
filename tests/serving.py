"""What the tests of the server share: a small model behind a real socket, in a thread; and as a
plugin of pytest its fixtures.
"""

import contextlib
import functools
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers import untrained_run

import pldr_jax
from pldr_jax.config import GenerationConfig
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.serve.server import Server
from pldr_jax.serve.settings import ServeConfig

NAME = "tiny"
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
"""A chat template that leaves room in a context of 32 tokens."""


@functools.cache
def small_model(session: Path) -> pldr_jax.LanguageModel:
    lm = pldr_jax.load(untrained_run(session))
    assert lm.tokenizer is not None
    lm.tokenizer = Tokenizer(lm.tokenizer.model_bytes, CHAT)
    return lm


@contextlib.contextmanager
def serving(
    lm: pldr_jax.LanguageModel,
    generation: GenerationConfig | None = None,
    fails: type[BaseException] | None = None,
    **flags: Any,
) -> Iterator[Server]:
    """A server that is ready, and that ends by an error of the type `fails`, or by none."""
    settings = ServeConfig(port=0, **{"batch_size": 3, "drain_seconds": 5, **flags})
    server = Server(lm, NAME, settings, generation)
    ended: list[BaseException | None] = []

    def run() -> None:
        try:
            ended.append(server.run(lambda line: None))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + 300
        while get(server, "/health")[0] != 200:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.05)
        yield server
    finally:
        server.stop()
        thread.join(60)
    assert not thread.is_alive() and len(ended) == 1
    assert ended[0] is None if fails is None else isinstance(ended[0], fails)


def client(server: Server, **arguments: Any) -> openai.OpenAI:
    settings = {"api_key": "none", "max_retries": 0, "timeout": 120, **arguments}
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", **settings)


def ask(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> tuple[Any, ...]:
    """Status, body (JSON as an object) and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, body, {**kind, **headers})
        answer = connection.getresponse()
        data = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(data) if is_json else data, answer.headers
    finally:
        connection.close()


def get(server: Server, path: str, **headers: str) -> tuple[Any, ...]:
    return ask(server, "GET", path, **headers)


def post(server: Server, path: str, body: Any, **headers: str) -> tuple[Any, ...]:
    return ask(server, "POST", path, body, **headers)


def metric(server: Server, name: str) -> float:
    """The value of a metric without labels."""
    lines = get(server, "/metrics")[1].decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def wait_for_idle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while metric(server, "pldr_slots_in_use") or metric(server, "pldr_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> pldr_jax.LanguageModel:
    return small_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(lm: pldr_jax.LanguageModel) -> Iterator[Server]:
    with serving(lm) as server:
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> openai.OpenAI:
    return client(server)
