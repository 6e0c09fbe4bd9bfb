"""Benchmarks: requests answered as the model's own logits say, whatever the batch; local tasks."""

import functools
import json
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import WORDS

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.evaluation.report import as_metrics, differences, results_json, results_table
from pldr_jax.evaluation.scorer import TextScorer
from pldr_jax.evaluation.windows import rolling_windows
from pldr_jax.inference.decode import prompt_g_lm
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.reference import reference_logits
from pldr_jax.model.decoder import init_params

MODEL = ModelConfig(
    vocab_size=300,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    ffn_dim=24,
    metric_dim=12,
    num_residual_layers=1,
    num_gated_units=1,
    context_length=32,
    unroll=False,
)
MODES = ("full", "causal", "frozen")


@functools.cache
def model() -> LanguageModel:
    """Its G_LM depends on its input."""
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(1)))
    plga = params["layers"]["attention"]["plga"]
    plga["a"], plga["P"] = 20 * plga["a"], 5 * plga["P"]
    text = " ".join(WORDS * 40) + "\nabcdefghijklmnopqrstuvwxyz?:.\n" * 9
    return LanguageModel(MODEL, params, tokenizer=Tokenizer.train([text], 300))


@functools.cache
def g_lm() -> jax.Array:
    return model()([[7, 8, 9, 10, 11]]).deductive.G_LM


def scorer(mode: Any, rows: int = 8, **options: Any) -> TextScorer:
    given = g_lm() if mode == "frozen" else None
    return TextScorer(model(), mode, rows, given, **options)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return to_tensors(MODEL, model().params)


@functools.cache
def g_lm_of_tokens() -> Any:
    return jax.jit(functools.partial(prompt_g_lm, MODEL, model().params))


def by_hand(mode: str, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """From the logits of one forward pass over all tokens but the last, in NumPy."""
    tokens = [*context, *continuation][:-1]
    g = np.asarray(g_lm())
    if mode != "frozen":
        read = tokens if mode == "full" else context
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(read)] = read
        g = np.asarray(g_lm_of_tokens()(padded, np.array([len(read)])))
    logits = reference_logits(MODEL, tensors(), np.array(tokens), g[:, 0])[len(context) - 1 :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = logprobs[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((logits.argmax(-1) == continuation).all())


LONG = " ".join(WORDS * 3)
PAIRS = [
    ("def return", " self"),
    ("", "of value"),
    ("list for in", " if else print range"),
    (LONG, " model"),
    ("print", ""),
    ("tokens ", "model layer"),
]


def test_windows_predict_every_token_once() -> None:
    for length in range(40):
        tokens = list(range(100, 100 + length))
        for context_length, overlap in ((2, 1), (8, 1), (8, 3), (8, 7), (16, 4)):
            windows = list(rolling_windows(tokens, 3, context_length, overlap))
            assert [t for _, scored in windows for t in scored] == tokens
            for i, (context, scored) in enumerate(windows):
                first = scored[0] - 100
                assert len(context) + len(scored) <= context_length + 1 and scored
                assert list(context) == ([3] if i == 0 else tokens[first - len(context) : first])
                assert i == 0 or len(context) >= overlap
            if len(windows) > 1:
                assert len(windows[-1][0]) + len(windows[-1][1]) == context_length + 1
    with pytest.raises(ValueError, match="overlap"):
        list(rolling_windows([1], 3, 8, 8))


def test_windows_are_those_of_the_harness() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(40):
        tokens = list(range(100, 100 + length))
        for context_length, overlap in ((2, 1), (8, 1), (8, 3), (16, 4)):
            theirs = utils.get_rolling_token_windows(tokens, 3, context_length, overlap)
            expected = [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs]
            assert list(rolling_windows(tokens, 3, context_length, overlap)) == expected


@pytest.mark.parametrize("mode", MODES)
def test_loglikelihood_is_that_of_the_logits(mode: str) -> None:
    found = scorer(mode).loglikelihood(PAIRS)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        if not continuation:
            assert (logprob, greedy) == (0.0, True)
            continue
        before, after = model().encode_pair(context, continuation)
        before = (before or [3])[-(33 - len(after)) :]
        expected, is_greedy = by_hand(mode, before, after)
        assert logprob == pytest.approx(expected, abs=2e-5), context
        assert greedy == is_greedy
    assert len(model().encode(LONG)) > 32


def test_the_modes_differ_where_g_lm_depends_on_its_input() -> None:
    full, causal, frozen = ([x for x, _ in scorer(mode).loglikelihood(PAIRS)] for mode in MODES)
    assert max(abs(a - b) for a, b in zip(full, causal, strict=True)) > 1e-2
    assert max(abs(a - b) for a, b in zip(causal, frozen, strict=True)) > 1e-2


def test_scores_are_unchanged_by_caching_where_g_lm_is_invariant() -> None:
    """With a = 0, G_LM is b_a for every text."""
    params = jax.tree.map(lambda leaf: leaf, model().params)
    plga = params["layers"]["attention"]["plga"]
    plga["a"], plga["b_a"] = 0 * plga["a"], jax.random.normal(jax.random.key(2), plga["a"].shape)
    lm = LanguageModel(MODEL, params, tokenizer=model().tokenizer)
    full, causal = (TextScorer(lm, mode).loglikelihood(PAIRS) for mode in ("full", "causal"))
    np.testing.assert_allclose([x for x, _ in full], [x for x, _ in causal], atol=1e-5)
    assert full[0][0] != pytest.approx(scorer("full").loglikelihood(PAIRS[:1])[0][0], abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_rolling(mode: str) -> None:
    texts = [LONG, "def", "", " ".join(WORDS)]
    found = scorer(mode, overlap=4).loglikelihood_rolling(texts)
    for text, total in zip(texts, found, strict=True):
        windows = list(rolling_windows(model().encode(text), 3, 32, 4))
        expected = sum(by_hand(mode, list(c), list(x))[0] for c, x in windows)
        assert total == pytest.approx(expected, abs=1e-4)
    assert found[2] == 0 and found[0] < found[3] < found[1] < 0


@pytest.mark.parametrize("mode", MODES)
def test_results_do_not_depend_on_the_batch_size(mode: str) -> None:
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(WORDS, n)) for n in (1, 3, 4, 6, 9, 2, 7, 5, 12, 3)]
    pairs = [(text, " model layer") for text in words] + PAIRS
    texts = [*words, LONG]
    results = []
    for rows in (1, 4, 16):
        one = scorer(mode, rows)
        results.append((one.loglikelihood(pairs), one.loglikelihood_rolling(texts)))
    for scores, totals in results[1:]:
        np.testing.assert_allclose(
            [x for x, _ in scores], [x for x, _ in results[0][0]], rtol=0, atol=1e-5
        )
        assert [g for _, g in scores] == [g for _, g in results[0][0]]
        np.testing.assert_allclose(totals, results[0][1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_generate_until(mode: str) -> None:
    settings = {"max_gen_toks": 6, "until": ["\n\n"]}
    contexts = ["def return", "", "list for in if"]
    requests = [(context, settings) for context in contexts]
    found = [scorer(mode, rows).generate_until(requests) for rows in (1, 4, 16)]
    assert found[0] == found[1] == found[2]
    cache = {"kv_cache": False, "g_cache": "none"} if mode == "full" else {}
    for context, text in zip(contexts, found[0], strict=True):
        prompt = (model().encode(context) or [3])[-26:]
        (made,) = model().generate(prompt, 6, stop=["\n\n"], **cache)
        assert text == made.text


def test_generation_settings() -> None:
    (text,) = scorer("causal").generate_until([("def", {"max_gen_toks": 8})])
    assert len(text) > 3
    stop = text[2]
    (cut,) = scorer("causal").generate_until([("def", {"max_gen_toks": 8, "until": stop})])
    assert cut == text[: text.index(stop)]
    # Half of the context at most; what is too long loses its beginning.
    (long,) = scorer("causal").generate_until([(LONG, {"until": []})])
    kept = model().encode(LONG)[-16:]
    assert long == model().generate(kept, 16)[0].text
    drawn = {"max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "top_k": 200}
    (one,) = scorer("causal").generate_until([("def", drawn)])
    assert one != text and [one] == scorer("causal").generate_until([("def", drawn)])
    greedy = {"max_gen_toks": 8, "do_sample": False, "temperature": 5.0, "top_p": 0.5}
    assert scorer("causal").generate_until([("def", greedy)]) == [text]
    assert scorer("causal").generate_until([("def", {"max_gen_toks": 8, "temperature": 0})]) == [
        text
    ]
    no_draw = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.0}
    assert scorer("causal").generate_until([("def", no_draw)]) == [text]
    with pytest.raises(ConfigError, match=r"^request 0: top_p = 2.0: must be at most 1"):
        scorer("causal").generate_until([("def", {**drawn, "top_p": 2.0})])
    with pytest.raises(ConfigError, match=r"^request 0: beams = 2: no such setting"):
        scorer("causal").generate_until([("def", {"beams": 2})])


def test_no_new_tokens_and_other_names_of_their_number() -> None:
    eight, other = ("def", {"max_gen_toks": 8}), ("def", {"max_new_tokens": 8, "num_beams": 1})
    nothing = ("def", {"max_gen_toks": 0})
    text, empty, same = scorer("causal").generate_until([eight, nothing, other])
    assert text == same and text and empty == ""
    assert scorer("causal").generate_until([nothing]) == [""]
    greedy = {"max_tokens": 8, "do_sample": True, "temperature": 0.0}
    assert scorer("causal").generate_until([("def", greedy)]) == [text]
    with pytest.raises(ConfigError, match=r"^request 1: num_beams = 2: there is no beam search"):
        scorer("causal").generate_until([eight, ("def", {"num_beams": 2})])


def test_what_cannot_be_scored_is_one_line() -> None:
    lm = model()
    for message, make in {
        "mode = 'other'": lambda: TextScorer(lm, "other"),  # type: ignore[arg-type]
        "this model learns G_LM": lambda: TextScorer(lm, "frozen"),
        "a given G_LM needs 'frozen'": lambda: TextScorer(lm, "causal", g_lm=g_lm()),
        "overlap = 32: must be 1 to 31": lambda: TextScorer(lm, overlap=32),
        "no tokenizer.model": lambda: TextScorer(LanguageModel(MODEL, lm.params)),
        "the continuation has .* tokens": lambda: scorer("full").loglikelihood([("a", LONG)]),
    }.items():
        with pytest.raises(ConfigError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_report() -> None:
    one = {"quiz": {"acc": 0.5, "acc_stderr": 0.1}, "text": {"ppl": 2e7}}
    other = {"quiz": {"acc": 0.75, "acc_stderr": 0.2}, "text": {"ppl": math.inf}}
    assert differences({"full": one, "causal": other})["quiz"] == {"acc": 0.25}
    table = results_table({"full": one, "causal": other}).splitlines()
    assert table[0] == "| task | metric | full | causal | difference |"
    assert table[2] == "| quiz | acc | 0.5000 ± 0.1000 | 0.7500 ± 0.2000 | 2.5e-01 |"
    assert table[3] == "| text | ppl | 2.0000e+07 | inf | inf |"
    assert "difference" not in results_table({"full": one})
    read = json.loads(results_json({"step": 3}, {"full": one, "causal": other}))
    assert read["step"] == 3 and read["modes"]["causal"]["text"]["ppl"] is None
    assert read["differences"]["quiz"]["acc"] == 0.25
    assert as_metrics(one) == {"eval/tasks/quiz/acc": 0.5, "eval/tasks/text/ppl": 2e7}
