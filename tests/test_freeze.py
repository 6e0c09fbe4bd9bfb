"""Freezing: a folder of its own, the function of the given G_LM, and a certificate that can be
recomputed.
"""

import dataclasses
import json
import math
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import WORDS, make_corpus, run_here
from safetensors.numpy import save_file

import pldr_jax
from pldr_jax.cli.freeze import freeze_main
from pldr_jax.cli.infer import infer_main
from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, TrainingConfig
from pldr_jax.config.load import config_to_dict, load_config
from pldr_jax.config.optimizer import OptimizerConfig
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.pipeline import validation_rows
from pldr_jax.data.rows import SEGMENTS, TokenRows, join_rows
from pldr_jax.interop.convert import export_run
from pldr_jax.model.counts.shapes import count_params, param_shapes
from pldr_jax.model.decoder import forward, init_params
from pldr_jax.model.deductive import predefined_g_lm
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.training.freeze.calibrate import (
    calibrate,
    frozen_config,
    some_rows,
    split_rows,
    without_plga,
)
from pldr_jax.training.freeze.certificate import kl_divergence, spectrum
from pldr_jax.training.freeze.freeze import freeze
from pldr_jax.training.freeze.settings import FreezeConfig

MODEL = ModelConfig(
    vocab_size=300,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    metric_dim=12,
    num_residual_layers=1,
    context_length=32,
    unroll=False,
)
ROWS, EVAL_ROWS = 5, 18
"""More rows to evaluate than one batch holds."""
BUDGETS = (0.0, 0.2)


def write_run(folder, config: ExperimentConfig, scale: float = 20.0):
    """A run folder of a model that was not trained; its G_LM depends on its input by `scale`."""
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(2)))
    plga = params["layers"]["attention"]["plga"]
    plga["a"] = scale * plga["a"]
    plga["b_a"] = jax.random.normal(jax.random.key(3), plga["b_a"].shape)
    if config.model.g_source != "learned":
        params = without_plga(params)
    with Checkpointer(folder, config.checkpoint) as checkpointer:
        state = {"params": params, "g_lm": predefined_g_lm(config.model)}
        checkpointer.save(7, state, {}, config_to_dict(config), {}, wait=True)
    text = open_training_text(config.data, config.model.vocab_size)
    (folder / "tokenizer.model").write_bytes(text.tokenizer.model_bytes)
    return text


def experiment(source, model: ModelConfig = MODEL) -> ExperimentConfig:
    """Of a run whose generator, where there is one, had a rate, a decay and steps of its own."""
    data = DataConfig(source=str(source), validation_fraction=0.2)
    rules = OptimizerConfig(generator_learning_rate=2e-3, metric_learner_weight_decay=10.0)
    training = TrainingConfig(eval_rows=EVAL_ROWS, freeze=(("couplings", 5), ("ffn", 0)))
    config = ExperimentConfig(data=data, optimizer=rules, training=training)
    config = config if model.g_source == "learned" else config.without_generator()
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("freeze") / "text")


@pytest.fixture(scope="module")
def frozen(text, tmp_path_factory):
    """The full model, the rows, the certificate, the frozen folder and what was printed; the run
    folder is gone.
    """
    folder, lines = tmp_path_factory.mktemp("runs"), []
    run_dir, output = folder / "run", folder / "frozen"
    held_out = write_run(run_dir, experiment(text)).texts[0].validation
    full = pldr_jax.load(run_dir)
    saved = folder / "g_lm.npz"
    settings = FreezeConfig(rows=ROWS, rank_budget=BUDGETS, save_g=str(saved))
    certificate = freeze(run_dir, output, settings, log=lines.append)
    shutil.rmtree(run_dir)
    rows = validation_rows([TokenRows(held_out, MODEL.context_length)], EVAL_ROWS, ROWS)
    return full, rows, certificate, output, lines


def test_frozen_checkpoint_is_the_model_with_that_g_lm(frozen) -> None:
    full, rows, _, output, _ = frozen
    lm = pldr_jax.load(output)
    calibrated = full(rows.calibration_BC[:, :-1]).deductive.G_LM
    mean = np.asarray(calibrated, np.float64).mean(1, keepdims=True)
    # A_LM ** P is steep where A_LM is near 0: rounding is amplified.
    size = mean.std()
    np.testing.assert_allclose(np.asarray(lm.g_lm), mean, atol=1e-3 * size)
    assert np.abs(np.asarray(calibrated)[:, :1] - mean).max() > 1e-2 * size
    tokens = rows.rows_BC[:2]
    expected = full(tokens, lm.g_lm).logits
    np.testing.assert_allclose(lm(tokens).logits, expected, atol=1e-5)
    assert np.abs(np.asarray(full(tokens).logits - expected)).max() > 1e-3
    prompts = [row[:6].tolist() for row in tokens]
    for made, other in zip(
        lm.generate(prompts, 8, stop_ids=[]),
        full.generate(prompts, 8, stop_ids=[], g_lm=lm.g_lm),
        strict=True,
    ):
        assert made.tokens == other.tokens and len(made.tokens) == 8
        np.testing.assert_allclose(made.logprobs, other.logprobs, atol=1e-5)


def test_the_saved_g_lm_is_what_another_run_trains_with(frozen, tmp_path) -> None:
    """As NPZ, and as safetensors."""
    lm, file = pldr_jax.load(frozen[3]), frozen[3].parent / "g_lm.npz"
    with np.load(file) as tensors:
        g_lm = tensors["G_LM"]
    assert g_lm.shape == (2, 2, 8, 8)
    save_file({"G_LM": g_lm}, tmp_path / "g_lm.safetensors")
    for path in (file, tmp_path / "g_lm.safetensors"):
        config = dataclasses.replace(MODEL, g_source="external", g_file=str(path))
        np.testing.assert_array_equal(predefined_g_lm(config), lm.g_lm)
    assert f"G_LM: {file}" in frozen[4]
    refused = {
        file: "is there already",
        file.with_suffix(".txt"): r"must end in \.npz",
        tmp_path / "none" / "g.npz": "there is no folder",
    }
    for path, reason in refused.items():
        with pytest.raises(ConfigError, match=rf"^--save_g=.*: {reason}"):
            freeze(frozen[3], tmp_path / "out", FreezeConfig(save_g=path))


def test_nothing_of_plga_is_left(frozen) -> None:
    full, _, certificate, output, _ = frozen
    lm = pldr_jax.load(output)
    assert (lm.config.g_source, lm.config.g_file) == ("external", None)
    assert "plga" in full.params["layers"]["attention"]
    assert "plga" not in lm.params["layers"]["attention"]
    shapes = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(lm.params)
    }
    assert shapes == param_shapes(frozen_config(ExperimentConfig(model=MODEL)).model)
    n, h, m, layers = MODEL.num_heads, MODEL.head_dim, MODEL.metric_width, MODEL.num_layers
    glu = 2 * (h * m + m) + m * h + h
    residual = MODEL.num_residual_layers * (MODEL.num_gated_units * glu + 2 * h)
    removed = layers * (2 * h + residual + 5 * n * h * h)
    before = count_params(MODEL)
    assert certificate["parameters"] == {
        "before": before,
        "after": before - removed,
        "removed": removed,
    }


def test_published_model_loses_as_many_parameters_as_its_predefined_twin() -> None:
    config = ModelConfig(
        vocab_size=32000, num_layers=5, num_heads=14, head_dim=64, ffn_dim=2389, metric_dim=170
    )
    frozen = frozen_config(ExperimentConfig(model=config)).model
    assert count_params(config) - count_params(frozen) == 109_689_362 - 105_606_482


def test_certificate_by_hand(frozen) -> None:
    full, rows, certificate, output, _ = frozen
    g_lm = pldr_jax.load(output).g_lm
    inputs, targets = rows.rows_BC[:, :-1], rows.rows_BC[:, 1:]
    p, q = (
        np.asarray(forward(MODEL, full.params, inputs, g).logits, np.float64) for g in (None, g_lm)
    )
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    before, after = (
        -np.take_along_axis(x, targets[:, :, None], axis=-1).mean() for x in (log_p, log_q)
    )
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert (targets != 0).all() and kl.mean() > 1e-4
    assert certificate["evaluation"] == {"rows": EVAL_ROWS, "tokens": targets.size}
    assert certificate["calibration"] == {"method": "mean", "rows": ROWS, "tokens": ROWS * 31}
    close = {"rel": 1e-3, "abs": 1e-6}
    assert certificate["loss"]["before"] == pytest.approx(before, **close)
    assert certificate["loss"]["frozen"] == pytest.approx(after, **close)
    assert certificate["loss"]["difference"] == pytest.approx(after - before, rel=1e-2, abs=1e-6)
    assert certificate["kl"]["mean"] == pytest.approx(kl.mean(), **close)
    assert certificate["kl"]["max"] == pytest.approx(kl.max(), **close)
    difference = np.abs(p - q)
    assert certificate["logit_difference"]["mean"] == pytest.approx(difference.mean(), **close)
    assert certificate["logit_difference"]["max"] == pytest.approx(difference.max(), **close)
    tensors = np.asarray(full(rows.calibration_BC[:, :-1]).deductive.G_LM, np.float64)
    rmse = math.sqrt(np.square(np.diff(tensors, axis=1)).mean())
    assert certificate["g_lm"]["rmse"] == pytest.approx(rmse, **close)
    order = rmse / abs(tensors.mean())
    assert certificate["g_lm"]["order_parameter"] == pytest.approx(order, rel=1e-3)


def test_certificate_of_low_rank(frozen, capsys) -> None:
    """What it says of a budget is true of the checkpoint, opened with that budget."""
    _, rows, certificate, output, lines = frozen
    whole, low = pldr_jax.load(output), pldr_jax.load(output, rank_budget=BUDGETS[1])
    inputs = rows.rows_BC[:, :-1]
    p, q = (np.asarray(lm(inputs).logits, np.float64) for lm in (whole, low))
    exact, rough = certificate["low_rank"]
    assert [exact["budget"], rough["budget"]] == list(BUDGETS)
    assert exact["logit_difference"]["max"] < 1e-5 and exact["keys"]["kept"] == 1
    assert rough["logit_difference"]["max"] == pytest.approx(np.abs(p - q).max(), rel=1e-3)
    assert rough["greedy_agreement"] == (p.argmax(-1) == q.argmax(-1)).mean()
    assert rough["loss"]["before"] == pytest.approx(certificate["loss"]["frozen"], abs=1e-6)
    assert low.low_rank.ranks.tolist() == rough["kept"] and rough["keys"]["kept"] > 1
    assert "rank budget 0.2" in "\n".join(lines)
    # And of infer.py.
    prompt = ["--prompt", "def return", "--max_new_tokens=8", "--format=jsonl"]
    arguments = ["--checkpoint", output, *prompt, f"--gin.Generation.rank_budget={BUDGETS[1]}"]
    status, shown, _ = run_here(capsys, infer_main, *arguments)
    (expected,) = low.generate("def return", 8)
    assert status == 0 and json.loads(shown)["tokens"] == expected.tokens


def test_folder_and_output(frozen, text) -> None:
    _, _, certificate, output, lines = frozen
    names = {path.name for path in output.iterdir()}
    tokenizer = {"tokenizer.model", "tokenizer.model.sha256"}
    assert names == {"checkpoints", "config.gin", "certificate.json", *tokenizer}
    assert json.loads((output / "certificate.json").read_text()) == certificate
    expected = frozen_config(experiment(text))
    assert load_config([output / "config.gin"]) == expected
    assert expected.optimizer.metric_learner_weight_decay is None
    assert expected.training.freeze == (("ffn", 0),)
    shown = "\n".join(lines)
    assert f"{certificate['parameters']['removed']:,} removed" in shown
    assert "layer 1" in shown and str(output) in shown
    assert {path.name for path in output.parent.iterdir()} == {"frozen", "g_lm.npz"}


def test_spectrum_of_known_matrices() -> None:
    g_lm = np.zeros((1, 1, 3, 4, 4))
    g_lm[0, 0, 0] = np.outer([1, 2, 3, 4], [1, 1, 1, 1])
    g_lm[0, 0, 1] = np.diag([5, 0.0051, 0.0049, 0.001])
    result = spectrum(g_lm)
    assert result["rank"] == [[1, 2, 0]]
    assert result["condition"][0][1] == pytest.approx(5000)
    assert result["condition"][0][2] is None


def test_kl_divergence_far_and_near() -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=(20, 50))
    for size in (1e-3, 1e-1, 3.0, 40.0):
        q = p + size * rng.normal(size=p.shape)
        log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(kl_divergence(p, q), expected, rtol=2e-3)
    assert np.asarray(kl_divergence(p, p)).max() == 0
    far = kl_divergence(np.array([[0.0, 400.0]]), np.array([[400.0, 0.0]]))
    np.testing.assert_allclose(far, 400, rtol=1e-5)


def test_calibration_and_evaluation_rows_are_disjoint(frozen, text) -> None:
    (prepared,) = open_training_text(experiment(text).data, MODEL.vocab_size).texts
    rows = TokenRows(prepared.validation, MODEL.context_length)
    for calibration_rows, eval_rows in ((1, 3), (ROWS, EVAL_ROWS), (10**6, 0), (3, 0)):
        calibration, evaluation = split_rows(rows, calibration_rows, eval_rows)
        chosen = [*calibration.order, *evaluation.order]
        assert len(set(chosen)) == len(chosen) and len(calibration.order)
        assert eval_rows or len(chosen) == len(rows)
    # The evaluated rows are those of a training run, batches lose none of them.
    calibration, evaluation = split_rows(rows, ROWS, EVAL_ROWS)
    held_out = validation_rows([rows], EVAL_ROWS, ROWS)
    for row_set, expected in (
        (evaluation, held_out.rows_BC),
        (calibration, held_out.calibration_BC),
    ):
        for size in (1, 4, 64):
            read = [batch[:real] for batch, real in row_set.batches(size)]
            np.testing.assert_array_equal(np.concatenate(read), expected)


def test_other_text_first_row_and_no_warning(text, tmp_path, capsys) -> None:
    """A G_LM that is b_a alone is the same for every input; the program says nothing of it."""
    write_run(tmp_path / "run", experiment(text), scale=0.0)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{k} " + " ".join(WORDS[k % 7 :]) for k in range(400)))
    arguments = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "out", "--text", other)
    status, shown, error = run_here(
        capsys, freeze_main, *arguments, "--calibration=first", "--rows=3", "--eval_rows=4"
    )
    assert (status, error) == (0, ""), error
    assert "warning" not in shown and "first of 3 rows" in shown
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["input_invariant"] and certificate["g_lm"]["rmse"] == 0
    assert certificate["kl"]["max"] < 1e-8 and certificate["evaluation"]["rows"] == 4
    # Nothing is written over.
    status, _, error = run_here(capsys, freeze_main, *arguments)
    assert status == 2 and "--output" in error and error.count("\n") == 1


def test_the_files_of_an_import_are_kept(text, tmp_path, capsys) -> None:
    write_run(tmp_path / "run", experiment(text))
    hub, out = tmp_path / "hub", tmp_path / "out"
    export_run(tmp_path / "run", hub, log=lambda line: None)
    (hub / "chat_template.jinja").write_text("{{ messages }}")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"{k} " + " ".join(WORDS[k % 7 :]) for k in range(400)))
    arguments = ("--checkpoint", hub, "--output", out, "--text", other)
    status, _, error = run_here(capsys, freeze_main, *arguments, "--rows=2", "--eval_rows=2")
    assert (status, error) == (0, ""), error
    export_run(out, tmp_path / "again", log=lambda line: None)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["custom_G_type"] == "external" and "--modeling_pldrllm" in str(raw["auto_map"])


def test_warning_where_g_lm_depends_on_the_input(frozen, text, tmp_path) -> None:
    write_run(tmp_path / "run", experiment(text))
    lines: list[str] = []
    settings = FreezeConfig(rows=1, kl_threshold=1e-9)
    certificate = freeze(tmp_path / "run", tmp_path / "out", settings, log=lines.append)
    assert not certificate["input_invariant"] and certificate["g_lm"]["rmse"] is None
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "\n" not in warning and "depends on its input" in warning


@pytest.mark.parametrize("own", [True, False])
def test_rows_of_a_packing_that_the_run_did_not_have(text, tmp_path, own: bool) -> None:
    """How many documents share a row is chosen here, then."""
    write_run(tmp_path / "run", experiment(text))
    lines: list[str] = []
    certificate = freeze(
        tmp_path / "run",
        tmp_path / "out",
        FreezeConfig(text=None if own else text, rows=2, eval_rows=2),
        overrides=["Data.packing=packed"],
        log=lines.append,
    )
    (line,) = [line for line in lines if line.startswith("Data.max_segments = ")]
    assert "filled" in line and certificate["evaluation"]["rows"] == 2


@pytest.mark.parametrize("packing", ["document", "packed"])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_padding_is_no_calibration_token(text, tmp_path, packing: str, rows: int) -> None:
    for n in range(200):
        (tmp_path / f"{n}.txt").write_text(f"def {n}")
    config = experiment(text)
    segments = 2 if packing == "packed" else None
    data = dataclasses.replace(config.data, packing=packing, max_segments=segments)
    prepared = open_training_text(data, MODEL.vocab_size)
    data = dataclasses.replace(data, source=str(tmp_path), tokenizer=str(tmp_path / "t.model"))
    prepared.tokenizer.save(data.tokenizer)
    prepared = open_training_text(data, MODEL.vocab_size)
    held_out = join_rows(prepared.rows("validation", MODEL.context_length, data))
    chosen = some_rows(held_out, rows)
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(2)))
    calibrated = calibrate(MODEL, params, chosen)
    inputs = sum(int((held_out[k][SEGMENTS] > 0).sum()) for k in chosen.order)
    assert calibrated.tokens == inputs < rows * (MODEL.context_length - 1)
    assert calibrated.rows == len(chosen.order)


def test_what_cannot_be_frozen_is_one_line(frozen, text, tmp_path) -> None:
    identity = dataclasses.replace(MODEL, g_source="identity")
    write_run(tmp_path / "sdpa", experiment(text, identity))
    cases = {
        "g_source = 'identity'": (tmp_path / "sdpa", {}),
        "g_source = 'external'": (frozen[3], {}),
        "--rows": (tmp_path / "sdpa", {"rows": 0}),
        "--calibration": (tmp_path / "sdpa", {"calibration": "median"}),
        "--rank_budget": (tmp_path / "sdpa", {"rank_budget": [0.1, 2.0]}),
    }
    for named, (folder, options) in cases.items():
        with pytest.raises(ConfigError, match=named) as caught:
            freeze(folder, tmp_path / "out", FreezeConfig(**options))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_external_without_a_file_is_refused_where_the_file_is_needed() -> None:
    config = ModelConfig(g_source="external")
    with pytest.raises(ConfigError, match=r"^Model\.g_file = None: .*needs the file"):
        predefined_g_lm(config)
