"""Keys and values of shared beginnings: the same answers to the last bit, whatever is kept."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers import frozen, untrained_run

import pldr_jax
from pldr_jax.config import ConfigError, GenerationConfig, MeshConfig, SamplingConfig
from pldr_jax.inference.batch import decode_options
from pldr_jax.inference.prefix import chunk_of
from pldr_jax.inference.request import DecodeOptions, Request
from pldr_jax.partition import build_mesh

CHUNK = 8
SHARED = tuple(range(20, 37))
PROMPTS = [
    SHARED, (*SHARED, 40), (*SHARED[:9], 41, 42), SHARED[:CHUNK], SHARED[: CHUNK + 1], (50,),
    SHARED[: 2 * CHUNK],
]  # fmt: skip
SAVED = [0, 2, 1, 0, 1, 0, 1]
"""Chunks of each that those before it have left, since the last token is always run."""


def results(
    lm: pldr_jax.LanguageModel, prompts: list[tuple[int, ...]], **options: Any
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities, one prompt after the other."""
    settings = DecodeOptions(**{"batch_size": 2, "steps": 3, "prefix_cache_mb": 1, **options})
    sampling = SamplingConfig(6, temperature=1.0, seed=3, stop_ids=())
    found = []
    for prompt in prompts:
        (made,) = lm.engine.generate([Request(prompt, sampling)], settings)
        assert made.error is None
        found.append((made.tokens, made.logprobs))
    return found


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> pldr_jax.LanguageModel:
    return pldr_jax.load(untrained_run(tmp_path_factory.getbasetemp()))


def test_warm_answers_are_the_cold_ones_bit_for_bit(lm: pldr_jax.LanguageModel) -> None:
    assert chunk_of(lm.config.context_length) == CHUNK
    cold = [results(frozen(lm), [prompt])[0] for prompt in PROMPTS]
    warm = frozen(lm)
    prefixes, saved = warm.engine.prefixes, []
    for prompt, expected in zip(PROMPTS, cold, strict=True):
        before = prefixes.tokens_saved
        assert results(warm, [prompt]) == [expected]
        saved.append((prefixes.tokens_saved - before) // CHUNK)
    assert saved == SAVED and prefixes.hits == sum(map(bool, SAVED))
    assert results(warm, PROMPTS[::-1], capacity=25) == cold[::-1]
    # All of them side by side, by the ordinary door.
    many = [Request(p, SamplingConfig(6, temperature=1.0, seed=3, stop_ids=())) for p in PROMPTS]
    made = warm.engine.generate(many, DecodeOptions(2, steps=3, prefix_cache_mb=1))
    assert [(one.tokens, one.logprobs) for one in made] == cold
    plain = results(frozen(lm), PROMPTS, prefix_cache_mb=0)
    assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in cold]
    for (_, one), (_, other) in zip(plain, cold, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("kind", ["identity", "low rank in bfloat16", "mesh"])
def test_every_kind_of_cache_and_of_shared_g(lm: pldr_jax.LanguageModel, kind: str) -> None:
    arguments: dict[str, Any] = {}
    if kind == "low rank in bfloat16":
        arguments = {"rank_budget": 1e-2, "cache_dtype": "bfloat16"}
    elif kind == "mesh":
        arguments = {"mesh": build_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])}
    model = frozen(lm, **arguments)
    if kind == "identity":
        config = dataclasses.replace(lm.config, g_source="identity")
        model = pldr_jax.LanguageModel(config, lm.params)
    cold = results(model, [PROMPTS[0]])
    assert model.engine.prefixes.tokens_saved == 0
    assert results(model, [PROMPTS[0]]) == cold
    assert model.engine.prefixes.tokens_saved == 2 * CHUNK
    plain = results(model, [PROMPTS[0]], prefix_cache_mb=0)
    assert plain[0][0] == cold[0][0]
    assert plain[0][1] == pytest.approx(cold[0][1], abs=2e-2 if "bfloat16" in kind else 1e-4)


def test_what_was_not_used_for_longest_is_forgotten(lm: pldr_jax.LanguageModel) -> None:
    model = frozen(lm)
    prefixes, g_lm = model.engine.prefixes, model.g_lm
    config = model.config
    of_chunk = 2 * 4 * config.num_layers * CHUNK * config.model_dim

    def saved(prompt: tuple[int, ...], g_lm: Any = g_lm) -> int:
        before = prefixes.tokens_saved
        prefixes.run(model.params, prompt, g_lm, 3 * of_chunk)
        assert prefixes.nbytes <= 3 * of_chunk
        return (prefixes.tokens_saved - before) // CHUNK

    others = tuple(range(60, 60 + CHUNK + 1))
    assert [saved(SHARED), saved(others), saved(SHARED)] == [0, 0, 2]
    assert prefixes.nbytes == 3 * of_chunk
    assert saved((*others[::-1],)) == 0  # `others` gives way
    assert [saved(SHARED), saved(others)] == [2, 0]
    assert saved(SHARED, jax.numpy.copy(g_lm)) == 0  # what another G_LM made is of no use
    assert saved(SHARED, g_lm) == 0


def test_where_there_is_nothing_to_share(lm: pldr_jax.LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"^prefix_cache_mb = 3: .*pldr-freeze"):
        lm.generate("a", prefix_cache_mb=3)
    with pytest.raises(ConfigError, match=r"^prefix_cache_mb = 3: .*key-value"):
        DecodeOptions(prefix_cache_mb=3, kv_cache=False)
    assert decode_options(GenerationConfig(prefix_cache_mb=3)).prefix_cache_mb == 3
    with pytest.raises(ConfigError, match=r"^Generation.prefix_cache_mb = 3: "):
        GenerationConfig(prefix_cache_mb=3, g_mode="recompute")
    queue = [Request(prompt, SamplingConfig(6, stop_ids=())) for prompt in PROMPTS[:2]]
    options = DecodeOptions(2, steps=3, share_first_g=True, prefix_cache_mb=1)
    first = lm.engine.generate(queue, options)
    assert lm.engine.prefixes.tokens_saved == SAVED[1] * CHUNK
    told = lm.engine.generate(queue, options, lm([PROMPTS[0]]).deductive.G_LM)
    assert [one.tokens for one in first] == [one.tokens for one in told]
    model = frozen(lm)
    own = Request((5,), SamplingConfig(2), g_lm=np.asarray(model.g_lm))
    (made,) = model.engine.generate([own], DecodeOptions(prefix_cache_mb=1))
    assert made.finish_reason == "error" and "prefix_cache_mb" in str(made.error)
