"""The loss with four G_LMs against a loop over rows, prefixes and positions in NumPy."""

import dataclasses

import numpy as np
import pytest
from conftest import load_golden

from pldr_jax.analysis.causality.measure import Causality
from pldr_jax.analysis.causality.position_loss import RowMeans, prefix_positions
from pldr_jax.analysis.causality.view import causality_verdict
from pldr_jax.analysis.section import Settings
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.model.decoder import Params
from pldr_jax.training.freeze.calibrate import without_plga

LENGTH = 11
ROWS = np.random.default_rng(0).integers(1, 61, (7, LENGTH + 1)).astype(np.int32)
CALIBRATION = np.random.default_rng(1).integers(1, 61, (3, LENGTH + 1)).astype(np.int32)
POSITIONS = prefix_positions(LENGTH, 4)
FOUR = Settings(batch_size=4)
SETTINGS = {"prefix_rows": 3, "prefix_stride": 4}


def leaking_params() -> Params:
    """The golden's, with a G_LM that depends on its input."""
    params = load_golden("tiny").params
    attention = dict(params["layers"]["attention"])
    plga = attention["plga"]
    attention["plga"] = {**plga, "a": 5 * plga["a"]}
    return {**params, "layers": {**params["layers"], "attention": attention}}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(load_golden("tiny").config, leaking_params())


@pytest.fixture(scope="module")
def section(model: LanguageModel) -> Causality:
    return Causality.measure(model, ROWS, FOUR, CALIBRATION, **SETTINGS)


@pytest.fixture(scope="module")
def direct(model: LanguageModel) -> dict[str, np.ndarray]:
    """Nats [R,T] of each G_LM in float64; of the prefixes from rows that are really cut."""
    every = np.concatenate([CALIBRATION, ROWS])
    g_lms = np.asarray(model(every[:, :-1]).deductive.G_LM, np.float64)
    own, calibrated = g_lms[:, 3:], g_lms[:, :3].mean(1, keepdims=True)
    other = np.concatenate([g_lms[:, :1], own[:, :-1]], axis=1)
    prefixes = [nats(model, ROWS[:3, : t + 2])[:, -1] for t in POSITIONS]
    return {
        "full": nats(model, every)[3:],
        "other": nats(model, ROWS, other),
        "calibrated": nats(model, ROWS, np.repeat(calibrated, len(ROWS), axis=1)),
        "prefix": np.stack(prefixes, axis=1),
    }


def nats(model: LanguageModel, rows: np.ndarray, g_lm: np.ndarray | None = None) -> np.ndarray:
    logits = np.asarray(model(rows[:, :-1], g_lm).logits, np.float64)
    chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def test_losses_are_those_of_a_loop(section: Causality, direct: dict[str, np.ndarray]) -> None:
    for name, expected_RT in direct.items():
        by_position = section.tensors[f"loss_{name}"]
        np.testing.assert_allclose(by_position, expected_RT.mean(0), atol=1e-5, err_msg=name)
        assert section.numbers["loss"][name] == pytest.approx(expected_RT.mean(), abs=1e-5)
    for name in ("prefix", "other", "calibrated"):  # the four are not the same numbers
        assert np.abs(section.tensors[f"gap_{name}"]).max() > 1e-2


def test_gaps_are_of_the_same_tokens(section: Causality, direct: dict[str, np.ndarray]) -> None:
    full = direct["full"]
    gaps = {name: direct[name] - full for name in ("other", "calibrated")}
    gaps["prefix"] = direct["prefix"] - full[:3, POSITIONS]
    for name, gap in gaps.items():
        at = POSITIONS if name == "prefix" else np.arange(LENGTH)
        numbers = section.numbers["gap"][name]
        assert numbers["mean"] == pytest.approx(gap.mean(), abs=1e-5)
        error = gap.mean(1).std(ddof=1) / np.sqrt(len(gap))
        assert numbers["standard_error"] == pytest.approx(error, abs=1e-5)
        share = gap[:, at < LENGTH / 2].sum() / gap.sum()
        assert numbers["first_half_share"] == pytest.approx(share, rel=1e-2)
    differences = np.abs(gaps["prefix"])
    numbers = section.numbers["logprob_difference"]
    assert numbers["tokens"] == differences.size
    assert numbers["mean"] == pytest.approx(differences.mean(), abs=1e-5)
    assert numbers["max"] == pytest.approx(differences.max(), abs=1e-5)
    assert numbers["quantiles"]["0.9"] == pytest.approx(np.quantile(differences, 0.9), abs=1e-5)
    np.testing.assert_allclose(section.tensors["logprob_difference"], gaps["prefix"], atol=1e-5)


def test_the_last_position_has_no_future(model: LanguageModel) -> None:
    last = Causality.measure(model, ROWS, FOUR, CALIBRATION, prefix_rows=1, prefix_stride=1).tensors
    assert last["prefix_positions"][-1] == LENGTH - 1
    assert abs(last["logprob_difference"][0, -1]) < 1e-5 < abs(last["logprob_difference"]).max()


@pytest.mark.parametrize("batch_size", [3])
def test_batches_change_nothing(model: LanguageModel, section: Causality, batch_size: int) -> None:
    other = Causality.measure(model, ROWS, Settings(batch_size), CALIBRATION, **SETTINGS)
    assert other.tensors.keys() == section.tensors.keys()
    for name, expected in section.tensors.items():
        np.testing.assert_allclose(other.tensors[name], expected, atol=2e-5, err_msg=name)


def test_rows_set_aside_are_not_scored(model: LanguageModel) -> None:
    done: list[int] = []
    rows = np.concatenate([CALIBRATION[:1], ROWS[:4]])
    section = Causality.measure(model, rows, Settings(4, advance=done.append), **SETTINGS)
    given = Causality.measure(model, ROWS[:4], FOUR, CALIBRATION[:1], **SETTINGS)
    assert section.numbers == given.numbers
    assert section.numbers["rows"] == 4 and sum(done) == 5


def test_no_gap_where_g_lm_does_not_depend_on_the_input(model: LanguageModel) -> None:
    """W = 0: G_LM is of the biases alone, though the model computes it."""
    params = leaking_params()
    plga = params["layers"]["attention"]["plga"]
    plga["W"], plga["b_W"] = np.zeros_like(plga["W"]), np.ones_like(plga["W"])
    lm = LanguageModel(model.config, params)
    numbers = Causality.measure(lm, ROWS, FOUR, **SETTINGS).numbers
    assert numbers["verdict"] == "causal"
    assert all(abs(gap["mean"]) < 1e-5 for gap in numbers["gap"].values())
    assert numbers["logprob_difference"]["max"] < 1e-5


@pytest.mark.parametrize("g_source", ["identity", "external"])
def test_predefined_g_lm_has_no_gap_by_construction(model: LanguageModel, g_source: str) -> None:
    config = dataclasses.replace(model.config, g_source=g_source)
    g_lm = None
    if g_source == "external":
        g_lm = np.random.default_rng(2).normal(size=(2, 1, 2, 8, 8)).astype(np.float32)
    predefined = LanguageModel(config, without_plga(leaking_params()), g_lm)
    done: list[int] = []
    section = Causality.measure(predefined, ROWS, Settings(4, advance=done.append))
    assert section.numbers["verdict"] == "causal by construction"
    assert {gap["mean"] for gap in section.numbers["gap"].values()} == {0.0}
    expected = nats(predefined, ROWS).mean()
    assert section.numbers["loss"]["full"] == pytest.approx(expected, abs=1e-5)
    assert sum(done) == len(ROWS)


def test_the_verdict_goes_by_the_size_of_the_gap(section: Causality) -> None:
    given = [1e-6, -1e-3, 5e-3, -5e-3, 0.5, -0.5, np.nan]
    said = ["causal"] * 2 + ["nearly causal"] * 2 + ["not causal"] * 2 + ["not finite"]
    assert [causality_verdict(gap) for gap in given] == said
    assert section.words()[0].lower().startswith(section.numbers["verdict"])
    assert f"{section.numbers['loss']['prefix']:.4f}" in section.words()[0]


def test_the_pictures_are_there(section: Causality) -> None:
    names = [picture.name for picture in section.figures()]
    assert names == ["causality_loss", "causality_gap", "causality_difference"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in section.figures())


def test_means_do_not_depend_on_how_rows_arrive() -> None:
    x = np.random.default_rng(3).normal(5, 2, (9, 4))
    for splits in ([], [4], [1, 2, 7]):
        means = RowMeans()
        for part in np.split(x, splits):
            means.add(part)
        np.testing.assert_allclose(means.by_position, x.mean(0), rtol=1e-12)
        assert means.mean == pytest.approx(x.mean(), rel=1e-12)
        error = x.mean(1).std(ddof=1) / 3
        assert means.standard_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(
    "rows,settings,named",
    [
        (ROWS[:1], {}, "rows: 1"),
        (ROWS[0], {}, "rows: shape"),
        (ROWS.astype(float), {}, "rows: shape"),
        (ROWS + 60, {}, "vocabulary"),
        (np.ones((3, 49), np.int32), {}, "49 tokens"),
        (ROWS, {"batch_size": 0}, "batch_size = 0"),
        (ROWS, {"prefix_rows": 0}, "prefix_rows = 0"),
        (ROWS, {"prefix_stride": 0}, "prefix_stride = 0"),
    ],
)
def test_what_cannot_be_measured_is_one_line(model, rows, settings, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        batch_size = settings.pop("batch_size", 8)
        Causality.measure(model, rows, Settings(batch_size), **settings)
    assert "\n" not in str(caught.value)
