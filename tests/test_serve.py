"""Texts of the server, asked by the real client: exact, in the wire format, whole or streamed."""

import concurrent.futures
from typing import Any

import numpy as np
import openai
import pytest
from serving import metric, post

import pldr_jax
from pldr_jax.config import SamplingConfig
from pldr_jax.inference.intervention import Intervention
from pldr_jax.inference.request import DecodeOptions, Request
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.serve import completions
from pldr_jax.serve.server import Server

pytest_plugins = ("serving",)
PROMPT = "def the "


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


def test_a_stream_without_news_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "PING_SECONDS", 1e-4)
    for path, prompt in (
        ("/v1/completions", {"prompt": PROMPT, "logit_bias": {"3": -100}}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        body = {**prompt, "max_tokens": 9, "stream": True, "seed": 1}
        status, data, _ = post(server, path, body)
        assert status == 200 and b": waiting\n\n" in data and data.endswith(b"data: [DONE]\n\n")
        assert post(server, path, {**body, "stream": False})[0] == 200


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
