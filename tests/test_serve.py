"""The server, asked by the real client: exact answers, the wire format, slots that are freed."""

import concurrent.futures
import http.client
import json
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from serving import client, get, metric, post, serving, small_model, wait_for_idle

import pldr_jax
from pldr_jax.config import GenerationConfig, SamplingConfig
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.inference.intervention import Intervention
from pldr_jax.inference.request import DecodeOptions, Request
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.serve.chat import ask_chat
from pldr_jax.serve.server import Server
from pldr_jax.serve.wire import ApiError

PROMPT = "def the "


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


# Exactness


def test_texts_are_those_of_generate(api: openai.OpenAI, lm: pldr_jax.LanguageModel) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 1.3, "seed": 7, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
        {"temperature": 0.9, "seed": 1, "repetition_penalty": 1.3},
        {"temperature": 0.7, "seed": 3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ]
    beyond = ("top_k", "min_p", "repetition_penalty")
    for one in settings:
        alone = lm.generate(PROMPT, max_new_tokens=9, **one)[0]
        extra = {name: one.pop(name) for name in beyond if name in one}
        made = api.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=9, logprobs=0, extra_body=extra, **one
        )
        assert made.choices[0].text == alone.text
        assert made.choices[0].logprobs.token_logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        reason = "stop" if alone.finish_reason == "stop" else "length"
        assert made.choices[0].finish_reason == reason


def test_prompts_and_choices_are_those_of_generate(
    api: openai.OpenAI, lm: pldr_jax.LanguageModel
) -> None:
    prompts = [lm.encode(text) for text in (PROMPT, "for model in")]
    doubled = [prompt for prompt in prompts for _ in range(2)]
    alone = lm.generate(doubled, max_new_tokens=5, temperature=1.0, seed=11)
    made = api.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=5, seed=11)
    assert [choice.text for choice in made.choices] == [one.text for one in alone]
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    usage = made.usage
    assert usage.prompt_tokens == sum(map(len, prompts))
    assert usage.completion_tokens == sum(len(one.tokens) for one in alone)


def test_exact_under_load_and_nothing_is_compiled(
    server: Server, api: openai.OpenAI, lm: pldr_jax.LanguageModel
) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for i in range(40):
        prompt = rng.integers(4, 200, int(rng.integers(1, 24))).tolist()
        cases.append((prompt, int(rng.integers(1, 12)), float(i % 3) / 2, i))
    alone = [
        lm.generate([prompt], max_new_tokens=count, temperature=temperature, seed=seed)[0].text
        for prompt, count, temperature, seed in cases
    ]
    before = metric(server, "pldr_compilations_total")

    def one(case: Any) -> str:
        prompt, count, temperature, seed = case
        made = api.completions.create(
            model="tiny", prompt=prompt, max_tokens=count, temperature=temperature, seed=seed
        )
        return made.choices[0].text

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, cases)) == alone
    assert metric(server, "pldr_compilations_total") == before


def test_g_modes_and_interventions_are_those_of_the_api(
    server: Server, lm: pldr_jax.LanguageModel
) -> None:
    before = metric(server, "pldr_compilations_total")
    gain = np.ones((2, 2))
    gain[1, 0] = 3.0
    other = tuple(lm.encode("range print model"))
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"g_mode": "identity"}, {"g_lm": identity_g_lm(lm.config)}),
        ({"g_text": "range print model"}, {"intervention": Intervention(text=other)}),
        ({"gain": gain.tolist()}, {"intervention": Intervention(gain=gain)}),
        ({"gain": 2.0, "g_text": "range print model"},
         {"intervention": Intervention(gain=2.0, text=other)}),
    ]  # fmt: skip
    made = []
    for fields, _ in cases:
        body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 1, **fields}
        status, answer, _ = post(server, "/v1/completions", body)
        assert status == 200, answer
        made.append(answer["choices"][0])
    assert metric(server, "pldr_compilations_total") == before
    for (_, arguments), choice in zip(cases, made, strict=True):
        alone = lm.generate(PROMPT, max_new_tokens=8, **arguments)[0]
        assert choice["text"] == alone.text
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_bias_is_that_of_the_engine(api: openai.OpenAI, lm: pldr_jax.LanguageModel) -> None:
    tokens = tuple(lm.encode(PROMPT))
    forced = api.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"70": 100}
    )
    assert forced.choices[0].text == lm.tokenizer.decode_continuation(tokens, [70] * 4)
    biased = Request(tokens, SamplingConfig(4, stop_ids=()), logit_bias=((70, 100.0),))
    for options in (DecodeOptions(1), DecodeOptions(1, kv_cache=False)):
        assert lm.engine.generate([biased], options)[0].tokens == [70] * 4
        penalised = Request((70, 70), SamplingConfig(9, presence_penalty=1e6, stop_ids=()))
        made = lm.engine.generate([penalised, biased], options)[0].tokens
        assert len(set(made)) == 9


# Log-probabilities


def test_top_logprobs_are_those_of_the_full_pass(
    api: openai.OpenAI, lm: pldr_jax.LanguageModel
) -> None:
    made = api.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=5
    ).choices[0]
    assert len(made.logprobs.tokens) == len(made.logprobs.top_logprobs) == 6
    for chosen, top in zip(made.logprobs.token_logprobs, made.logprobs.top_logprobs, strict=True):
        assert chosen == max(top.values())  # greedy, to the last bit
    for offset, token in zip(made.logprobs.text_offset, made.logprobs.tokens, strict=True):
        assert token.startswith("bytes:") or made.text.startswith(token, offset)
    assert made.logprobs.text_offset[0] == 0
    first = np.sort(np.asarray(lm([lm.encode(PROMPT)]).logits[0, -1], np.float64))[::-1]
    expected = first[:5] - np.log(np.exp(first - first[0]).sum()) - first[0]
    assert sorted(made.logprobs.top_logprobs[0].values(), reverse=True) == pytest.approx(
        expected.tolist(), abs=1e-4
    )


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_gives_the_scores_of_lm_score(
    api: openai.OpenAI, lm: pldr_jax.LanguageModel, max_tokens: int
) -> None:
    tokens = lm.encode("def return self the of value")
    for g_tokens, scores in (
        (None, lm.score([tokens[:1]], [tokens[1:]], mode="full")[0].logprobs),
        (5, lm.score([tokens[:5]], [tokens[5:]], mode="causal")[0].logprobs),
    ):
        extra = {} if g_tokens is None else {"g_tokens": g_tokens}
        made = api.completions.create(
            model="tiny", prompt=tokens, max_tokens=max_tokens, echo=True, logprobs=1,
            temperature=0, extra_body=extra,
        ).choices[0]  # fmt: skip
        told = made.logprobs.token_logprobs
        assert told[0] is None and len(told) == len(tokens) + max_tokens
        assert told[len(tokens) - len(scores) : len(tokens)] == pytest.approx(scores, abs=1e-4)
        assert made.text.startswith("def return self the of value")
        assert made.logprobs.text_offset[len(tokens) :] in (
            [],
            [len("def return self the of value")],
        )


# Streams


def test_a_stream_is_the_whole_in_pieces(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": [PROMPT, "for"], "max_tokens": 12, "seed": 2, "logprobs": 2,
        "echo": True,
    }  # fmt: skip
    whole = api.completions.create(**asked)
    usage = None
    texts, tokens, reasons = {0: "", 1: ""}, {0: [], 1: []}, {}
    for event in api.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert reasons[choice.index] == choice.finish_reason
    assert usage == whole.usage


def test_stop_strings_end_a_text_and_never_show(
    api: openai.OpenAI, lm: pldr_jax.LanguageModel
) -> None:
    text = lm.generate(PROMPT, max_new_tokens=20)[0].text
    stop = text[3:6]
    cut = text[: text.index(stop)]
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stop": [stop, "@@"],
        "logprobs": 0,
    }  # fmt: skip
    made = api.completions.create(**asked).choices[0]
    assert (made.text, made.finish_reason) == (cut, "stop")
    assert all(offset < len(cut) for offset in made.logprobs.text_offset)
    shown = ""
    for event in api.completions.create(stream=True, **asked):
        shown += event.choices[0].text
        assert cut.startswith(shown)
    assert shown == cut


# Errors


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


# Slots


def long_stream(server: Server) -> http.client.HTTPConnection:
    """A stream of a text that would go on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": [2], "max_tokens": 31, "stream": True, "n": 128, "logit_bias": {"3": -100}}
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


def test_stopping_lets_a_stream_end(lm: pldr_jax.LanguageModel) -> None:
    with serving(lm) as server:
        api = client(server)
        stream = api.completions.create(
            model="tiny", prompt=[2], max_tokens=31, stream=True, logit_bias={"3": -100}, seed=1
        )
        events = iter(stream)
        next(events)
        server.stop()
        rest = list(events)
        assert rest[-1].choices[0].finish_reason == "length"
        ended = threading.Event()
        ended.set()
    assert ended.is_set()


# Chats


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


# Deductive outputs


def test_deductive_outputs_are_those_of_the_forward_pass(
    server: Server, lm: pldr_jax.LanguageModel
) -> None:
    text, other = "def the token", "model layer"
    before = metric(server, "pldr_compilations_total")
    body = {"text": text, "outputs": ["G_LM", "A"], "layers": [1], "heads": [1, 0]}
    status, answer, _ = post(server, "/v1/deductive", {**body, "reference": other})
    assert status == 200, answer
    assert metric(server, "pldr_compilations_total") == before
    outputs = lm([lm.encode(text)]).deductive
    others = lm([lm.encode(other)]).deductive
    for name, expected, reference in (
        ("G_LM", outputs.G_LM, others.G_LM), ("A", outputs.A, others.A),
    ):  # fmt: skip
        told = answer["outputs"][name]
        x = np.asarray(expected, np.float64)[1:, 0][:, ::-1]
        y = np.asarray(reference, np.float64)[1:, 0][:, ::-1]
        assert np.asarray(told["values"]) == pytest.approx(x, rel=1e-3, abs=1e-4)
        sign, log = np.linalg.slogdet(np.asarray(told["values"]))
        assert told["determinant_sign"] == sign.tolist()
        assert np.asarray(told["determinant_log10"]) == pytest.approx(log / np.log(10))
        order = np.sqrt(np.square(x - y).mean()) / abs(np.concatenate([x, y]).mean())
        assert told["order_parameter"]["all"] == pytest.approx(order, rel=1e-2)
        singular = np.linalg.svd(np.asarray(told["values"]), compute_uv=False)
        least = singular.max(-1, keepdims=True) * 8 * np.finfo(np.float32).eps
        assert told["rank"] == (singular > least).sum(-1).tolist()
    short = post(server, "/v1/deductive", {"text": text, "values": False})[1]["outputs"]["G_LM"]
    assert "values" not in short and np.asarray(short["rank"]).shape == (2, 2)
    for bad, param in (
        ({"text": ""}, "text"), ({"text": text, "layers": [2]}, "layers"),
        ({"text": text, "heads": []}, "heads"), ({"text": text, "outputs": ["B"]}, "outputs"),
        ({"text": text, "outputs": ["A"], "g_text": "x"}, "outputs"),
        ({"text": text, "nothing": 1}, "nothing"), ({"text": "a " * 40}, "text"),
    ):  # fmt: skip
        made, error, _ = post(server, "/v1/deductive", bad)
        assert (made, error["error"]["param"]) == (400, param)
