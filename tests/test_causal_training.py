"""Training with G_LM of a prefix or of another row: what a position knows, and what is scored."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_golden
from helpers import (
    one_device_mesh,
)

from pldr_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    TrainingConfig,
)
from pldr_jax.config.load import load_config
from pldr_jax.data.pipeline import ValidationRows
from pldr_jax.model.decoder import Params, forward
from pldr_jax.partition import batch_sharding, build_mesh
from pldr_jax.training.causal import forward_neighbour, prefix_lengths, scored_share
from pldr_jax.training.evaluate import Evaluator, Scores
from pldr_jax.training.losses import PAD_ID, TokenLoss
from pldr_jax.training.rows import targets_of
from pldr_jax.training.step import abstract_state, accumulated_gradients, loss_fn, train_step

MODEL = dataclasses.replace(load_golden("tiny").config, context_length=13)
ROWS, LENGTH = 8, 12
TOKENS = np.stack([np.random.default_rng(k).permutation(60)[: LENGTH + 1] for k in range(ROWS)])
TOKENS = TOKENS.astype(np.int32) + 1
"""No token twice in a row, and none is padding."""
PREFIX = np.asarray([1, 2, 3, 5, 6, 8, 11, 12], np.int32)
FORWARD = jax.jit(functools.partial(forward, MODEL))


@functools.cache
def loss_of(config: ExperimentConfig) -> Any:
    return jax.jit(functools.partial(loss_fn, config))


@pytest.fixture(scope="module")
def params() -> Params:
    """A model whose G_LM depends on its input."""
    return load_golden("tiny").params


def experiment(parts: int = 1, packing: str = "concat", seed: int = 0, **loss: Any):
    return ExperimentConfig(
        model=MODEL,
        loss=LossConfig(**loss),
        data=DataConfig(batch_size=ROWS, packing=packing),
        training=TrainingConfig(grad_accumulation=parts, seed=seed),
    )


def logits(params: Params, tokens: np.ndarray, g_length_B: np.ndarray | None) -> np.ndarray:
    return np.asarray(FORWARD(params, tokens, None, g_length_B=g_length_B).logits)


@pytest.mark.parametrize("changed", [2, 4, 7, 11])
def test_after_the_prefix_nothing_is_known_of_later_tokens(params: Params, changed: int) -> None:
    """Bit for bit: with other tokens from position `changed` on, logits before it stay, from the
    end of the prefix on. With G_LM of the whole row they do not.
    """
    tokens = TOKENS[:, :-1]
    other = tokens.copy()
    other[:, changed:] = np.flip(tokens, axis=0)[:, changed:]
    before, after = (logits(params, x, PREFIX) for x in (tokens, other))
    full_before, full_after = (logits(params, x, None) for x in (tokens, other))
    for row, p in enumerate(PREFIX):
        known = slice(p - 1, changed)
        np.testing.assert_array_equal(before[row, known], after[row, known])
        # The first position attends to itself alone, whatever G_LM is.
        seeing = slice(1, changed)
        assert (full_before[row, seeing] != full_after[row, seeing]).any(-1).all()
        if p > changed:  # within the prefix a position does see what follows it
            assert (before[row, seeing] != after[row, seeing]).any(-1).all()


def test_gradients_do_not_come_from_the_future(params: Params) -> None:
    """Of each prediction after the prefix, with respect to the embeddings of later tokens."""
    tokens, p = TOKENS[:1, :-1], 5

    def picked(table: jax.Array, t: jax.Array, g_length_B: jax.Array) -> jax.Array:
        given = {**params, "embedding": {**params["embedding"], "table": table}}
        return forward(MODEL, given, tokens, None, g_length_B=g_length_B).logits[0, t].max()

    gradient = jax.jit(jax.vmap(jax.grad(picked), (None, 0, None)))
    table = params["embedding"]["table"]
    positions = jnp.arange(LENGTH)
    own, leaky = (
        np.abs(gradient(table, positions, jnp.asarray([length]))).sum(-1)[:, tokens[0]]
        for length in (p, LENGTH)
    )
    future = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    after = np.arange(LENGTH)[:, None] >= p - 1
    assert (own[future & after] == 0).all()
    assert (own[~future] > 0).all()
    assert (leaky[1:][future[1:]] > 0).all()  # the first attends to itself alone


def nats(logits_BTV: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each target in float64, and whether it is the most probable, [B,T]."""
    x = np.asarray(logits_BTV, np.float64)
    targets = TOKENS[:, 1:, None]
    log_z = np.log(np.exp(x).sum(-1))
    return log_z - np.take_along_axis(x, targets, -1)[..., 0], x.argmax(-1) == targets[..., 0]


def half_g_lm(params: Params) -> jax.Array:
    """G_LM of rows that end after half of the tokens."""
    g_lm: jax.Array = FORWARD(params, TOKENS[:, : LENGTH // 2]).deductive.G_LM
    return g_lm


def test_loss_is_that_of_prompts_of_this_length(params: Params) -> None:
    """Once more with G_LM of the prefix alone, given from outside."""
    prefix = np.asarray([6, 6, 6, 12, 6, 12, 12, 6], np.int32)
    _, (tokens, _) = loss_of(experiment(g_from="prefix"))(params, None, TOKENS, prefix)
    own = FORWARD(params, TOKENS[:, :-1]).deductive.G_LM
    g_lm = jnp.where((prefix == 6)[:, None, None, None], half_g_lm(params), own)
    nats_BT, hits_BT = nats(FORWARD(params, TOKENS[:, :-1], g_lm).logits)
    scored = np.arange(LENGTH) >= prefix[:, None] - 1
    assert float(tokens.count) == scored.sum() == 5 * 7 + 3 * 1
    assert float(tokens.loss) == pytest.approx(nats_BT[scored].mean(), rel=2e-6)
    assert float(tokens.accuracy) == pytest.approx(hits_BT[scored].mean())
    assert float(scored_share(TOKENS, prefix)) == pytest.approx(38 / (ROWS * LENGTH))


def test_lengths_follow_from_seed_and_step() -> None:
    config = experiment(g_from="random_prefix")
    draw = jax.jit(functools.partial(prefix_lengths, config))
    drawn = np.stack([np.asarray(draw(TOKENS, step)) for step in range(200)])
    np.testing.assert_array_equal(drawn[7], prefix_lengths(config, TOKENS, 7))
    assert (drawn[0] != drawn[1]).any() and len(np.unique(drawn[0])) > 1
    assert (drawn[0] != prefix_lengths(experiment(g_from="random_prefix", seed=1), TOKENS, 0)).any()
    counts = np.bincount(drawn.ravel(), minlength=LENGTH + 1)[1:]
    assert len(counts) == LENGTH and counts.min() > 80 and counts.max() < 190  # 133 each, +- 11
    shorter = experiment(g_from="random_prefix", g_prefix_length=3)
    short = np.stack([prefix_lengths(shorter, TOKENS, k) for k in range(9)])
    assert set(short.ravel()) == {1, 2, 3}
    for length, expected in ((None, 6), (4, 4), (12, 12)):
        fixed = prefix_lengths(experiment(g_from="prefix", g_prefix_length=length), TOKENS, 3)
        np.testing.assert_array_equal(fixed, [expected] * ROWS)
    for source in ("row", "neighbour"):
        assert prefix_lengths(experiment(g_from=source), TOKENS, 0) is None


def document_rows() -> np.ndarray:
    """Rows [B,3,T] of 1 to 8 real tokens, then padding."""
    rows = np.zeros((ROWS, 3, LENGTH), np.int32)
    for k in range(ROWS):
        rows[k, 0, : k + 1], rows[k, 1, : k + 1] = TOKENS[k, : k + 1], TOKENS[k, 1 : k + 2]
        rows[k, 2, : k + 1] = 1
    return rows


def test_rows_of_documents(params: Params) -> None:
    """A prefix ends within the document, and padding stays out of it."""
    rows, config = document_rows(), experiment(g_from="random_prefix", packing="document")
    real = np.arange(ROWS) + 1
    drawn = np.stack([prefix_lengths(config, rows, step) for step in range(40)])
    assert (drawn >= 1).all() and (drawn.max(0) == real).all()
    p = drawn[0]
    np.testing.assert_array_equal((targets_of(rows, p) != PAD_ID).sum(1), real - p + 1)
    run = loss_of(config)
    other = rows.copy()
    other[:, 0] = np.where(rows[:, 2] == 0, 9, rows[:, 0])
    assert float(run(params, None, rows, p)[0]) == float(run(params, None, other, p)[0])


def test_parts_and_chunks_change_no_number(params: Params) -> None:
    dag = {"g_from": "random_prefix", "dag_a_lm": 1.0, "dag_g_lm": 1.0, "dag_warmup_steps": 4}
    config, step = experiment(4, **dag), 3
    lengths = prefix_lengths(config, TOKENS, step)
    compute = jax.jit(functools.partial(accumulated_gradients, config))
    compiled = compute.lower(params, None, TOKENS, step)
    compiled = compiled.compile({"xla_backend_optimization_level": 0})
    total, tokens, _, _ = compiled(params, None, TOKENS, step)
    whole = loss_of(experiment(chunk=5, **dag))
    expected, (expected_tokens, dag_values) = whole(params, None, TOKENS, lengths, 0.75)
    assert float(tokens.count) == float(expected_tokens.count) == (LENGTH + 1 - lengths).sum()
    assert float(tokens.loss) == pytest.approx(float(expected_tokens.loss), rel=1e-6)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    added = 0.75 * float(dag_values["A_LM"] + dag_values["G_LM"])  # three of four steps' rise
    assert float(total) == pytest.approx(float(tokens.loss) + added, rel=1e-5) and added > 0.01


@pytest.mark.parametrize("source", ["random_prefix", "neighbour"])
def test_the_mesh_decides_nothing(params: Params, source: str) -> None:
    """Rows over four devices: the same draws, the same neighbours, the same loss."""
    config = experiment(g_from=source)

    def run(params: Params, rows: jax.Array) -> Any:
        lengths = prefix_lengths(config, rows, 1)
        return lengths, loss_fn(config, params, None, rows, lengths)[1][0]

    mesh = build_mesh(MeshConfig(-1, 1, 1), jax.devices()[:4])
    with jax.set_mesh(mesh):
        rows = jax.device_put(TOKENS, batch_sharding(mesh, TOKENS.shape))
        split_lengths, split_tokens = jax.device_get(jax.jit(run)(jax.device_get(params), rows))
    lengths = prefix_lengths(config, TOKENS, 1)
    if source == "random_prefix":
        np.testing.assert_array_equal(lengths, split_lengths)
    _, (tokens, _) = loss_of(config)(params, None, TOKENS, lengths)
    assert float(split_tokens.count) == float(tokens.count)
    assert float(split_tokens.loss) == pytest.approx(float(tokens.loss), rel=1e-5)


def test_a_neighbours_g_lm(params: Params) -> None:
    """It is that of the row before; no prediction depends on a later token of its row."""
    config = experiment(g_from="neighbour")
    run = jax.jit(functools.partial(forward_neighbour, config))
    made, own = run(params, TOKENS), FORWARD(params, TOKENS[:, :-1]).deductive.G_LM
    np.testing.assert_allclose(made.outputs.deductive.G_LM, own, rtol=1e-5, atol=1e-6)
    given = jnp.roll(own, 1, axis=1)
    expected = FORWARD(params, TOKENS[:, :-1], given).logits
    np.testing.assert_allclose(made.outputs.logits, expected, rtol=1e-4, atol=1e-5)
    other = TOKENS.copy()
    other[2, 6:] = TOKENS[5, 6:]
    changed = run(params, other).outputs.logits
    np.testing.assert_array_equal(made.outputs.logits[2, :6], changed[2, :6])
    # The G_LM of row 3 is of row 2; its first position attends to itself alone.
    assert (made.outputs.logits[3, 1:] != changed[3, 1:]).any(-1).all()
    assert (made.targets_BT == TOKENS[:, 1:]).all()


def test_evaluation_of_the_second_half(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the G_LM of the first half of each row, and of all of it."""
    mesh, zero = one_device_mesh(MeshConfig()), TokenLoss(*(np.zeros(()),) * 3)
    config = ExperimentConfig(
        model=MODEL,
        data=DataConfig(batch_size=ROWS),
        training=TrainingConfig(eval_prefix_g=True),
    )
    evaluator = Evaluator(config, mesh, ValidationRows(TOKENS, TOKENS[:1]), 2.5)
    # What is always evaluated is the matter of test_evaluate.py, and slow to compile.
    monkeypatch.setattr(evaluator, "_calibrate", lambda *_: None)
    scores = Scores({"own": zero, "frozen": zero}, {}, {}, np.zeros(()), np.zeros(()))
    monkeypatch.setattr(evaluator, "_score", lambda *_: (scores, None))
    with jax.set_mesh(mesh):
        metrics = evaluator(params)
    inputs = TOKENS[:, :-1]
    half, whole = (
        nats(FORWARD(params, inputs, g_lm).logits)[0][:, LENGTH // 2 - 1 :].mean()
        for g_lm in (half_g_lm(params), FORWARD(params, inputs).deductive.G_LM)
    )
    assert metrics["eval/loss_prefix_g"] == pytest.approx(half, rel=1e-6)
    assert metrics["eval/prefix_gap"] == pytest.approx(half - whole, abs=1e-6)
    assert abs(half - whole) > 1e-4


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["Loss.g_from=future"], "expected one of 'row', 'prefix', 'random_prefix', 'neighbour'"),
        (["Loss.g_from=prefix", "Loss.g_prefix_length=128"], "a row has 127 inputs"),
        (["Loss.g_prefix_length=4"], "Loss.g_prefix_length = 4: is only read with a prefix"),
        (["Loss.g_from=prefix", "Model.g_source=identity"], "Loss.g_from = 'prefix': a predefined"),
        (["Loss.g_from=neighbour", "Data.packing=packed"], "rows with segments know 'row' alone"),
        (
            ["Loss.g_from=neighbour", "Training.grad_accumulation=16"],
            "needs 2 rows a step, or part",
        ),
        (["Training.eval_prefix_g=True", "Data.packing=packed"], "Training.eval_prefix_g = True"),
        (["Loss.dag_warmup_steps=5", "Loss.dag_until_step=5"], "Loss.dag_until_step = 5: must"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_metrics_of_a_step() -> None:
    """Their names, from tracing the step alone."""
    mesh = one_device_mesh(MeshConfig())
    plain = experiment()
    prefix = experiment(g_from="random_prefix", dag_a_p=0.1, dag_until_step=3)
    names = []
    for config in (plain, prefix):
        state = abstract_state(config, mesh)
        names.append(set(jax.eval_shape(functools.partial(train_step, config), state, TOKENS)[1]))
    dag = {f"train/dag_loss/{name}" for name in ("A_LM", "A_P", "G_LM")}
    assert names[1] - names[0] == {"train/scored_share", "train/dag_scale"} | dag
