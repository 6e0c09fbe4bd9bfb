"""The server against clients that are broken or hostile, and against signals.

`PLDR_FUZZ=10000 pytest -m slow tests/test_serve_faults.py` sends more than the suite does.
"""

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from fuzz import CASES
from helpers import REPOSITORY, run_here, untrained_run
from serving import client, get, metric, post, serving, small_model, wait_for_idle

import pldr_jax
from pldr_jax.cli.serve import serve_main
from pldr_jax.serve import protocol
from pldr_jax.serve.server import Server

REQUESTS = max(300, CASES)

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 10**9, 2**63, 10**400, 0.5, -0.0, 1e308, "", "a", "def ",
    "\0", "\ud800", "\u2581", "\n", "x" * 3000, [], [1], [[1]], [[]], ["a", "b"], ["a", 1],
    {}, {"1": 1}, {"a": {}}, {"include_usage": True}, [[1.5]], [None], "prompt", "identity", "tiny",
    [1, 2, 3], [-5],
]  # fmt: skip
FIELDS = (
    "model prompt max_tokens stream n stop temperature top_p seed logprobs echo logit_bias user "
    "presence_penalty frequency_penalty top_k min_p repetition_penalty g_mode g_text gain g_tokens "
    "stream_options best_of suffix text outputs layers heads values reference tokens unknown"
).split()
PATHS = ("/v1/completions", "/v1/deductive", "/tokenize", "/detokenize", "/v1/models", "/x")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> pldr_jax.LanguageModel:
    return small_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(lm: pldr_jax.LanguageModel) -> Iterator[Server]:
    with serving(lm, max_waiting=64) as server:
        yield server


def body_of(rng: random.Random, path: str) -> bytes:
    """A request that may be right, has wrong values, or is no request."""
    right: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "def ", "max_tokens": 3},
        "/v1/deductive": {"text": "a", "values": False},
        "/detokenize": {"tokens": [70]},
    }
    body = dict(right.get(path, {"prompt": "a"}))
    for name in rng.sample(FIELDS, rng.choice([0, 1, 1, 2, 4])):
        body[name] = rng.choice(VALUES)
    data = json.dumps(body).encode()
    match rng.randint(0, 9):
        case 0:
            data = rng.choice([b"[", b'{"a":']) * rng.choice([10, 5000, 200_000])
        case 1:
            data = data[: rng.randint(0, len(data))]
        case 2:
            place = rng.randint(0, len(data))
            data = data[:place] + rng.randbytes(3) + data[place:]
    return data


def send(server: Server, rng: random.Random) -> int | None:
    """One request through a socket of its own; the status, or None where the client went."""
    path = rng.choice(PATHS[: rng.choice([1, 2, 6])])
    data = body_of(rng, path)
    length = len(data) if rng.random() < 0.9 else rng.choice([0, len(data) + 10, 10**9, -1])
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {length}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        try:
            sent, body_from = head.encode() + data, len(head)
            if rng.random() < 0.1:  # half of a head or of a body, and away
                link.sendall(sent[: rng.choice([body_from // 2, body_from + len(data) // 2])])
                return None
            step, slow = rng.choice([10**6, len(sent) // 3]), rng.random() < 0.05
            for start in range(0, len(sent), step):
                link.sendall(sent[start : start + step])
                time.sleep(0.02 * slow)
            if length > len(data):
                return None
            answer = link.recv(1 << 16)
            while b"\r\n" not in answer:
                answer += link.recv(1 << 16) or b"HTTP/1.1 000\r\n"
        except OSError:  # it was refused before it was sent
            return None
    return int(answer.split()[1])


def test_no_request_breaks_the_server(
    server: Server, lm: pldr_jax.LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(4)
    before = metric(server, "pldr_compilations_total")
    statuses = [send(server, rng) for _ in range(REQUESTS)]
    known = {None, 200, 400, 404, 405, 413, 415, 429}
    assert set(statuses) <= known, set(statuses) - known
    assert statuses.count(200) > REQUESTS // 20 and statuses.count(400) > REQUESTS // 5
    wait_for_idle(server)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err and "error" not in captured.err
    assert metric(server, "pldr_compilations_total") == before
    made = client(server).completions.create(model="tiny", prompt="def ", max_tokens=5, seed=3)
    alone = lm.generate("def ", max_new_tokens=5, temperature=1.0, seed=3)[0]
    assert made.choices[0].text == alone.text


@pytest.mark.parametrize(
    "raw", [b"\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /" + b"a" * 99_999]
)
def test_bytes_that_are_no_http(server: Server, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(raw)
        assert link.recv(1000).startswith(b"HTTP/1.1 400")
    assert post(server, "/tokenize", {"prompt": "a"})[0] == 200


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("half", [b"", b"GET /health HTTP/1.1\r\nX-"])
def test_a_head_must_arrive_in_time(
    server: Server, whole: int, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * whole + half)
        answer = b"" if whole else b"}"
        while not answer.endswith(b"}"):
            answer += link.recv(1000)
        link.settimeout(0.02)
        deadline, end = time.monotonic() + 10, None
        while end is None:
            assert time.monotonic() < deadline
            try:
                end = link.recv(1000)
            except TimeoutError:
                link.sendall(b"a" if half else b"")
    assert end.startswith(b"HTTP/1.1 408") if half else end == b""


def test_a_late_body_is_not_cut_with_its_head(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    body = b'{"prompt": "a"}'
    head = "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(head.encode() + body[:5])
        time.sleep(0.5)
        link.sendall(body[5:])
        assert link.recv(1000).startswith(b"HTTP/1.1 200")


def test_an_answer_must_be_read_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "READ_SECONDS", 0.3)
    count, size = 2000, len(get(server, "/")[1])
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * count)
        time.sleep(2)
        read = 0
        with contextlib.suppress(ConnectionError):
            while data := link.recv(1 << 20):
                read += len(data)
    assert read < count * size
    assert get(server, "/health")[0] == 200


def test_an_error_of_the_engine_is_one_line_and_ends_the_server(
    lm: pldr_jax.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    with serving(lm, fails=RuntimeError) as server:
        assert server.served is not None
        monkeypatch.setattr(server.served.worker, "_deliver", broken)
        status, answer, _ = post(server, "/v1/completions", {"prompt": "a"})
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert "\n" not in answer["error"]["message"]


def test_sigterm_lets_a_text_end_and_exits_with_0(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_dir = untrained_run(tmp_path_factory.getbasetemp())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "pldr_jax.serve",
        run_dir,
        "--port",
        str(port),
        "--batch_size=2",
    ]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        assert process.stdout is not None and process.stderr is not None
        assert "compiling" in process.stdout.readline()
        assert "serving untrained" in process.stdout.readline()
        body = {"prompt": [2], "max_tokens": 31, "n": 20, "stream": True, "logit_bias": {"3": -100}}
        asked = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert rest.endswith(b"data: [DONE]\n\n") and rest.count(b'"length"') >= 19
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and err == "" and "def" not in out
    finally:
        process.kill()


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((), "RUN is required"),
        (("{run}", "--port", "99999999"), "--port=99999999: must be at most 65535"),
        (("{run}", "--api_key_file", "/nothing"), "--api_key_file=/nothing"),
        (("{run}", "--gin.Generation.g_mode=recompute"), "Generation.g_mode = 'recompute'"),
        (("{run}", "--gin.Generation.temperature=1"), "--gin.Generation.temperature"),
        (("{run}", "--host", "256.0.0.1"), "256.0.0.1"),
        (("/nothing", "--port", "0"), "/nothing"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    run_dir = untrained_run(tmp_path_factory.getbasetemp())
    given = [argument.format(run=run_dir) for argument in arguments]
    status, _, err = run_here(capsys, serve_main, *given)
    assert status == 2 and message in err and err.count("\n") == 1
