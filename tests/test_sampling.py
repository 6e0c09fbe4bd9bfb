"""Drawing the next token: what is kept, in which order, and what a draw depends on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pldr_jax.config import ConfigError, GenerationConfig, SamplingConfig
from pldr_jax.inference.sampling import (
    History,
    SlotSampling,
    adjust,
    draw,
    filter_logits,
    penalize,
    slot_sampling,
)
from pldr_jax.model.reductions import most_probable

keep_logits = jax.jit(filter_logits)
draw_tokens = jax.jit(draw)


def sampling(slots: int, **settings: float) -> SlotSampling:
    """The same settings for every slot; slot b has seed `seed + b`."""
    shared = SamplingConfig(**settings)  # type: ignore[arg-type]
    return slot_sampling([shared.of_prompt(i) for i in range(slots)])


def kept(probabilities: list[float], **settings: float) -> list[int]:
    logits = jnp.log(jnp.array([probabilities], jnp.float32))
    out = np.asarray(keep_logits(logits, sampling(1, **{"temperature": 1.0, **settings})))
    return np.flatnonzero(np.isfinite(out[0])).tolist()


def changed(settings: SlotSampling, **arrays: list[float]) -> SlotSampling:
    return {**settings, **{n: np.asarray(x, settings[n].dtype) for n, x in arrays.items()}}


@pytest.mark.parametrize(
    "top_p,expected",
    [(0.4, [0]), (0.6, [0, 1]), (0.75, [0, 1]), (0.9, [0, 1, 2]), (1.0, [0, 1, 2])],
)
def test_nucleus_is_the_smallest_set_that_reaches_p(top_p: float, expected: list[int]) -> None:
    assert kept([0.5, 0.3, 0.2], top_p=top_p) == expected


def test_nucleus_goes_by_probability_not_by_id() -> None:
    assert kept([0.2, 0.5, 0.3], top_p=0.6) == [1, 2]
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]


def test_top_k() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=1) == [1]
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=0) == [0, 1, 2, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=99) == [0, 1, 2, 3]


def test_order_is_temperature_top_k_nucleus_min_p() -> None:
    # Temperature first: at 0.5 the probabilities are (.658, .237, .105), and one reaches 0.6.
    assert kept([0.5, 0.3, 0.2], temperature=0.5, top_p=0.6) == [0]
    assert kept([0.5, 0.3, 0.2], temperature=2.0, top_p=0.7) == [0, 1]
    # Top k before the nucleus: of (.42, .28), which are (.6, .4) then, one reaches 0.55.
    assert kept([0.42, 0.28, 0.2, 0.1], top_p=0.55, top_k=2) == [0]
    assert kept([0.42, 0.28, 0.2, 0.1], top_p=0.65, top_k=2) == [0, 1]
    # Min-p after both: 0.05 is a tenth of the best whatever the others left out.
    assert kept([0.5, 0.3, 0.15, 0.05], top_k=3, top_p=0.99, min_p=0.5) == [0, 1]
    assert kept([0.5, 0.3, 0.15, 0.05], top_k=3, top_p=0.8, min_p=0.1) == [0, 1]


def test_kept_logits_are_divided_by_the_temperature() -> None:
    logits = jnp.array([[1.0, -2.0, 3.0]])
    out = keep_logits(logits, sampling(1, temperature=0.5, top_k=2))
    assert np.asarray(out)[0].tolist() == [-4.0, -np.inf, 0.0]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert draw_tokens(logits, sampling(2), jnp.array([4, 5])).tolist() == [1, 0]
    top_1 = sampling(2, temperature=1.0, top_k=1)
    assert draw_tokens(logits, top_1, jnp.array([4, 5])).tolist() == [1, 0]


def test_greedy_and_drawn_rows_in_one_batch() -> None:
    logits = jnp.tile(jnp.array([[0.0, 0.1, 0.0]]), (400, 1))
    settings = changed(sampling(400), temperature=[0.0, 1.0] * 200)
    tokens = np.asarray(draw_tokens(logits, settings, jnp.arange(400)))
    assert set(tokens[::2]) == {1}
    assert set(tokens[1::2]) == {0, 1, 2}


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = jnp.tile(
        jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32), (64, 1)
    )
    settings = sampling(64, temperature=1.0, seed=7)
    assert settings["seed"].tolist() == list(range(7, 71))
    positions = jnp.arange(64) % 5
    tokens = np.asarray(draw_tokens(logits, settings, positions))
    order = np.random.default_rng(1).permutation(64)
    shuffled = {**settings, "seed": settings["seed"][order]}
    assert np.array_equal(draw_tokens(logits, shuffled, positions[order]), tokens[order])
    alone = sampling(1, temperature=1.0, seed=7 + 9)
    assert draw(logits[:1], alone, positions[9:10]).tolist() == [tokens[9]]
    same_seed = changed(settings, seed=[7] * 64)
    assert len(set(draw_tokens(logits, same_seed, jnp.zeros(64, int)).tolist())) == 1
    assert len(set(draw_tokens(logits, same_seed, jnp.arange(64)).tolist())) > 5
    assert len(set(draw_tokens(logits, settings, jnp.zeros(64, int)).tolist())) > 5


def test_min_p_is_relative_to_the_best_token() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for min_p, kept in ((0.0, 4), (0.09, 4), (0.11, 3), (0.31, 2), (0.61, 1), (1.0, 1)):
        settings = sampling(1, temperature=1.0, min_p=min_p)
        assert np.isfinite(filter_logits(logits, settings)).sum() == kept, min_p


def test_penalties_of_the_new_text_and_a_bias_are_added() -> None:
    logits = jnp.array([[2.0, 1.0, -1.0, 0.0]])
    seen = jnp.array([[True, True, False, False]])
    count, bias = jnp.array([[0, 1, 3, 0]]), jnp.array([[0.0, 0.0, 0.0, -100.0]])
    history = History(seen, count, bias)
    made = adjust(logits, history, sampling(1, presence_penalty=0.5, frequency_penalty=0.25))
    assert np.allclose(made, [[2.0, 1.0 - 0.75, -1.0 - 1.25, -100.0]])
    made = adjust(logits, history, sampling(1, repetition_penalty=2.0, presence_penalty=-1.0))
    assert np.allclose(made, [[1.0, 0.5 + 1.0, 0.0, -100.0]])
    grown = history.with_token(jnp.array([3]), jnp.array([True]))
    assert grown.count_BV.tolist() == [[0, 1, 3, 1]] and bool(grown.seen_BV[0, 3])
    same = history.with_token(jnp.array([3]), jnp.array([False]))
    assert same.count_BV.tolist() == count.tolist()


def test_repetition_penalty_makes_seen_tokens_less_probable() -> None:
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    made = penalize(logits, seen, sampling(1, repetition_penalty=1.25))
    np.testing.assert_allclose(made, [[1.6, -2.5, 2.0, -2.0]], rtol=1e-6)
    assert np.array_equal(penalize(logits, seen, sampling(1)), logits)


def test_the_first_of_equal_tokens_is_the_greedy_one() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -3.0, -1.0], [1.0, 1.0, 1.0, 1.5]])
    assert most_probable(logits).tolist() == [1, 0, 3] == jnp.argmax(logits, -1).tolist()


@pytest.mark.parametrize(
    "temperature,top_p,top_k", [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 1.0, 3), (1.0, 0.7, 3)]
)
def test_frequencies_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    probabilities = np.array([0.35, 0.05, 0.3, 0.1, 0.2])
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    expected[order[top_k or 5 :]] = 0
    expected /= expected.sum()
    mass_before = np.cumsum(expected[order]) - expected[order]
    expected[order[mass_before >= top_p]] = 0
    expected /= expected.sum()
    draws = 4000
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (draws, 1))
    settings = sampling(draws, temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    counts = np.bincount(draw_tokens(logits, settings, jnp.full(draws, 11)), minlength=5)
    assert not counts[expected == 0].any()
    possible = expected > 0
    expected_counts = draws * expected[possible]
    chi_square = (np.square(counts[possible] - expected_counts) / expected_counts).sum()
    assert chi_square < 20  # at most 4 degrees of freedom: 1 in 2000 is beyond


def test_a_temperature_near_nothing_is_greedy() -> None:
    """Logits over it overflow, and are all the same infinity."""
    logits = jnp.array([[1.0, 3.0, -2.0, 2.9], [100.0, -1e4, 99.999, 3.0]])
    for temperature in (1e-3, 1e-20, 1e-38, 1e-40, 1e-300):
        settings = sampling(2, temperature=temperature)
        assert draw_tokens(logits, settings, jnp.array([4, 5])).tolist() == [1, 0], temperature
    hot = sampling(2, temperature=1e6)
    assert (
        len(
            set(
                draw_tokens(
                    jnp.tile(logits, (200, 1)), sampling(400, temperature=1e6), jnp.arange(400)
                ).tolist()
            )
        )
        == 4
    )
    assert np.isfinite(np.asarray(keep_logits(logits, hot))).all()


def test_a_token_that_cannot_come_is_never_drawn() -> None:
    logits = jnp.tile(jnp.array([[0.0, -jnp.inf, 0.1, -jnp.inf]]), (300, 1))
    for settings in ({}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 1e6}):
        drawn = draw_tokens(
            logits, sampling(300, **{"temperature": 1.0, **settings}), jnp.arange(300)
        )
        assert set(drawn.tolist()) == {0, 2}, settings


@pytest.mark.parametrize(
    "settings,named",
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be at least"),
        ({"temperature": float("nan")}, "temperature = nan: must be finite"),
        ({"temperature": "1"}, "temperature = '1': must be float"),
        ({"temperature": True}, "temperature = True: must be float"),
        ({"top_p": 0.0}, "top_p = 0.0: must be greater than"),
        ({"top_p": 1.1}, "top_p = 1.1: must be at most"),
        ({"top_p": None}, "top_p = None: must be float"),
        ({"top_k": -1}, "top_k = -1: must be at least"),
        ({"top_k": 2**40}, "top_k = 1099511627776: must be at most"),
        ({"top_k": 2.0}, "top_k = 2.0: must be int"),
        ({"min_p": 1.1}, "min_p = 1.1: must be at most"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: must be at least"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf: must be"),
        ({"seed": -1}, "seed = -1: must be at least"),
        ({"seed": 2**32}, "seed = 4294967296: must be at most"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least"),
        ({"max_new_tokens": 10**12}, "max_new_tokens = 1000000000000: must be at most"),
        ({"stop_ids": [1, 2**31]}, "stop_ids = "),
        ({"stop_ids": [-1]}, "stop_ids = "),
        ({"stop_ids": [True]}, "stop_ids = "),
        ({"stop_ids": 5}, "stop_ids = 5: must be"),
        ({"stop_ids": range(9)}, "has 9 ids"),
        ({"stop": [""]}, "an empty string"),
        ({"stop": ""}, "an empty string"),
        ({"stop": b"x"}, "stop = b'x': must be"),
        ({"stop": [1]}, "stop = "),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], named: str) -> None:
    for made in (SamplingConfig, GenerationConfig):
        with pytest.raises(ConfigError) as error:
            made(**settings)
        assert named in str(error.value) and "\n" not in str(error.value)


def test_settings_are_taken_as_they_are_meant() -> None:
    settings = SamplingConfig(
        np.int64(3), temperature=1, top_p=np.float32(0.5), stop="fn", stop_ids=np.array([4])
    )
    assert settings == SamplingConfig(3, 1.0, top_p=0.5, stop=("fn",), stop_ids=(4,))
    assert SamplingConfig(stop=None, stop_ids=set()).stop_ids == ()  # type: ignore[arg-type]
    assert [SamplingConfig(seed=2**32 - 1).of_prompt(i).seed for i in range(3)] == [2**32 - 1, 0, 1]


def test_every_number_is_an_array_of_the_slots() -> None:
    """A filter that is added needs nothing but its field and its function."""
    names = {f.name for f in dataclasses.fields(SamplingConfig)}
    assert set(sampling(2)) == names - {"stop", "stop_ids"}
    assert {x.dtype.name for x in sampling(2).values()} == {"int32", "uint32", "float32"}
