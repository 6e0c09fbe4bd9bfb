"""G_LM of low rank: the budget is kept, full rank is the ordinary path, and what is decoded is the
model with the truncated G_LM.
"""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pldr_jax.api import LanguageModel
from pldr_jax.config import (
    ConfigError,
    GenerationConfig,
    MeshConfig,
    ModelConfig,
    SamplingConfig,
)
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.inference.request import Request
from pldr_jax.model.cache import LowRankLayerCache, empty_cache
from pldr_jax.model.decoder import Params, forward, init_params, unstack_layers
from pldr_jax.model.low_rank import factorize, group_heads, smallest_ranks
from pldr_jax.model.weights import WeightsDtype, rounded
from pldr_jax.partition import build_mesh
from pldr_jax.training.freeze.calibrate import without_plga

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    num_heads=4,
    head_dim=8,
    context_length=48,
    g_source="external",
    unroll=False,
)
LEARNED: Any = {"g_source": "learned", "num_residual_layers": 1, "num_gated_units": 1}
BUDGETS = (0.0, 1e-2, 1e-1)
PROMPTS = ((5, 9, 2), (7,) * 16, (3,), (1, 2, 3, 4, 5, 6, 7, 8, 9), (40, 2, 60, 11, 13))


@functools.cache
def params_of(config: ModelConfig = CONFIG) -> Params:
    return nn.unbox(jax.jit(functools.partial(init_params, config))(jax.random.key(0)))


@functools.cache
def g_lm_of(config: ModelConfig = CONFIG) -> jax.Array:
    """G_LM [L,1,N,H,J] whose singular values fall from 4, at two rates in each layer."""
    rng = np.random.default_rng(0)
    shape = (config.num_layers, config.num_heads, config.head_dim, config.head_dim)
    (u, _), (v, _) = (np.linalg.qr(rng.normal(size=shape)) for _ in range(2))
    rates_LN = np.array([[0.01, 0.2, 0.01, 0.2], [0.5, 0.1, 0.1, 0.1]])
    values_LNH = 4 * rates_LN[..., None] ** np.arange(config.head_dim)
    return jnp.asarray(np.einsum("LNHE,LNE,LNJE->LNHJ", u, values_LNH, v)[:, None], jnp.float32)


def model_of(budget: float | None, config: ModelConfig = CONFIG, **options: Any) -> LanguageModel:
    return LanguageModel(config, params_of(config), g_lm_of(), rank_budget=budget, **options)


def continued(lm: LanguageModel, temperature: float = 0.0, **options: Any) -> list[Any]:
    """The prompts, continued by 12 tokens, two side by side."""
    requests = [
        Request(prompt, SamplingConfig(12, temperature, seed=i)) for i, prompt in enumerate(PROMPTS)
    ]
    made = {index: row for index, row in lm.run(requests, batch_size=2, capacity=32, **options)}
    assert not any(row.error for row in made.values())
    return [made[i] for i in range(len(PROMPTS))]


def tokens_of(rows: list[Any]) -> list[list[int]]:
    return [list(row.tokens) for row in rows]


def relative_error(g_lm: Any, other: Any) -> np.ndarray:
    difference, size = (
        np.sqrt(np.square(np.asarray(x, np.float64)).sum((-1, -2))) for x in (g_lm - other, g_lm)
    )
    return (difference / size)[:, 0]


@functools.cache
def compiled_forward() -> Any:
    return jax.jit(functools.partial(forward, CONFIG))


def assert_greedy(made: list[Any], params: Params, g_lm: Any) -> None:
    """That the rows are what the whole model draws with this G_LM."""
    tokens_BT = np.zeros((len(PROMPTS), 28), np.int32)
    for i, row in enumerate(made):
        tokens_BT[i, : len(PROMPTS[i]) + 12] = [*PROMPTS[i], *row.tokens]
    logits_BTV = np.asarray(compiled_forward()(params, tokens_BT, g_lm).logits)
    for i, row in enumerate(made):
        drawn_TV = logits_BTV[i, len(PROMPTS[i]) - 1 :][:12]
        assert list(row.tokens) == drawn_TV.argmax(-1).tolist()
        logprobs = np.asarray(jax.nn.log_softmax(drawn_TV))[range(12), row.tokens]
        np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)


# Factors


def test_smallest_ranks_keep_to_the_budget_and_one_less_does_not() -> None:
    values_LNH = np.linalg.svd(np.asarray(g_lm_of(), np.float64)[:, 0], compute_uv=False)
    for budget in (1e-4, 1e-3, 1e-2, 0.1, 0.5):
        ranks_LN = smallest_ranks(values_LNH, budget)
        for values_H, rank in zip(values_LNH.reshape(-1, 8), ranks_LN.ravel(), strict=True):
            errors = [
                np.linalg.norm(values_H[r:]) / np.linalg.norm(values_H) for r in (rank, rank - 1)
            ]
            assert errors[0] <= budget < errors[1]
    assert smallest_ranks(values_LNH, 0.0).tolist() == [[8] * 4] * 2
    # By hand: 3, 4 and 0 leave out nothing, 4/5 or all of it.
    assert smallest_ranks(np.array([[[4.0, 3.0, 0.0]]]), 0.0) == 2
    assert smallest_ranks(np.array([[[4.0, 3.0, 0.0]]]), 0.6) == 1
    assert smallest_ranks(np.array([[[4.0, 3.0, 0.0]]]), 0.59) == 2
    assert smallest_ranks(np.zeros((1, 1, 3)), 0.0) == 1


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_groups_are_the_cheapest(shards: int) -> None:
    """Against every division of the heads, in the order of their ranks, into so many parts."""
    rng = np.random.default_rng(2)
    for _ in range(6):
        ranks_N = rng.integers(1, 20, 8)
        for most in (1, 2, 3, 4):
            groups = group_heads(ranks_N, most, shards)
            assert sorted(head for heads, _ in groups for head in heads) == list(range(8))
            assert len(groups) <= most
            for heads, rank in groups:
                assert rank == max(ranks_N[list(heads)]) and len(heads) % shards == 0
            falling = np.sort(ranks_N)[::-1]
            ends = range(shards, 8, shards)
            costs = [
                sum((b - a) * falling[a] for a, b in itertools.pairwise((0, *cuts, 8)))
                for n in range(most)
                for cuts in itertools.combinations(ends, n)
            ]
            assert sum(len(heads) * rank for heads, rank in groups) == min(costs)


def test_heads_that_do_not_divide_are_grouped_as_on_one_device() -> None:
    ranks_N = np.array([8, 1, 1])
    assert group_heads(ranks_N, 4, 2) == group_heads(ranks_N, 4, 1) == [((0,), 8), ((1, 2), 1)]


def test_factors_make_the_g_lm_that_they_stand_for() -> None:
    g_lm = g_lm_of()
    for budget in BUDGETS:
        low_rank = factorize(g_lm, budget, max_groups=2)
        made = np.zeros(g_lm.shape)
        for layer, groups in enumerate(low_rank.layers):
            assert len(groups) <= 2
            for group in groups:
                query, key = (np.asarray(x, np.float64) for x in (group.query_NHE, group.key_NHE))
                made[layer, 0, list(group.heads)] = query @ key.swapaxes(1, 2)
                eye = np.broadcast_to(np.eye(key.shape[-1]), (len(key), *2 * key.shape[-1:]))
                np.testing.assert_allclose(key.swapaxes(1, 2) @ key, eye, atol=1e-6)
                assert (low_rank.ranks[layer, list(group.heads)] == key.shape[-1]).all()
        np.testing.assert_allclose(low_rank.G_LM, made, atol=1e-6)
        assert relative_error(g_lm, low_rank.G_LM).max() <= budget + 1e-6
    assert low_rank.ranks.min() < low_rank.ranks.max() < 8


# Decoding


def logits_of_steps(g_lm: Any, dtype: str = "float32") -> tuple[np.ndarray, Any]:
    """Logits after the prompt and after each of 12 forced tokens [12+1,B,V], and the cache."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    rows = np.random.default_rng(3).integers(1, CONFIG.vocab_size, (3, 20))
    length_B = jnp.array([8, 3, 5])
    unstacked = unstack_layers(config, params_of())
    first = jax.jit(functools.partial(prefill, config, capacity=24))
    step = jax.jit(functools.partial(decode_step, config), donate_argnums=2)
    padded = jnp.where(jnp.arange(8) < length_B[:, None], rows[:, :8], 0)
    logits, cache = first(params_of(), padded, length_B, g_lm)
    made = [logits]
    for i in range(12):
        token_B = np.take_along_axis(rows, (np.asarray(length_B) + i)[:, None], axis=1)[:, 0]
        logits, cache = step(unstacked, token_B, cache)
        made.append(logits)
    return np.asarray(jnp.stack(made), np.float64), cache


@functools.cache
def steps_at(budget: float | None) -> tuple[np.ndarray, Any]:
    g_lm = g_lm_of()
    return logits_of_steps(g_lm if budget is None else factorize(g_lm, budget))


def ordinary_logits() -> np.ndarray:
    return steps_at(None)[0]


def test_full_rank_is_the_ordinary_path() -> None:
    assert (factorize(g_lm_of(), 0.0).ranks == CONFIG.head_dim).all()
    np.testing.assert_allclose(steps_at(0.0)[0], ordinary_logits(), atol=1e-5)
    assert np.ptp(ordinary_logits(), axis=-1).min() > 1
    greedy = [logits.argmax(-1) for logits in (steps_at(0.0)[0], ordinary_logits())]
    np.testing.assert_array_equal(*greedy)


def test_logit_error_shrinks_with_the_budget() -> None:
    errors = [np.abs(steps_at(budget)[0] - ordinary_logits()).max() for budget in BUDGETS]
    assert errors[0] < 1e-5 and errors[-1] > 1e-3
    assert all(5 * small < large for small, large in itertools.pairwise(errors)), errors


def test_decoding_is_the_forward_pass_with_the_truncated_g_lm() -> None:
    """Rows of any length in two slots, each against the whole model on its own tokens."""
    lm = model_of(1e-2)
    assert lm.low_rank is not None and lm.low_rank.ranks.max() < CONFIG.head_dim
    made = continued(lm)
    assert_greedy(made, lm.params, lm.low_rank.G_LM)
    with pytest.raises(AssertionError):
        assert_greedy(made, lm.params, g_lm_of())
    np.testing.assert_array_equal(lm.g_lm, lm.low_rank.G_LM)
    uncached = lm.generate(PROMPTS[:1], 12, stop_ids=[], kv_cache=False)
    assert tokens_of(uncached) == tokens_of(made[:1])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_with_weights_in_fewer_bytes(weights: WeightsDtype) -> None:
    """Both at once: the model of these weights, with the G_LM that the budget leaves."""
    small = rounded(params_of(CONFIG), weights)
    lm = LanguageModel(CONFIG, small, g_lm_of(), rank_budget=1e-2)
    assert lm.low_rank is not None and lm.low_rank.ranks.max() < CONFIG.head_dim
    made = continued(lm)
    assert_greedy(made, small, lm.low_rank.G_LM)
    assert lm.params["head"]["kernel"].dtype == weights


def test_a_row_is_what_it_is_alone() -> None:
    lm = model_of(1e-2)
    together = continued(lm, temperature=1.0)
    for i in (0, 1, 4):
        request = Request(PROMPTS[i], SamplingConfig(12, 1.0, seed=i))
        *_, (_, alone) = lm.run([request] * 2, batch_size=2, capacity=32)
        assert alone.tokens == together[i].tokens
        np.testing.assert_allclose(alone.logprobs, together[i].logprobs, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keys_take_as_many_numbers_as_the_ranks(dtype: str) -> None:
    low_rank = factorize(g_lm_of(), 1e-2)
    layers = empty_cache(CONFIG, 3, 24, low_rank, "G_LM", jnp.dtype(dtype)).layers
    keys = values = 0
    for layer in layers:
        assert isinstance(layer, LowRankLayerCache)
        for group in layer.groups:
            assert group.k_BNES.dtype == group.v_BNSH.dtype == dtype
            keys, values = keys + group.k_BNES.size, values + group.v_BNSH.size
    assert keys == 3 * 24 * low_rank.ranks.sum() < 0.6 * values
    f32 = dtype == "float32"
    logits, cache = steps_at(1e-2) if f32 else logits_of_steps(low_rank, dtype)
    assert [jax.tree.map(jnp.shape, x) for x in cache.layers] == [
        jax.tree.map(jnp.shape, x) for x in layers
    ]
    assert isinstance(cache.layers[0], LowRankLayerCache)
    assert cache.layers[0].groups[0].k_BNES.dtype == dtype and cache.capacity == 24
    # A cache that is donated takes the factors of nobody with it.
    for leaf in jax.tree.leaves(layers):
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(low_rank))
    # In bfloat16 as far from float32 as the ordinary path is.
    exact, ordinary = steps_at(1e-2)[0], ordinary_logits()
    if not f32:
        rounding = np.abs(logits_of_steps(g_lm_of(), dtype)[0] - ordinary)
        assert np.abs(logits - exact).mean() < 1.5 * rounding.mean()


def test_on_a_mesh() -> None:
    mesh = build_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    lm = model_of(1e-2, mesh=mesh)
    assert lm.low_rank is not None
    for group in itertools.chain(*lm.low_rank.layers):
        assert len(group.heads) % 2 == 0
    assert_greedy(continued(lm), params_of(), lm.low_rank.G_LM)
    slots = lm.engine._slots.empty(
        batch=4, capacity=16, g_lm_LBNHJ=lm.low_rank, keep="G_LM", dtype="bfloat16"
    )
    for layer in slots.cache.layers:
        for group in layer.groups:  # type: ignore[union-attr]
            for leaf in (group.k_BNES, group.v_BNSH):
                shard = leaf.sharding.shard_shape(leaf.shape)
                assert shard[:2] == (2, leaf.shape[1] // 2)
                assert leaf.dtype == jnp.bfloat16


# What can be asked


def test_one_g_lm_for_all_is_needed() -> None:
    learned = dataclasses.replace(CONFIG, **LEARNED)
    lm = LanguageModel(learned, params_of(learned), rank_budget=1e-2)
    with pytest.raises(ConfigError, match=r"rank_budget: .*pldr-freeze") as caught:
        lm.generate([PROMPTS[0]], 4)
    assert "\n" not in str(caught.value)
    # Of the first prompt, or given with the call.
    shared = continued(lm, share_first_g=True)
    whole = lm.engine._g_lm_of(Request(PROMPTS[0]))
    assert tokens_of(continued(lm, g_lm=whole)) == tokens_of(shared)
    assert_greedy(shared, without_plga(lm.params), factorize(whole, 1e-2).G_LM)
    with pytest.raises(ConfigError, match=r"one .* for all prompts"):
        lm.generate([PROMPTS[0]], g_lm=np.zeros((2, 3, 4, 8, 8)))


def test_what_cannot_be_is_one_line() -> None:
    identity = dataclasses.replace(CONFIG, g_source="identity")
    lm = LanguageModel(identity, params_of(), rank_budget=0.0)
    with pytest.raises(ConfigError, match="identity") as caught:
        lm.generate([PROMPTS[0]], 4)
    assert "\n" not in str(caught.value)
    for budget in (-1e-3, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"^rank_budget = "):
            model_of(budget)
    with pytest.raises(ConfigError, match=r"Generation\.rank_budget"):
        GenerationConfig(rank_budget=2.0)
    with pytest.raises(ConfigError, match="not finite"):
        factorize(g_lm_of().at[0].set(jnp.nan), 1e-2)
