"""Interventions at inference, against the NumPy model and the model itself."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from conftest import load_golden

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.inference.intervention import Intervention, parse_intervention
from pldr_jax.interop import reference
from pldr_jax.interop.names import to_tensors
from pldr_jax.training.freeze.calibrate import without_plga

TOKENS = np.random.default_rng(0).integers(1, 61, (2, 12)).astype(np.int32)
ETA = ((1.0, 0.5), (-2.0, 1.5))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tiny = load_golden("tiny")
    return LanguageModel(tiny.config, tiny.params)


def numpy_logits(model: LanguageModel, change: Any, tokens_BT: np.ndarray = TOKENS) -> np.ndarray:
    """Logits [B,T,V] in float64; `change(A, finish, layer)` makes G_LM of a layer, and `finish` is
    the last three steps.
    """
    deductive, tensors = reference._Layers.deductive, to_tensors(model.config, model.params)
    layer = 0

    def changed(self: Any, name: str, q_NTH: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal layer
        A = deductive(self, name, q_NTH)["A"]

        def finish(A: np.ndarray) -> np.ndarray:
            x = self.get(f"{name}.plgatt_layer.Wlst") @ A + self.get(f"{name}.plgatt_layer.blst")
            A_P = (x * x / (1 + np.exp(-x)) + 1e-9) ** self.get(f"{name}.plgatt_layer.pwlst")
            a, b_a = (self.get(f"{name}.plgatt_layer.{key}") for key in ("alst", "balst"))
            return a @ A_P + b_a

        G_LM = change(A, finish, layer % model.config.num_layers)
        layer += 1
        return {"G_LM": G_LM}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference._Layers, "deductive", changed)
        rows = [reference.reference_logits(model.config, tensors, t, None) for t in tokens_BT]
    return np.stack(rows)


def centroid(A: np.ndarray) -> np.ndarray:
    return np.broadcast_to(A.mean(-2, keepdims=True), A.shape)


@pytest.mark.parametrize(
    "intervention,change",
    [
        (Intervention(centroid=True), lambda A, finish, layer: finish(centroid(A))),
        (
            Intervention(gain=ETA),
            lambda A, finish, layer: np.array(ETA[layer])[:, None, None] * finish(A),
        ),
        (Intervention(centroid=True, gain=0.5), lambda A, finish, layer: 0.5 * finish(centroid(A))),
    ],
)
def test_logits_are_those_of_the_changed_equations(
    model: LanguageModel, intervention: Intervention, change: Any
) -> None:
    expected = numpy_logits(model, change)
    logits = np.asarray(model(TOKENS, intervention=intervention).logits)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(logits - np.asarray(model(TOKENS).logits)).max() > 1e-3


def test_nothing_changed_is_exact(model: LanguageModel) -> None:
    for nothing in (Intervention(), Intervention(gain=1), Intervention(gain=np.ones((2, 2)))):
        changed = model(TOKENS, intervention=nothing)
        np.testing.assert_array_equal(changed.logits, model(TOKENS).logits)
        np.testing.assert_array_equal(changed.deductive.G_LM, model(TOKENS).deductive.G_LM)
    own = Intervention(text=tuple(TOKENS[0].tolist()))
    np.testing.assert_allclose(
        model(TOKENS[:1], intervention=own).logits, model(TOKENS[:1]).logits, atol=1e-5
    )
    # A with one row, repeated: W acts on the centroid already.
    plga = model.params["layers"]["attention"]["plga"]
    norm = plga["residual"]["norm"]
    flat = {**plga, "residual": {**plga["residual"], "norm": {**norm, "scale": 0 * norm["scale"]}}}
    attention = {**model.params["layers"]["attention"], "plga": flat}
    params = {**model.params, "layers": {**model.params["layers"], "attention": attention}}
    one_row = LanguageModel(model.config, params)
    np.testing.assert_allclose(
        one_row(TOKENS, intervention=Intervention(centroid=True)).logits,
        one_row(TOKENS).logits,
        atol=1e-5,
    )


def test_another_text(model: LanguageModel) -> None:
    """Its G_LM serves every text: also for scores and generated text."""
    text = Intervention(text=tuple(TOKENS[1].tolist()))
    G_LM = np.asarray(model(TOKENS[1:]).deductive.G_LM)[:, 0]
    expected = model(TOKENS[:1], g_lm=G_LM)
    np.testing.assert_allclose(
        model(TOKENS[:1], intervention=text).logits, expected.logits, atol=1e-5
    )
    prompt = TOKENS[0, :6].tolist()
    settings = {"max_new_tokens": 4, "temperature": 0.0, "stop_ids": []}
    (with_text,) = model.generate(prompt, intervention=text, **settings)
    (with_g,) = model.generate(prompt, g_lm=G_LM, **settings)
    assert with_text.tokens == with_g.tokens
    np.testing.assert_allclose(with_text.logprobs, with_g.logprobs, atol=1e-5)
    arguments = (prompt, TOKENS[0, 6:].tolist())
    (scored,) = model.score(*arguments, mode="frozen", intervention=text)
    (expected_score,) = model.score(*arguments, mode="frozen", g_lm=G_LM)
    assert scored.logprob == pytest.approx(expected_score.logprob, abs=1e-4)


def test_generation_under_a_gain_is_the_forward_pass_under_it(model: LanguageModel) -> None:
    """Without caches; and with them, G_LM of the prompt has the gain."""
    gain = Intervention(gain=ETA)
    prompt = TOKENS[0, :6].tolist()
    settings = {"max_new_tokens": 1, "temperature": 0.0, "stop_ids": []}
    logits = np.asarray(model(np.array([prompt]), intervention=gain).logits)[0, -1]
    for caches in ({}, {"kv_cache": False, "g_cache": "none"}):
        (made,) = model.generate(prompt, intervention=gain, **settings, **caches)
        assert made.tokens == [int(logits.argmax())]
    (scored,) = model.score(prompt, made.tokens, mode="causal", intervention=gain)
    log_p = logits[made.tokens[0]] - np.log(np.exp(logits.astype(float)).sum())
    assert scored.logprob == pytest.approx(log_p, abs=1e-4)


def test_a_predefined_g_lm_has_a_gain_alone(model: LanguageModel) -> None:
    config = dataclasses.replace(model.config, g_source="identity")
    bare = LanguageModel(config, without_plga(model.params))
    same = bare(TOKENS, intervention=Intervention())
    np.testing.assert_array_equal(same.logits, bare(TOKENS).logits)
    G_LM = np.asarray(ETA, np.float32)[..., None, None] * np.eye(8, dtype=np.float32)
    fixed = dataclasses.replace(config, g_source="external")
    expected = LanguageModel(fixed, bare.params, G_LM[:, None])(TOKENS).logits
    np.testing.assert_allclose(
        bare(TOKENS, intervention=Intervention(gain=ETA)).logits, expected, atol=1e-6
    )
    with pytest.raises(ConfigError, match="'identity' has no A"):
        bare(TOKENS, intervention=Intervention(centroid=True))


def test_what_cannot_be_is_one_line(model: LanguageModel, tmp_path) -> None:
    for values, named in (
        ({"gain": np.nan}, "gain: must be finite"),
        ({"gain": [1.0, 2.0]}, "gain: must be finite"),
        ({"text": ()}, "text: holds no token"),
    ):
        with pytest.raises(ConfigError, match=named):
            Intervention(**values)
    for intervention, named in (
        (Intervention(gain=np.ones((3, 2))), r"gain: has shape \(3, 2\)"),
        (Intervention(text=(99,)), "outside the vocabulary"),
    ):
        with pytest.raises(ConfigError, match=named):
            model(TOKENS, intervention=intervention)
    with pytest.raises(ConfigError, match="together with intervention"):
        model(TOKENS, g_lm=np.zeros((2, 2, 8, 8)), intervention=Intervention())
    np.save(tmp_path / "eta.npy", np.array(ETA))
    (tmp_path / "t.txt").write_text("ab")
    parsed = parse_intervention(
        f"centroid, gain={tmp_path / 'eta.npy'},text={tmp_path / 't.txt'}", lambda text: [1, 2]
    )
    assert parsed == Intervention(True, ETA, (1, 2))
    assert parse_intervention("gain=0.5", list) == Intervention(gain=0.5)
    for text in ("gain=no.npy", "nope", "text=no.txt", "gain=nan"):
        with pytest.raises(ConfigError, match=f"^--intervention={text}: "):
            parse_intervention(text, list)
