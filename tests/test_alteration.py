"""Other G_LM at inference, against direct computations in NumPy."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from conftest import load_golden

from pldr_jax.analysis.alteration import (
    ALTERED_NAMES,
    Alteration,
    alterations,
    calibrated_g_lm,
    recomputed_g_lm,
    rotate_heads,
    rotate_layers,
)
from pldr_jax.analysis.section import Settings
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import identity_g_lm, random_g_lm
from pldr_jax.training.freeze.calibrate import without_plga

ROWS = np.random.default_rng(0).integers(1, 61, (10, 13)).astype(np.int32)
SCORED = ROWS[2:]
"""A quarter of the rows gives the mean."""
PAIRS = np.split(SCORED[:, :-1], 4)
"""All calls have two rows: fewer programs to compile."""


@pytest.fixture(scope="module")
def params() -> Params:
    """The golden's, with G_LM that differs more between rows, heads and layers."""
    params: Params = jax.tree.map(np.asarray, load_golden("tiny").params)
    attention = params["layers"]["attention"]
    plga = {**attention["plga"], "a": 8 * attention["plga"]["a"]}
    return {**params, "layers": {**params["layers"], "attention": {**attention, "plga": plga}}}


@pytest.fixture(scope="module")
def model(params: Params) -> LanguageModel:
    return LanguageModel(load_golden("tiny").config, params)


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, 2, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def section(model: LanguageModel, given: np.ndarray) -> tuple[Alteration, list[int]]:
    done: list[int] = []
    made = Alteration.measure(
        model,
        ROWS,
        Settings(2, other_g={"given": given, "itself": model}, advance=done.append),
        seed=5,
    )
    return made, done


def expected(logits: Any, own_logits: Any) -> dict[str, float]:
    """Loss, accuracy and KL in float64."""
    logs = []
    for x in (logits, own_logits):
        x = np.asarray(x, np.float64)
        logs.append(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    log_q, log_p = logs
    targets = SCORED[:, 1:, None]
    return {
        "loss": -np.take_along_axis(log_q, targets, -1).mean(),
        "accuracy": (log_q.argmax(-1) == targets[..., 0]).mean(),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
    }


def test_every_alteration_is_what_it_says(
    model: LanguageModel, params: Params, given: np.ndarray, section: tuple[Alteration, list[int]]
) -> None:
    """Heads and layers are permuted by hand, one tensor at a time."""
    own = [model(rows) for rows in PAIRS]
    own_logits = np.concatenate([pair.logits for pair in own])
    G = np.concatenate([pair.deductive.G_LM for pair in own], axis=1)
    A_LM = np.concatenate([pair.deductive.A_LM for pair in own], axis=1).astype(np.float64)
    plga = {k: np.asarray(v, np.float64) for k, v in params["layers"]["attention"]["plga"].items()
            if k in ("P", "a", "b_a")}  # fmt: skip
    heads, layers, mismatched = (np.empty_like(G) for _ in range(3))
    for layer in range(2):
        layers[layer] = G[1 - layer]
        for head in range(2):
            heads[layer, :, head] = G[layer, :, 1 - head]
            A_P = A_LM[layer, :, 1 - head] ** plga["P"][layer, head]
            curved = plga["a"][layer, head] @ A_P + plga["b_a"][layer, head]
            mismatched[layer, :, head] = curved
    mean = np.asarray(model(ROWS[:2, :-1]).deductive.G_LM, np.float64).mean(1)
    tensors = {
        "mean": mean, "given": given, "itself": mean, "G_LM_heads": heads, "G_LM_layers": layers,
        "A_LM_heads": mismatched, "own": G,
        "identity": identity_g_lm(model.config), "random": random_g_lm(model.config, 5),
    }  # fmt: skip
    values = section[0].numbers["alterations"]
    assert set(values) == set(tensors) and section[0].numbers["rows"] == 8
    for name, g_lm in tensors.items():
        given_LBNHJ = np.asarray(g_lm, np.float32)
        if given_LBNHJ.ndim == 4:
            given_LBNHJ = given_LBNHJ[:, None]
        parts = np.split(given_LBNHJ, 4, axis=1) if given_LBNHJ.shape[1] > 1 else 4 * [given_LBNHJ]
        logits = [model(rows, g).logits for rows, g in zip(PAIRS, parts, strict=True)]
        direct = expected(np.concatenate(logits), own_logits)
        assert values[name] == pytest.approx(direct, rel=2e-5, abs=1e-6), name
    losses = {round(value["loss"], 6) for value in values.values()}
    assert len(losses) == len(values) - 1  # mean and itself are the same; no two others are


def test_nothing_changes_where_nothing_is_altered(model: LanguageModel, params: Params) -> None:
    """Rotated as often as there are heads, or recomputed from its own A_LM, G_LM is what it was."""
    own = model(ROWS[:2, :-1]).deductive
    assert own.A_LM is not None and own.G_LM is not None
    np.testing.assert_array_equal(rotate_heads(rotate_heads(own.G_LM)), own.G_LM)
    np.testing.assert_array_equal(rotate_layers(rotate_layers(own.G_LM)), own.G_LM)
    again = recomputed_g_lm(params, own.A_LM)
    np.testing.assert_allclose(again, own.G_LM, rtol=1e-6, atol=1e-6)
    moved = recomputed_g_lm(params, rotate_heads(own.A_LM))
    assert np.abs(moved - own.G_LM).max() > 0.1


def test_the_identity_is_a_model_without_plga(
    model: LanguageModel, params: Params, section: tuple[Alteration, list[int]]
) -> None:
    config = dataclasses.replace(model.config, g_source="identity")
    bare = LanguageModel(config, without_plga(params))
    made = Alteration.measure(bare, ROWS, Settings(batch_size=2), seed=5)
    values = made.numbers["alterations"]
    assert list(values) == ["own"]
    assert values["own"] == pytest.approx(
        section[0].numbers["alterations"]["identity"] | {"kl": 0.0}, rel=1e-6
    )
    assert made.words()[0] == "There is no other G_LM to try." and not made.figures()


def test_a_predefined_g_lm(model: LanguageModel, params: Params, given: np.ndarray) -> None:
    """Its heads and layers can be in the wrong place; it has no A_LM, and is its own mean."""
    config = dataclasses.replace(model.config, g_source="external")
    fixed = LanguageModel(config, without_plga(params), given[:, None])
    made = Alteration.measure(fixed, ROWS, Settings(2, other_g={"mine": given}))
    values = made.numbers["alterations"]
    assert list(values) == ["own", "mine", "identity", "random", "G_LM_heads", "G_LM_layers"]
    assert values["mine"] == values["own"] and values["G_LM_heads"]["kl"] > 1e-3
    np.testing.assert_array_equal(calibrated_g_lm(fixed, ROWS)[:, 0], given)


def test_the_section(model: LanguageModel, section: tuple[Alteration, list[int]]) -> None:
    made, done = section
    assert done == [2, 2, 2, 2, 2]
    values = made.numbers["alterations"]
    worst = max((v["loss"], name) for name, v in values.items() if name != "own")[1]
    assert f"; {worst} the most, by " in made.words()[0]
    assert len(made.tables()[0].rows) == len(values) and len(made.tables()[0].columns) == 5
    changes = [row[2] for row in made.tables()[0].rows]
    assert changes[0] == 0 and changes[1] == values["mean"]["loss"] - values["own"]["loss"]
    assert made.figures()[0].png.startswith(b"\x89PNG")


def test_what_cannot_be_measured(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"^rows: 1 of held-out text; .* at least 2$"):
        Alteration.measure(model, ROWS[:1])
    wrong = np.zeros((2, 2, 4, 4), np.float32)
    with pytest.raises(ConfigError, match=r"^mine: G_LM has shape .*this model needs \(2, 2, 8, 8"):
        Alteration.measure(model, ROWS, Settings(other_g={"mine": wrong}))
    with pytest.raises(ConfigError, match=r"^others: 'mean' is one of own, mean, .*; rename it$"):
        Alteration.measure(model, ROWS, Settings(other_g={"mean": wrong}))


def test_a_g_lm_that_breaks_the_model_is_felt(model: LanguageModel) -> None:
    """The logits with another G_LM may be broken, those of the model itself may not."""
    broken = np.full((2, 2, 8, 8), np.nan, np.float32)
    section = Alteration.measure(model, ROWS, Settings(2, other_g={"broken": broken}))
    assert np.isnan(section.numbers["alterations"]["broken"]["loss"])
    assert section.numbers["alterations"]["broken"]["accuracy"] == 0
    assert "; broken the most, by +nan" in section.words()[0]
    assert section.rendered().figures
    fixed = LanguageModel(
        dataclasses.replace(model.config, g_source="external"),
        without_plga(model.params),
        broken[:, None],
    )
    with pytest.raises(ConfigError, match="^the logits of held-out rows are not finite: "):
        Alteration.measure(fixed, ROWS, Settings(2))


def test_names_are_keys(model: LanguageModel) -> None:
    names = [one.name for one in alterations(model, ROWS[:2], 0, {})]
    assert len(set(names)) == len(names) and {"own", *names} == set(ALTERED_NAMES)
