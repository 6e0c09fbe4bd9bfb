"""Drawing the next token: what is kept, in which order, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pldr_jax.config import ConfigError
from pldr_jax.inference.sampling import Sampling, draw, filter_logits, penalize
from pldr_jax.model.reductions import most_probable

keep_logits = jax.jit(filter_logits)
draw_tokens = jax.jit(draw)


def kept(probabilities: list[float], **settings: float) -> list[int]:
    logits = jnp.log(jnp.array([probabilities], jnp.float32))
    out = np.asarray(keep_logits(logits, Sampling.create(1, **{"temperature": 1.0, **settings})))
    return np.flatnonzero(np.isfinite(out[0])).tolist()


def rows(settings: Sampling, **arrays: list[float]) -> Sampling:
    return settings.replace(
        **{
            name: jnp.asarray(value, getattr(settings, name).dtype)
            for name, value in arrays.items()
        }
    )


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


def test_order_is_temperature_then_nucleus_then_top_k() -> None:
    # Temperature first: at 0.5 the probabilities are (.658, .237, .105), and one reaches 0.6.
    assert kept([0.5, 0.3, 0.2], temperature=0.5, top_p=0.6) == [0]
    assert kept([0.5, 0.3, 0.2], temperature=2.0, top_p=0.7) == [0, 1]
    # Top k after the nucleus: before it, (.42, .28) would be (.6, .4) and one would reach 0.55.
    assert kept([0.42, 0.28, 0.2, 0.1], top_p=0.55, top_k=2) == [0, 1]


def test_kept_logits_are_divided_by_the_temperature() -> None:
    logits = jnp.array([[1.0, -2.0, 3.0]])
    out = keep_logits(logits, Sampling.create(1, temperature=0.5, top_k=2))
    assert np.asarray(out)[0].tolist() == [2.0, -np.inf, 6.0]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert draw_tokens(logits, Sampling.create(2), jnp.array([4, 5])).tolist() == [1, 0]
    top_1 = Sampling.create(2, temperature=1.0, top_k=1)
    assert draw_tokens(logits, top_1, jnp.array([4, 5])).tolist() == [1, 0]


def test_greedy_and_drawn_rows_in_one_batch() -> None:
    logits = jnp.tile(jnp.array([[0.0, 0.1, 0.0]]), (400, 1))
    settings = rows(Sampling.create(400), temperature_B=[0.0, 1.0] * 200)
    tokens = np.asarray(draw_tokens(logits, settings, jnp.arange(400)))
    assert set(tokens[::2]) == {1}
    assert set(tokens[1::2]) == {0, 1, 2}


def test_draws_depend_on_seed_and_position_alone() -> None:
    logits = jnp.tile(
        jnp.asarray(np.random.default_rng(0).normal(size=(1, 50)), jnp.float32), (64, 1)
    )
    settings = Sampling.create(64, temperature=1.0, seed=7)
    assert settings.seed_B.tolist() == list(range(7, 71))
    positions = jnp.arange(64) % 5
    tokens = np.asarray(draw_tokens(logits, settings, positions))
    order = np.random.default_rng(1).permutation(64)
    shuffled = settings.replace(seed_B=settings.seed_B[order])
    assert np.array_equal(draw_tokens(logits, shuffled, positions[order]), tokens[order])
    alone = Sampling.create(1, temperature=1.0, seed=7 + 9)
    assert draw(logits[:1], alone, positions[9:10]).tolist() == [tokens[9]]
    same_seed = rows(settings, seed_B=[7] * 64)
    assert len(set(draw_tokens(logits, same_seed, jnp.zeros(64, int)).tolist())) == 1
    assert len(set(draw_tokens(logits, same_seed, jnp.arange(64)).tolist())) > 5
    assert len(set(draw_tokens(logits, settings, jnp.zeros(64, int)).tolist())) > 5


def test_min_p_is_relative_to_the_best_token() -> None:
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for min_p, kept in ((0.0, 4), (0.09, 4), (0.11, 3), (0.31, 2), (0.61, 1), (1.0, 1)):
        settings = Sampling.create(1, temperature=1.0, min_p=min_p)
        assert np.isfinite(filter_logits(logits, settings)).sum() == kept, min_p


def test_repetition_penalty_makes_seen_tokens_less_probable() -> None:
    logits, seen = jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]])
    made = penalize(logits, seen, jnp.array([1.25]))
    np.testing.assert_allclose(made, [[1.6, -2.5, 2.0, -2.0]], rtol=1e-6)
    assert np.array_equal(penalize(logits, seen, jnp.array([1.0])), logits)


def test_the_first_of_equal_tokens_is_the_greedy_one() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -3.0, -1.0], [1.0, 1.0, 1.0, 1.5]])
    assert most_probable(logits).tolist() == [1, 0, 3] == jnp.argmax(logits, -1).tolist()


@pytest.mark.parametrize("temperature,top_p,top_k", [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 1.0, 3)])
def test_frequencies_follow_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    probabilities = np.array([0.35, 0.05, 0.3, 0.1, 0.2])
    expected = probabilities ** (1 / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    mass_before = np.cumsum(expected[order]) - expected[order]
    expected[order[mass_before >= top_p]] = 0
    expected[order[top_k or 5 :]] = 0
    expected /= expected.sum()
    draws = 4000
    logits = jnp.tile(jnp.log(jnp.asarray(probabilities, jnp.float32)), (draws, 1))
    settings = Sampling.create(draws, temperature, top_p, top_k, seed=3)
    counts = np.bincount(draw_tokens(logits, settings, jnp.full(draws, 11)), minlength=5)
    assert not counts[expected == 0].any()
    possible = expected > 0
    expected_counts = draws * expected[possible]
    chi_square = (np.square(counts[possible] - expected_counts) / expected_counts).sum()
    assert chi_square < 20  # at most 4 degrees of freedom: 1 in 2000 is beyond


@pytest.mark.parametrize(
    "settings,name",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = .*: must be") as error:
        Sampling.create(1, **settings)
    assert "\n" not in str(error.value)
