"""Evaluation against direct computations in numpy."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import one_device_mesh

from pldr_jax.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
)
from pldr_jax.data.pipeline import ValidationRows
from pldr_jax.model.audits import row_contrast, stabilised_order
from pldr_jax.model.decoder import Params, forward, init_params
from pldr_jax.partition import build_mesh
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.losses import PAD_ID
from pldr_jax.training.order_parameter import DeductiveStatistics, pair_sums

CONFIG = ModelConfig(
    vocab_size=40, num_layers=2, num_heads=2, head_dim=8, num_residual_layers=1, context_length=12
)
RNG = np.random.default_rng(0)
ROWS = RNG.integers(1, 40, (10, 12)).astype(np.int32)
ROWS[3, 7:] = PAD_ID  # padding targets do not count
FORWARD = jax.jit(functools.partial(forward, CONFIG))
PREDEFINED = {"eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte"}
CALIBRATION = RNG.integers(1, 40, (3, 12)).astype(np.int32)


def initial_params(config: ModelConfig) -> Params:
    return nn.unbox(jax.jit(functools.partial(init_params, config))(jax.random.key(0)))


@pytest.fixture(scope="module")
def params() -> Params:
    """Away from the start of training: G_LM depends on the input, and the mean of A is not 0."""
    initial = initial_params(CONFIG)
    plga = initial["layers"]["attention"]["plga"]
    for name, factor in (("W", 3), ("P", 0.5), ("a", 6)):
        plga[name] = factor * plga[name]
    norm = plga["residual"]["norm"]
    norm["bias"] = norm["bias"] + 0.5
    return initial


def evaluate(
    params: Params,
    batch_size: int,
    rows: np.ndarray = ROWS,
    config=CONFIG,
    mesh=None,
    n_micro: int = 1,
    chunk: int = 0,
) -> dict[str, float]:
    mesh = mesh or one_device_mesh(MeshConfig())
    experiment = ExperimentConfig(
        model=config,
        data=DataConfig(batch_size=batch_size),
        loss=LossConfig(chunk=chunk),
        training=TrainingConfig(grad_accumulation=n_micro),
    )
    evaluator = Evaluator(experiment, mesh, ValidationRows(rows, CALIBRATION), bytes_per_token=2.5)
    with jax.set_mesh(mesh):
        return evaluator(params)


def direct(params: Params, rows: np.ndarray, g_lm=None) -> tuple[float, float]:
    """Loss and accuracy, row by row, in float64."""
    nats, hits = [], []
    batch = np.asarray(FORWARD(params, np.maximum(rows[:, :-1], 0), g_lm).logits, np.float64)
    for logits, targets in zip(batch, rows[:, 1:], strict=True):
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses = log_z - logits[np.arange(len(targets)), targets]
        nats += list(losses[targets != PAD_ID])
        hits += list((logits.argmax(-1) == targets)[targets != PAD_ID])
    return float(np.mean(nats)), float(np.mean(hits))


def test_statistics_are_those_of_the_definition() -> None:
    x = np.random.default_rng(1).normal(0.3, 2.0, (2, 9, 3, 4, 4))
    x[:, :, 1] += 5
    rmse = math.sqrt(np.mean((x[:, 1:] - x[:, :-1]) ** 2))
    expected = {
        "eval/order_parameter/A": rmse / abs(x.mean()),
        "eval/rmse/A": rmse,
        "eval/rmse_over_std/A": rmse / x.std(),
    }
    for splits in ([], [4], [1, 2, 7]):
        statistics = DeductiveStatistics()
        for part in np.split(x, splits, axis=1):
            statistics.add(part)
        assert statistics.results("A") == pytest.approx(expected, rel=1e-12)


def test_statistics_of_equal_sequences_and_of_a_mean_of_zero() -> None:
    statistics = DeductiveStatistics()
    one = np.random.default_rng(2).normal(size=(2, 1, 2, 4, 4))
    statistics.add(np.repeat(one, 5, axis=1))
    assert statistics.results("A")["eval/order_parameter/A"] == 0
    statistics = DeductiveStatistics()
    statistics.add(np.array([1.0, -1.0]).reshape(1, 2, 1, 1, 1))
    assert statistics.results("A") == {
        "eval/order_parameter/A": math.inf,
        "eval/rmse/A": 2.0,
        "eval/rmse_over_std/A": 2.0,
    }


def test_loss_of_any_number_of_rows_is_the_exact_mean(params) -> None:
    for rows, batch_size in ((ROWS, 4), (ROWS[-3:], 8)):
        metrics = evaluate(params, batch_size, rows)
        loss, accuracy = direct(params, rows)
        assert metrics["eval/loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["eval/accuracy"] == pytest.approx(accuracy, rel=1e-6)
        assert metrics["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert metrics["eval/bits_per_byte"] == pytest.approx(loss / math.log(2) / 2.5, rel=1e-6)


def test_causal_gap_is_the_loss_with_g_lm_of_the_calibration_row(params) -> None:
    g_lm = FORWARD(params, CALIBRATION[:1, :-1]).deductive.G_LM
    frozen, own = direct(params, ROWS, g_lm)[0], direct(params, ROWS)[0]
    metrics = evaluate(params, 4)
    assert metrics["eval/loss_frozen_g"] == pytest.approx(frozen, rel=1e-6)
    assert metrics["eval/causal_gap"] == pytest.approx(frozen - own, abs=2e-6)
    assert abs(frozen - own) > 1e-3
    assert metrics["eval/order_parameter/G_LM"] > 0.1


def test_no_gap_where_g_lm_is_the_same_for_every_input(params) -> None:
    layers = params["layers"]
    plga = {**layers["attention"]["plga"], "W": np.zeros((2, 2, 8, 8), np.float32)}
    plga["b_W"] = np.random.default_rng(3).normal(size=(2, 2, 8, 8)).astype(np.float32)
    attention = {**layers["attention"], "plga": plga}
    constant = {**params, "layers": {**layers, "attention": attention}}
    metrics = evaluate(constant, 4)
    assert metrics["eval/causal_gap"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval/order_parameter/G_LM"] < 1e-6 < metrics["eval/order_parameter/A"]


def test_statistics_and_dag_losses_of_the_rows(params) -> None:
    metrics = evaluate(params, 4)  # two whole batches; the short one is left out
    outputs = FORWARD(params, np.maximum(ROWS[:8, :-1], 0)).deductive
    for name, tensor in outputs.items():
        x = np.asarray(tensor, np.float64)
        rmse = math.sqrt(np.mean((x[:, 1:] - x[:, :-1]) ** 2))
        assert metrics[f"eval/rmse/{name}"] == pytest.approx(rmse, rel=1e-4)
        assert metrics[f"eval/order_parameter/{name}"] == pytest.approx(
            rmse / abs(x.mean()), rel=1e-3
        )
        if name == "A":
            continue
        squares = np.square(x).reshape(-1, 8, 8)
        logs = [np.log(np.trace(exponential(m)) / 8) for m in squares]
        assert metrics[f"eval/dag_loss/{name}"] == pytest.approx(np.mean(logs), rel=1e-3)


def test_audits_of_the_first_two_rows(params) -> None:
    metrics = evaluate(params, 4)
    outputs = FORWARD(params, np.maximum(ROWS[:2, :-1], 0)).deductive
    for name, tensor in outputs.items():
        x, y = np.moveaxis(np.asarray(tensor, np.float64), 1, 0)
        expected = stabilised_order(x, y)
        assert metrics[f"eval/order_rms/{name}"] == pytest.approx(expected, rel=1e-3)
    contrast = row_contrast(np.asarray(outputs.A, np.float64)).mean()
    assert metrics["eval/row_contrast"] == pytest.approx(contrast, rel=1e-3)
    assert metrics["eval/rowmap_sigma"] > 0


def exponential(m: np.ndarray) -> np.ndarray:
    """exp(M) by its series, of M / 2^20 squared 20 times."""
    result = term = np.eye(len(m))
    for n in range(1, 12):
        term = term @ m / 2**20 / n
        result = result + term
    for _ in range(20):
        result = result @ result
    return result


def test_predefined_g_lm_has_no_gap_to_report() -> None:
    config = dataclasses.replace(CONFIG, g_source="identity")
    assert set(evaluate(initial_params(config), 4, config=config)) == PREDEFINED


def test_the_same_on_eight_devices(params) -> None:
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    one, eight = evaluate(params, 4), evaluate(params, 4, mesh=mesh)
    assert set(one) == set(eight)
    for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_microbatches_and_chunks_change_no_number(params) -> None:
    whole = evaluate(params, 4)
    for n_micro, chunk in ((4, 0), (2, 5)):
        parts = evaluate(params, 4, n_micro=n_micro, chunk=chunk)
        assert set(parts) == set(whole)
        for name, value in whole.items():
            # Powers of A amplify the rounding of another batch size.
            assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("segments", [1, 3])
def test_sums_on_the_device_are_those_of_the_chain(segments: int) -> None:
    """Of sequences that count, however they lie in rows and microbatches."""
    rng = np.random.default_rng(4)
    x = rng.normal(0.3, 2.0, (2, 8 * segments, 3, 4, 4)).astype(np.float32)
    per_row = rng.integers(1, segments + 1, 8)
    per_row[6:] = 0  # rows that do not count
    counted_BK = np.arange(segments) < per_row[:, None]
    expected, actual = DeductiveStatistics(), DeductiveStatistics()
    expected.add(x[:, np.flatnonzero(counted_BK)])
    last, exists = np.full((2, 3, 4, 4), np.nan, np.float32), np.zeros((), bool)
    for start in range(0, 8, 2):
        counted = counted_BK[start : start + 2]
        x_LBNHJ = x[:, start * segments : (start + 2) * segments]
        sums_L3, pairs, last = jax.jit(pair_sums)(x_LBNHJ, counted, last, exists)
        exists = exists | counted.any()
        actual.add_sums(np.asarray(sums_L3), int(counted.sum()), int(pairs), 3 * 4 * 4)
    assert actual.results("A") == pytest.approx(expected.results("A"), rel=1e-5)
    assert actual.spread(1).rmse == pytest.approx(expected.spread(1).rmse, rel=1e-5)


def test_what_leaves_the_device_is_small(params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as the deductive outputs or the logits of a microbatch."""
    sizes, get = [], jax.device_get

    def record(tree):
        sizes.extend(leaf.size for leaf in jax.tree.leaves(tree))
        return get(tree)

    monkeypatch.setattr(jax, "device_get", record)
    evaluate(params, 4)
    assert sizes and max(sizes) <= 3 * CONFIG.num_layers
