"""lm-evaluation-harness as a client of the server, by its model `local-completions`."""

import logging
from typing import Any

import pytest
from helpers import frozen
from serving import serving

import pldr_jax
from pldr_jax.evaluation.scorer import TextScorer
from pldr_jax.serve.server import Server

pytest_plugins = ("serving",)
harness = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval")
PAIRS = [("def the", " of value"), ("for model in", " range"), ("", "the of")]


def scores(server: Server, lm: pldr_jax.LanguageModel, pairs: list[tuple[str, str]]) -> Any:
    """What the harness reads from the server: log-probabilities, and whether greedy."""
    from lm_eval.api.instance import Instance

    assert lm.tokenizer is not None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    remote = harness.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{server.port}/v1/completions", model="tiny", max_length=32,
        tokenizer_backend="remote", batch_size=2, custom_prefix_token_id=lm.tokenizer.eos_id,
    )  # fmt: skip
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return remote.loglikelihood(asked, disable_tqdm=True)


def check(made: Any, scorer: TextScorer, pairs: list[tuple[str, str]]) -> None:
    expected = scorer.loglikelihood(pairs)
    assert [logprob for logprob, _ in made] == pytest.approx([x for x, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in made] == [greedy for _, greedy in expected]


def test_with_a_learned_g_lm_it_scores_as_full(server: Server, lm: pldr_jax.LanguageModel) -> None:
    made = scores(server, lm, PAIRS)
    check(made, TextScorer(lm, "full", 4), PAIRS)
    causal = TextScorer(lm, "causal", 4).loglikelihood(PAIRS)
    assert any(abs(x - y) > 1e-3 for (x, _), (y, _) in zip(made, causal, strict=True))


def test_with_one_g_lm_for_all_it_scores_as_every_mode(lm: pldr_jax.LanguageModel) -> None:
    model = frozen(lm)
    with serving(model) as server:
        made = scores(server, model, PAIRS)
    for mode in ("frozen", "causal"):
        check(made, TextScorer(model, mode, 4), PAIRS)
