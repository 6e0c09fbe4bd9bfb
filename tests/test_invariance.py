"""The protocol of invariance: its numbers against plain NumPy, its verdicts, its determinants."""

import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import load_golden
from helpers import WORDS, contents, run_here, untrained_run

import pldr_jax
from pldr_jax.analysis.batches import batches, mean_g_lm
from pldr_jax.analysis.emergence import Emergence
from pldr_jax.analysis.invariance.determinants import (
    DeterminantAgreement,
    Determinants,
    log10_difference,
)
from pldr_jax.analysis.invariance.measure import Invariance, relative_rmse
from pldr_jax.analysis.invariance.view import INVARIANT, NEARLY_INVARIANT, invariance_verdict
from pldr_jax.analysis.section import Settings
from pldr_jax.analysis.texts import rows_of_file
from pldr_jax.api import LanguageModel
from pldr_jax.cli.analyze import analyze_main
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.reference import reference_logits, reference_outputs
from pldr_jax.model.decoder import init_params
from pldr_jax.model.deductive import read_g_lm
from pldr_jax.training.order_parameter import DeductiveStatistics, Spread

NEW = 8
COMPARED = ("runs", "cached", "samples")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return untrained_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(run_dir) -> LanguageModel:
    return pldr_jax.load(run_dir)


@pytest.fixture(scope="module")
def rows_RC(run_dir, model) -> np.ndarray:
    path = run_dir / "prompts.txt"
    path.write_text(" ".join(WORDS * 3) + "\n")
    return rows_of_file(path, model.tokenizer, 3, 16)


@pytest.fixture(scope="module")
def section(model, rows_RC):
    """Of three rows, two at a time; and how many rows it reported."""
    done = []
    found = Invariance.measure(
        model, rows_RC, Settings(batch_size=2, float64=True, advance=done.append)
    )
    return found, done


@pytest.fixture(scope="module")
def texts(model, rows_RC) -> dict[str, np.ndarray]:
    """The rows, what two runs without caches make of their prompts, and the prompts."""
    prompts = rows_RC[:, :-NEW]
    settings = {"temperature": 1.0, "stop_ids": [], "kv_cache": False, "g_cache": "none"}
    made = {
        name: [
            g.prompt_tokens + g.tokens
            for g in model.generate(prompts.tolist(), NEW, seed=seed, rows=2, **settings)
        ]
        for name, seed in (("run_1", 0), ("run_2", 1 << 20))
    }
    return {"rows": rows_RC, "prompts": prompts} | {k: np.asarray(v) for k, v in made.items()}


def one_pass(model, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
    """Deductive outputs [R,L,N,H,J] of three rows, in calls that are compiled already."""
    parts = [model(tokens_RT[pair]).deductive for pair in ([0, 1], [2, 2])]
    found = {
        name: np.concatenate([np.asarray(getattr(part, name), np.float64) for part in parts], 1)
        for name in ("A", "A_LM", "A_P", "G_LM")
    }
    return {name: np.moveaxis(x[:, :3], 1, 0) for name, x in found.items()}


def expected(outputs: dict[str, np.ndarray], compared: str) -> dict[str, float]:
    """From G_LM [R,L,N,H,J] of all texts at once."""
    if compared == "samples":
        all_values, differences = outputs["rows"], np.diff(outputs["rows"], axis=0)
    else:
        x, y = outputs["run_1"], outputs["run_2" if compared == "runs" else "prompts"]
        all_values, differences = np.stack([x, y]), x - y
    mean, std, rmse = all_values.mean(), all_values.std(), math.sqrt(np.square(differences).mean())
    return {
        "mean": mean,
        "std": std,
        "rmse": rmse,
        "order_parameter": rmse / abs(mean),
        "rmse_over_std": rmse / std,
    }


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_numbers_are_those_of_numpy(model, texts, section, precision) -> None:
    numbers = section[0].numbers[precision]
    tensors = to_tensors(model.config, model.params)

    def outputs(tokens_BT: np.ndarray, name: str) -> np.ndarray:
        if precision == "float32":
            return one_pass(model, tokens_BT)[name]
        return np.stack(
            [reference_outputs(model.config, tensors, t, None)[1][name] for t in tokens_BT]
        )

    tolerance = 1e-4 if precision == "float32" else 1e-12
    for name in ("A_P", "G_LM"):
        found = {text: outputs(tokens, name) for text, tokens in texts.items()}
        for compared in COMPARED:
            entry = numbers[compared][name]
            whole = expected(found, compared)
            assert {k: entry[k] for k in whole} == pytest.approx(whole, rel=tolerance)
            layer = expected({text: x[:, 1] for text, x in found.items()}, compared)
            by_layer = {k: values[1] for k, values in entry["by_layer"].items()}
            assert by_layer == pytest.approx(layer, rel=tolerance)
            if name == "G_LM":
                assert entry["rmse"] > 1e-3  # this model depends on its input
    logs = np.log10(np.abs(np.linalg.det(found["rows"])))
    determinants = numbers["determinants"]
    np.testing.assert_allclose(determinants["log10_abs"], logs.mean(0), rtol=1e-3)
    np.testing.assert_allclose(determinants["log10_std"], logs.std(0), rtol=1e-2)
    difference = np.abs(np.linalg.det(found["run_1"]) - np.linalg.det(found["run_2"])).max(0)
    decimals = determinants["runs"]["decimals"]
    np.testing.assert_allclose(decimals, -np.log10(difference), atol=1e-2)


def test_the_section_says_what_it_did(section) -> None:
    found, done = section
    assert done == [2, 1]
    assert found.numbers["verdict"] == "not invariant"
    worst = max(
        entry["rmse"] / max(abs(entry["mean"]), entry["std"])
        for entry in (found.numbers["float32"][name]["G_LM"] for name in COMPARED)
    )
    assert found.numbers["relative_rmse"] == pytest.approx(worst)
    assert "not invariant" in found.words()[0]
    assert found.numbers["prompt_tokens"] == 8 and found.numbers["rows"] == 3
    assert {picture.png[:4] for picture in found.figures()} == {b"\x89PNG"}
    for table in found.tables():
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_float64_is_more_exact_than_float32(section) -> None:
    single, double = (section[0].numbers[p]["samples"]["G_LM"] for p in ("float32", "float64"))
    assert single["rmse"] == pytest.approx(double["rmse"], rel=1e-4)
    assert single["rmse"] != double["rmse"]


def test_the_program_gives_the_same_on_a_mesh_in_other_batches(
    run_dir, section, model, rows_RC, tmp_path, capsys
) -> None:
    """And the report that was there gives way to it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    (out / "old").write_text("")
    before = contents(run_dir)
    flags = [f"--prompts={run_dir / 'prompts.txt'}", "--rows=3", "--length=16", "--batch_size=3"]
    flags += [f"--out={out}", "--sections=invariance", "--over_checkpoints", "--tensors"]
    flags += ["--gin.Mesh.data=4", "--gin.Mesh.tensor=2"]
    status, printed, err = run_here(capsys, analyze_main, run_dir, *flags)
    assert status == 0, err
    assert f"report: {out / 'report.html'}" in printed
    assert "untrained, invariance: G_LM is not invariant" in printed
    assert "rows 0/3  [1/2] untrained: invariance" in err
    assert not (out / "old").exists() and not list(tmp_path.glob(".out*"))
    assert contents(run_dir) == before
    run = json.loads((out / "report.json").read_text())["runs"]["untrained"]
    assert (run["rows"], run["tokens_of_a_row"], run["step"]) == (3, 16, 7)
    found = run["sections"]["invariance"]["numbers"]
    for compared in COMPARED:
        for name in ("A", "G_LM"):
            expected = section[0].numbers["float32"][compared][name]["rmse"]
            assert found["float32"][compared][name]["rmse"] == pytest.approx(expected, rel=1e-3)
    assert found["same_tokens"] == section[0].numbers["same_tokens"]
    steps = [entry["step"] for entry in run["sections"]["emergence"]["numbers"]["checkpoints"]]
    assert steps == [3, 7]
    g_lm = read_g_lm(out / "tensors.npz", model.config)
    mean = one_pass(model, rows_RC)["G_LM"].mean(0)
    np.testing.assert_allclose(g_lm[:, 0], mean, atol=1e-3 * mean.std())


def test_verdicts() -> None:
    assert invariance_verdict(0.0) == invariance_verdict(INVARIANT) == "invariant"
    assert (
        invariance_verdict(INVARIANT * 1.01)
        == invariance_verdict(NEARLY_INVARIANT)
        == "nearly invariant"
    )
    assert (
        invariance_verdict(NEARLY_INVARIANT * 1.01)
        == invariance_verdict(math.inf)
        == invariance_verdict(math.nan)
    )
    assert invariance_verdict(math.nan) == "not invariant"
    near_zero = Spread(mean=1e-9, std=1.0, rmse=1e-6)
    assert near_zero.order_parameter > 1 and invariance_verdict(relative_rmse(near_zero)) == (
        "invariant"
    )


def test_a_given_g_lm_is_invariant_by_construction() -> None:
    config = ModelConfig(
        vocab_size=31, num_layers=2, num_heads=2, head_dim=8, num_residual_layers=1,
        context_length=16, g_source="identity", unroll=False,
    )  # fmt: skip
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), params)
    lm = LanguageModel(config, nn.unbox(zeros))
    rows = np.ones((3, 8), np.int32)
    found = Invariance.measure(lm, rows)
    assert found.numbers["verdict"] == "invariant" and found.numbers["by_construction"]
    assert np.allclose(found.numbers["determinants"]["log10_abs"], 0)
    np.testing.assert_array_equal(mean_g_lm(lm, rows, 2), np.tile(np.eye(8), (2, 2, 1, 1)))


def test_too_few_rows_and_tokens_are_refused(model, rows_RC) -> None:
    with pytest.raises(ConfigError, match="two rows"):
        Invariance.measure(model, rows_RC[:1])
    with pytest.raises(ConfigError, match="no prompt before 16"):
        Invariance.measure(model, rows_RC, new_tokens=16)


def test_determinants_that_no_float_can_hold() -> None:
    x = np.stack([np.eye(40) * 1e-10, np.eye(40) * 2e-10])[None, :, None]
    absolute, relative = log10_difference(x[:, :1], x[:, 1:])
    # det = 1e-400 and 2**40 e-400
    assert absolute[0, 0, 0] == pytest.approx(-400 + 40 * math.log10(2))
    assert relative[0, 0, 0] == pytest.approx(0, abs=1e-9)
    same = log10_difference(x, x)
    assert np.isneginf(same[0]).all() and np.isneginf(same[1]).all()
    singular = np.zeros((1, 1, 1, 4, 4))
    assert np.isneginf(log10_difference(singular, singular)[0]).all()
    assert log10_difference(singular, singular + np.eye(4))[1] == pytest.approx(0)
    assert log10_difference(np.eye(3)[None, None, None], -np.eye(3)[None, None, None])[
        0
    ] == pytest.approx(math.log10(2))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_neither_agrees_nor_is_invariant(broken: float) -> None:
    x = np.stack([np.eye(3), np.eye(3), np.full((3, 3), broken), np.eye(3)])[None, :, None]
    determinants, agreement, statistics = (
        Determinants(), DeterminantAgreement(), DeductiveStatistics()
    )  # fmt: skip
    for part in (determinants, agreement, statistics):
        part.add(x)
    found = agreement.results()
    assert math.isnan(found["decimals"][0][0]) and math.isnan(found["digits"][0][0])
    assert all(math.isnan(value[0][0]) for value in determinants.results().values())
    assert invariance_verdict(relative_rmse(statistics.spread())) == "not invariant"


def test_determinants_and_statistics_are_streamed() -> None:
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 4, 4)) + 0.5
    signs, logs = np.linalg.slogdet(x)
    whole, parts = Determinants(), Determinants()
    agreement, sums = DeterminantAgreement(), DeductiveStatistics()
    whole.add(x)
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):
        parts.add(part)
        agreement.add(part)
        sums.add(part)
    found = parts.results()
    np.testing.assert_allclose(found["log10_abs"], logs.mean(1) / math.log(10))
    np.testing.assert_allclose(found["log10_std"], logs.std(1) / math.log(10))
    np.testing.assert_allclose(found["positive"], (signs > 0).mean(1))
    np.testing.assert_allclose(whole.results()["log10_std"], found["log10_std"])
    largest = np.abs(np.diff(np.linalg.det(x), axis=1)).max(1)
    np.testing.assert_allclose(agreement.results()["decimals"], -np.log10(largest))
    layer = sums.spread(1)
    assert layer.rmse == pytest.approx(math.sqrt(np.square(np.diff(x[1], axis=0)).mean()))
    assert layer.mean == pytest.approx(x[1].mean()) and layer.std == pytest.approx(x[1].std())


def test_the_reference_gives_the_deductive_outputs_of_the_goldens() -> None:
    tiny = load_golden("tiny")
    tensors = to_tensors(tiny.config, tiny.params)
    tokens = tiny.rows[0, :16]
    logits, outputs = reference_outputs(tiny.config, tensors, tokens, None)
    np.testing.assert_array_equal(logits, reference_logits(tiny.config, tensors, tokens, None))
    ours = LanguageModel(tiny.config, tiny.params)(tokens[None]).deductive
    assert list(outputs) == ["A", "A_LM", "A_P", "G_LM"]
    for name, x_LNHJ in outputs.items():
        np.testing.assert_allclose(x_LNHJ, np.asarray(getattr(ours, name))[:, 0], atol=2e-4)


def test_the_last_batch_is_filled(rows_RC) -> None:
    found = list(batches(rows_RC, 2))
    assert [(part.shape, real) for part, real in found] == [((2, 16), 2), ((2, 16), 1)]
    np.testing.assert_array_equal(found[1][0], rows_RC[[2, 2]])


def test_emergence_is_measured_checkpoint_by_checkpoint(model, rows_RC) -> None:
    evaluations = [{"step": 5, "train/loss": 1.0}, {"step": 6, "eval/causal_gap": 0.5}]
    done = []
    section = Emergence.measure(
        [(3, model), (9, model)], rows_RC, evaluations, Settings(batch_size=2, advance=done.append)
    )
    first, second = section.numbers["checkpoints"]
    assert (first["step"], second["step"], sum(done)) == (3, 9, 6)
    g = one_pass(model, rows_RC)["G_LM"]
    rmse = math.sqrt(np.square(np.diff(g, axis=0)).mean())
    assert first["order_parameter"]["G_LM"] == pytest.approx(rmse / abs(g.mean()), rel=1e-4)
    values = np.linalg.svd(g.mean(0), compute_uv=False)
    np.testing.assert_array_equal(first["rank"], (values > 1e-3 * values[..., :1]).sum(-1))
    assert section.numbers["evaluations"]["causal_gap"] == [(6, 0.5)]
    assert section.tables()[0].rows[1][0] == 9
