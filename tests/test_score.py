"""Scoring: the same numbers as the logits give, no leak from the future, any batch size."""

import dataclasses
import functools
import types
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import GOLDENS, Golden

import pldr_jax
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.decoder import init_params
from pldr_jax.training.freeze.calibrate import without_plga

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    metric_dim=16,
    num_residual_layers=1,
    context_length=64,
    unroll=False,
)


@functools.cache
def params():
    """Weights larger than the initial ones, so that G_LM depends on its input."""
    made = nn.unbox(jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(1)))
    plga = made["layers"]["attention"]["plga"]
    plga["a"], plga["P"] = 20 * plga["a"], 5 * plga["P"]
    return made


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(CONFIG, params())


def ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, 64, length).tolist()


# 5, 5, 13 and 21 tokens: three lengths, two buckets.
PAIRS = [(ids(k, n), ids(9 + k, m)) for k, (n, m) in enumerate([(3, 2), (2, 3), (8, 5), (13, 8)])]
CONTEXTS, CONTINUATIONS = [list(x) for x in zip(*PAIRS, strict=True)]


def direct(lm: LanguageModel, context: list[int], continuation: list[int], g_lm=None):
    """Log-probabilities, float64, and whether each token is the most probable one; the last token
    is only predicted.
    """
    tokens, first = [*context, *continuation], max(len(context), 1)
    logits = np.asarray(lm([tokens[:-1]], g_lm).logits[0], np.float64)[first - 1 :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = tokens[first:]
    return logprobs[np.arange(len(targets)), targets], logits.argmax(-1) == targets


def g_lm_of(lm: LanguageModel, tokens: list[int]) -> np.ndarray:
    return np.asarray(lm([tokens]).deductive.G_LM)[:, 0]


def test_full_is_what_the_logits_say(lm) -> None:
    scores = lm.score(CONTEXTS, CONTINUATIONS)
    for (context, continuation), score in zip(PAIRS, scores, strict=True):
        expected, _ = direct(lm, context, continuation)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-4)
        assert score.tokens == continuation


def test_causal_takes_g_lm_of_the_context(lm) -> None:
    scores = lm.score(CONTEXTS, CONTINUATIONS, mode="causal")
    full = lm.score(CONTEXTS, CONTINUATIONS)
    for (context, continuation), score, other in zip(PAIRS, scores, full, strict=True):
        expected, _ = direct(lm, context, continuation, g_lm_of(lm, context))
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
        assert abs(score.logprob - other.logprob) > 1e-3


@pytest.mark.parametrize("mode", ["causal", "frozen"])
def test_a_given_g_lm_serves_every_text(lm, mode: str) -> None:
    g_lm = g_lm_of(lm, ids(7, 13))
    for pair, score in zip(
        PAIRS, lm.score(CONTEXTS, CONTINUATIONS, mode=mode, g_lm=g_lm), strict=True
    ):
        np.testing.assert_allclose(score.logprobs, direct(lm, *pair, g_lm)[0], atol=1e-5)


def test_only_full_sees_the_future(lm) -> None:
    context, continuation = ids(1, 8), ids(2, 8)
    changed = [*continuation[:1], *ids(3, 7)]
    assert continuation[1:] != changed[1:]
    for mode, leaks in (("causal", False), ("full", True)):
        one, other = (lm.score(context, c, mode=mode)[0] for c in (continuation, changed))
        assert (abs(one.logprobs[0] - other.logprobs[0]) > 1e-4) == leaks, mode


def test_causal_is_what_decoding_computes(lm) -> None:
    context = ids(4, 8)
    (made,) = lm.generate([context], max_new_tokens=6)
    (score,) = lm.score(context, made.tokens, mode="causal")
    np.testing.assert_allclose(score.logprobs, made.logprobs, atol=1e-5)
    assert score.is_greedy
    changed = [*made.tokens[:-1], (made.tokens[-1] + 1) % 64]
    assert not lm.score(context, changed, mode="causal")[0].is_greedy


@pytest.mark.parametrize("mode", ["full", "causal"])
def test_batches_change_nothing(lm, mode: str) -> None:
    one = [lm.score(*pair, mode=mode)[0] for pair in PAIRS]
    for rows in (2, 3):
        many = lm.score(CONTEXTS[::-1], CONTINUATIONS[::-1], mode=mode, rows=rows)[::-1]
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
            assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)


def test_an_empty_context_scores_all_but_the_first_token(lm) -> None:
    text = ids(5, 13)
    (score,) = lm.score([[]], [text])
    np.testing.assert_allclose(score.logprobs, direct(lm, [], text)[0], atol=1e-5)
    assert score.tokens == text[1:]


def test_predefined_g_lm_is_the_same_in_every_mode() -> None:
    g_lm = jax.random.normal(jax.random.key(0), (2, 1, 2, 8, 8))
    for g_source, given in (("external", g_lm), ("identity", None)):
        config = dataclasses.replace(CONFIG, g_source=g_source)
        lm = LanguageModel(config, without_plga(params()), given)
        full, causal, frozen = (
            lm.score(CONTEXTS, CONTINUATIONS, mode=mode) for mode in ("full", "causal", "frozen")
        )
        assert full == causal == frozen
        for pair, score in zip(PAIRS, full, strict=True):
            np.testing.assert_allclose(score.logprobs, direct(lm, *pair)[0], atol=1e-5)


def test_full_takes_g_lm_of_the_inputs(lm) -> None:
    """The last token is predicted, as in training, and not known: one token after a context is
    scored as decoding scores it.
    """
    for context, last in ((ids(1, 8), 3), (ids(2, 17), 5), (ids(3, 1), 9)):
        full, causal = (lm.score(context, [last], mode)[0] for mode in ("full", "causal"))
        assert full.logprob == pytest.approx(causal.logprob, abs=1e-5)
        # Whatever it is, the tokens before it are scored alike.
        one, other = (lm.score(context[:1], [*context[1:], x])[0] for x in (last, last + 1))
        assert one.logprobs[:-1] == other.logprobs[:-1] and one.logprob != other.logprob


def test_full_is_what_the_authors_code_computes(golden: Callable[[str], Golden]) -> None:
    """Which feeds all tokens but the last: the golden's logits are those of such rows."""
    case = golden("deep")
    rows = case.rows.tolist()
    logits = np.asarray(case.tensors["logits"], np.float64)
    model = pldr_jax.load(GOLDENS / "deep")
    for row, logits_TV in zip(rows, logits, strict=True):
        logprobs = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        expected = logprobs[np.arange(len(row) - 1), row[1:]]
        (score,) = model.score(row[:1], row[1:])
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-4)


def test_a_text_may_have_one_token_more_than_the_context(lm) -> None:
    """It is only predicted."""
    text = ids(11, 65)
    for mode in ("full", "causal"):
        (score,) = lm.score(text[:-1], text[-1:], mode)
        np.testing.assert_allclose(score.logprobs, direct(lm, text[:-1], text[-1:])[0], atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", ["full", "causal"])
def test_logits_that_are_not_finite_are_refused(lm, mode: str, value: float) -> None:
    """As in generation: an argmax of NaN is no answer."""
    table = lm.params["embedding"]["table"].at[63].set(value)
    broken = {**lm.params, "embedding": {**lm.params["embedding"], "table": table}}
    bad = LanguageModel(lm.config, broken)
    assert bad.score([1, 2], [3], mode)[0].logprob == lm.score([1, 2], [3], mode)[0].logprob
    with pytest.raises(ConfigError, match="text 1: the logits are not finite"):
        bad.score([[1, 2], [1, 63]], [[3], [3]], mode)
    # Of a text whose last token is the broken one, nothing is computed from it.
    assert np.isfinite(bad.score([1, 2], [63], mode)[0].logprob)


class Letters:
    """A tokenizer that joins "ab" and two spaces to one token, so that a continuation may change
    the context.
    """

    vocab_size, eos_id = 64, -1

    def encode(self, text: str) -> list[int]:
        letters = text.replace("ab", "z").replace("  ", "{")
        return [40 if c == " " else ord(c) - 96 for c in letters]


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("cd", "ef", ([3, 4], [5, 6])),
        ("ca", "bd", ([3, 1], [4])),  # c, ab, d: as many tokens as the context has alone
        ("cd ", "ef", ([3, 4], [40, 5, 6])),
        ("cd  ", "ef", ([3, 4], [27, 5, 6])),
        ("cd ", " ef", ([3, 4], [27, 5, 6])),
        ("c\n", "d", ([3], [-86, 4])),
        ("  ", "d", ([], [27, 4])),
        ("", "de", ([], [4, 5])),
    ],
)
def test_strings_are_split_as_the_harness_splits_them(lm, context, continuation, expected) -> None:
    lm = LanguageModel(lm.config, lm.params, None, Letters())  # type: ignore[arg-type]
    assert lm.encode_pair(context, continuation) == expected
    model = pytest.importorskip("lm_eval.api.model").TemplateLM
    harness = types.SimpleNamespace(
        tok_encode=lambda text, **_: Letters().encode(text), backend="causal"
    )
    if context:  # of which it knows what to do elsewhere
        assert model._encode_pair(harness, context, continuation) == expected


def test_strings_are_tokenised_joined(lm) -> None:
    lm = LanguageModel(lm.config, lm.params, None, Letters())  # type: ignore[arg-type]
    (score,) = lm.score("cd ", "ef")
    np.testing.assert_allclose(score.logprobs, direct(lm, [3, 4], [40, 5, 6])[0], atol=1e-5)
    assert score.tokens == [40, 5, 6]
    assert lm.score([3], "de")[0].tokens == [4, 5]


@pytest.mark.parametrize(
    "arguments,named",
    [
        (([[1]], [[]]), "empty"),
        (([[]], [[1, 2]], "causal"), "g_lm"),
        (([[]], [[1]]), "empty context"),
        (([[1]], [[64]]), "vocabulary"),
        (([[1] * 60], [[1] * 6]), "66 tokens, at most 65"),
        (([[1]], [[2]], "full", None, 0), "batch_size"),
        (([[1]], [[2]], "full", None, True), "batch_size"),
        (([None], [[2]]), "prompt None: must be a string or a list"),
        (([[1]], [[2.5]]), "must be a string or a list"),
        ((b"ab", [[2]]), "prompts: b'ab': must be"),
        (([[1]], [[1], [2]]), "continuations"),
        (([[1]], [[1]], "half"), "mode"),
        (([[1]], [[1]], "frozen"), "g_lm"),
        (([[1]], [[1]], "full", np.zeros((2, 2, 8, 8))), "frozen"),
        (([[1]], [[1]], "causal", np.zeros((2, 3, 2, 8, 8))), "batch axis"),
        ((["a"], ["b"]), "tokenizer"),
    ],
)
def test_what_cannot_be_scored_is_one_line(lm, arguments, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        lm.score(*arguments)
    assert "\n" not in str(caught.value)


def test_an_empty_context_is_fine_with_a_given_g_lm(lm) -> None:
    text, g_lm = ids(6, 5), g_lm_of(lm, ids(8, 13))
    (score,) = lm.score([[]], [text], mode="causal", g_lm=g_lm)
    np.testing.assert_allclose(score.logprobs, direct(lm, [], text, g_lm)[0], atol=1e-5)
