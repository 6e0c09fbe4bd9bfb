"""The cross-entropy and the DAG regulariser, against float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden

from pldr_jax.config import LossConfig
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.training.losses import (
    PAD_ID,
    dag_loss,
    dag_losses,
    dag_schedule,
    log_trace_expm,
    regularizer,
    token_loss,
)


def dag_loss_64(x: np.ndarray) -> float:
    """The same in float64, by eigenvalues: tr exp(M) is the sum of their exponentials."""
    values = []
    for matrix in x.reshape(-1, *x.shape[-2:]).astype(np.float64):
        eigenvalues = np.linalg.eigvals(matrix * matrix)
        top = max(float(eigenvalues.real.max()), 0.0)
        if top < 1:
            values.append(np.log1p(np.expm1(eigenvalues).mean().real))
        else:
            values.append(top + np.log(np.exp(eigenvalues - top).mean().real))
    return float(np.abs(values).mean())


def test_dag_losses_of_the_goldens(case: Golden) -> None:
    """At the golden's own tensors; the authors' float32 value may be further off than ours."""
    deductive = DeductiveOutputs(
        A_LM=jnp.asarray(case.tensors["A_LM"]),
        A_P=jnp.asarray(case.tensors["A_P"]),
        G_LM=jnp.asarray(case.tensors["G_LM"]),
    )
    actual = dag_losses(deductive)
    assert list(actual) == ["A_LM", "A_P", "G_LM"]
    expected = case.values["dag_loss_float64"]
    assert [float(value) for value in actual.values()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0])
def test_dag_loss_over_scales(scale: float) -> None:
    x = scale * np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    assert float(jax.jit(dag_loss)(x)) == pytest.approx(dag_loss_64(x), rel=1e-5)


def test_dag_loss_of_matrices_of_different_scales_at_once() -> None:
    scales = np.logspace(-4, 1.5, 12).astype(np.float32)[:, None, None]
    x = scales * np.random.default_rng(1).normal(size=(12, 6, 6)).astype(np.float32)
    assert float(jax.jit(dag_loss)(x)) == pytest.approx(dag_loss_64(x), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, 16])
def test_dag_loss_far_beyond_the_overflow_of_the_exponential(size: int) -> None:
    """M = 1e6 J has the eigenvalues 1e6 H and 0: log tr exp(M) / H = 1e6 H - log H."""
    value, gradient = jax.jit(jax.value_and_grad(dag_loss))(jnp.full((size, size), 1e3))
    assert float(value) == pytest.approx(1e6 * size - np.log(size), rel=1e-5)
    # d/dX = 2 X * exp(M)^T / tr exp(M), and exp(M) / tr exp(M) = J / H
    assert np.asarray(gradient) == pytest.approx(np.full((size, size), 2e3 / size), rel=1e-5)


@pytest.mark.parametrize("scale,rounding", [(0.1, 0.0), (0.7, 1e-6), (2.0, 1e-5), (40.0, 1e-3)])
def test_dag_loss_is_zero_for_acyclic_graphs(scale: float, rounding: float) -> None:
    """Exactly, where no squaring is needed; else to the rounding of the scales' logarithms."""
    x = np.triu(scale * np.random.default_rng(2).normal(size=(3, 5, 5)), 1).astype(np.float32)
    permutation = np.random.default_rng(3).permutation(5)
    for matrix in (x, x.swapaxes(-1, -2), x[:, permutation][:, :, permutation]):
        assert abs(float(jax.jit(dag_loss)(matrix))) <= rounding
    x[0, 4, 0] = x[0, 0, 4] = scale
    assert float(jax.jit(dag_loss)(x)) > max(1e-6, 2 * rounding)


@pytest.mark.parametrize("scale", [0.05, 0.7, 3.0])
def test_dag_loss_gradient(scale: float) -> None:
    x = scale * np.random.default_rng(4).normal(size=(2, 4, 4)).astype(np.float32)
    expected = np.zeros_like(x, np.float64)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(expected)
        step[index] = 1e-5 * scale
        expected[index] = (dag_loss_64(x + step) - dag_loss_64(x - step)) / (2e-5 * scale)
    actual = np.asarray(jax.jit(jax.grad(dag_loss))(x))
    assert actual == pytest.approx(expected, abs=1e-5 * np.abs(expected).max())


def test_regularizer_weighs_each_loss() -> None:
    dag: dict[str, Any] = {"A_LM": jnp.float32(1), "A_P": jnp.float32(10), "G_LM": jnp.float32(100)}
    assert float(regularizer(LossConfig(0.5, 0.2, 0.1), dag)) == pytest.approx(12.5)
    assert float(regularizer(LossConfig(), {})) == 0
    assert dag_losses(DeductiveOutputs(G_LM=jnp.ones((1, 1, 1, 2, 2)))) == {}


def test_token_loss_leaves_padding_out() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(2, 4, 7)).astype(np.float32)
    targets = np.array([[3, PAD_ID, 6, PAD_ID], [0, 5, PAD_ID, PAD_ID]])
    logits[0, 0, 3] = logits[1, 1, 0] = 9.0  # one target found; at another, the first id is
    nats = -(
        logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1))[..., None]
    )
    rows, columns = np.nonzero(targets != PAD_ID)
    each = nats[rows, columns, targets[rows, columns]]
    tokens = token_loss(jnp.asarray(logits), jnp.asarray(targets))
    assert float(tokens.count) == 4
    assert float(tokens.loss) == pytest.approx(each.mean(), rel=1e-6)
    found = (logits.argmax(-1) == targets)[rows, columns]
    assert found.any() and not found.all()
    assert float(tokens.accuracy) == pytest.approx(found.mean())


def test_token_loss_sums_add_up_over_batches() -> None:
    rng = np.random.default_rng(6)
    logits = jnp.asarray(rng.normal(size=(4, 5, 7)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 7, (4, 5)))
    whole = token_loss(logits, targets)
    parts = jax.tree.map(
        jnp.add, token_loss(logits[:1], targets[:1]), token_loss(logits[1:], targets[1:])
    )
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    assert float(parts.accuracy) == pytest.approx(float(whole.accuracy), rel=1e-6)


def test_a_batch_of_padding_has_loss_zero() -> None:
    logits, targets = jnp.zeros((2, 3, 5)), jnp.full((2, 3), PAD_ID)
    tokens = token_loss(logits, targets)
    assert (float(tokens.loss), float(tokens.accuracy)) == (0.0, 0.0)
    gradient = jax.grad(lambda x: token_loss(x, targets).loss)(logits)
    assert not np.asarray(gradient).any()


def test_dag_schedule() -> None:
    def factors(config: LossConfig) -> list[float]:
        return [float(dag_schedule(config, step)) for step in range(7)]

    assert factors(LossConfig()) == [1] * 7
    assert factors(LossConfig(dag_warmup_steps=4)) == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert factors(LossConfig(dag_until_step=3)) == [1, 1, 1, 0, 0, 0, 0]
    both = LossConfig(dag_warmup_steps=2, dag_until_step=5)
    assert factors(both) == [0, 0.5, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("entry", [np.inf, 1e20, 3e38, np.nan])
def test_dag_loss_of_what_does_not_fit_float32_ends(entry: float) -> None:
    """1e20 and 3e38 have an infinite square. The other matrix of the batch is what it is alone."""
    x = np.stack([np.full((4, 4), 0.3), np.full((4, 4), 0.3)]).astype(np.float32)
    x[1, 2, 1] = entry
    with np.errstate(over="ignore"):
        squares = jnp.asarray(x * x)
    values = log_trace_expm(squares)
    assert values[0] == log_trace_expm(squares[0])
    assert jnp.isnan(values[1]) if math.isnan(entry) else values[1] == jnp.inf
    gradient = jax.grad(lambda m: log_trace_expm(m).sum())(squares)
    assert jnp.isfinite(gradient[0]).all() and not jnp.isfinite(gradient[1]).any()


@pytest.mark.parametrize("entry", [1e30, 3e38])
def test_dag_loss_of_the_largest_finite_squares(entry: float) -> None:
    """The value is the largest eigenvalue, here 4 times the entry: 4e30, and beyond float32."""
    value = log_trace_expm(jnp.full((4, 4), entry, jnp.float32))
    expected = 4e30 if entry == 1e30 else np.inf
    assert value == pytest.approx(expected, rel=1e-5)


def test_predictions_that_are_not_finite_are_never_correct() -> None:
    """The last token of the vocabulary is what an argmax of NaN gives."""
    logits = jnp.array([[[0.0, 1.0, 2.0], [np.nan, 1.0, 2.0], [0.0, 1.0, np.inf]]])
    loss = token_loss(logits, jnp.array([[2, 2, 2]]))
    assert loss.correct == 1 and loss.count == 3 and not jnp.isfinite(loss.loss)
    broken = token_loss(jnp.full((1, 2, 3), jnp.nan), jnp.array([[2, 1]]))
    assert broken.accuracy == 0 and jnp.isnan(broken.loss)
