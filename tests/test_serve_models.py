"""Servers of other models: of one G_LM for all texts, or split over devices."""

import concurrent.futures
from typing import Any

import jax
import pytest
from helpers import frozen
from serving import client, get, metric, post, serving

import pldr_jax
from pldr_jax.config import ConfigError, GenerationConfig, MeshConfig
from pldr_jax.partition import build_mesh
from pldr_jax.serve.server import Server
from pldr_jax.serve.settings import ServeConfig

pytest_plugins = ("serving",)
PROMPTS = ["def the ", "def the of value", "for", "def the of model"]


@pytest.mark.parametrize("kind", ["frozen", "frozen, beginnings kept", "mesh"])
def test_texts_are_those_of_generate(lm: pldr_jax.LanguageModel, kind: str) -> None:
    mesh = build_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4]) if "mesh" in kind else None
    flags: dict[str, Any] = {"batch_size": 4, "capacity": 24}
    options: dict[str, Any] = {"prefix_cache_mb": 1} if "kept" in kind else {}
    if "frozen" in kind:
        model = frozen(lm, mesh=mesh)
    else:
        model = pldr_jax.LanguageModel(lm.config, lm.params, None, lm.tokenizer, mesh=mesh)
    alone = [
        model.generate(text, 9, temperature=1.0, seed=i, batch_size=4, capacity=24, **options)[0]
        for i, text in enumerate(PROMPTS * 3)
    ]
    with serving(model, GenerationConfig(**options), **flags) as server:
        about = get(server, "/v1/models")[1]["data"][0]
        assert about["shared_g_lm"] == ("frozen" in kind)
        assert about["g_modes"] == ["prompt", "frozen" if "frozen" in kind else "identity"]
        counted = ("compilations", "prefix_tokens")
        before = [
            metric(server, f"pldr_{name}_total") for name in ("compilations", "prefix_tokens")
        ]

        def one(i: int) -> Any:
            made = client(server).completions.create(
                model="tiny", prompt=(PROMPTS * 3)[i], max_tokens=9, seed=i, logprobs=0
            )
            return made.choices[0]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            made = list(pool.map(one, range(len(alone))))
        after = [metric(server, f"pldr_{name}_total") for name in counted]
        assert after[0] == before[0]
        assert (after[1] > before[1]) == ("kept" in kind)
        if "frozen" in kind:
            body = {"prompt": "a", "g_text": "b"}
            assert post(server, "/v1/completions", body)[1]["error"]["param"] == "g_text"
    for choice, expected in zip(made, alone, strict=True):
        assert choice.text == expected.text
        assert choice.logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_a_learned_g_lm_keeps_no_beginnings(lm: pldr_jax.LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"^Generation\.prefix_cache_mb = 1: .*pldr-freeze"):
        Server(lm, "tiny", ServeConfig(port=0), GenerationConfig(prefix_cache_mb=1)).run()
