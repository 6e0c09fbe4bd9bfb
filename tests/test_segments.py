"""Segments side by side in a row are to the model what they are in rows of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import shard_of

from pldr_jax.config import DataConfig, ExperimentConfig, MeshConfig
from pldr_jax.data.rows import SEGMENTS, SegmentRows
from pldr_jax.model.counts.shapes import place_params
from pldr_jax.model.kernels import attention_weights
from pldr_jax.model.segments import Segments
from pldr_jax.partition import batch_sharding, build_mesh, mesh_scope
from pldr_jax.training.losses import dag_losses
from pldr_jax.training.rows import forward_rows
from pldr_jax.training.step import loss_fn

C, K = 17, 4
FORWARD = jax.jit(forward_rows, static_argnums=(0, 3))
LENGTHS = np.asarray([12, 5, 40, 3, 9, 2, 7, 6, 17, 4, 2, 3, 2])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """The same documents in rows of their own, and packed; [B,3,T] each."""
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.random.default_rng(1).integers(4, 40, LENGTHS.sum())
    store = shard_of(folder, tokens, LENGTHS)
    made = [SegmentRows(store, C, k) for k in (1, K)]
    document, segment = (np.stack([m[i] for i in range(len(m))]) for m in made)
    assert len(segment) < len(document) and segment[:, SEGMENTS].max() == K
    return document, segment


def by_piece(rows: np.ndarray, values: np.ndarray) -> dict[tuple[int, ...], np.ndarray]:
    """Values [B,T,...] of each segment, by its inputs."""
    found = {}
    for row, value in zip(rows, np.asarray(values), strict=True):
        for number in range(1, row[SEGMENTS].max() + 1):
            mine = row[SEGMENTS] == number
            found[tuple(row[0][mine])] = value[mine]
    return found


@pytest.fixture(scope="module")
def tiny(golden):
    """The authors' tiny model with 1 added to b_W, so that A_LM is away from its floor.

    Q^T Q is summed in another order in a packed row, and the powers of PLGA amplify the rounding of
    that where an entry of A_LM is near 1e-9: without the 1, logits differ by 3e-6 of 2.2, but
    gradients by 5e-3 of 1.05; with it, gradients by 3e-7 of 0.12.
    """
    case = golden("tiny")
    params = jax.tree.map(jnp.asarray, case.params)
    plga = params["layers"]["attention"]["plga"]
    plga["b_W"] = plga["b_W"] + 1
    return case.config, params


def test_segments_equal_documents_in_every_logit_and_gradient(tiny, rows) -> None:
    model, params = tiny
    document, segment = rows
    own, packed = FORWARD(model, params, document, 1), FORWARD(model, params, segment, K)
    one, other = by_piece(document, own.outputs.logits), by_piece(segment, packed.outputs.logits)
    assert one.keys() == other.keys() and len(one) > 10
    for piece, logits in one.items():
        np.testing.assert_allclose(other[piece], logits, rtol=0, atol=1e-5)
    dag, dag_2 = (dag_losses(x.outputs.deductive, x.real_B) for x in (own, packed))
    chex.assert_trees_all_close(dag, dag_2, rtol=1e-5)

    results = []
    for packing, batch in (("document", document), ("packed", segment)):
        data = DataConfig(packing=packing, max_segments=K)
        config = ExperimentConfig(model=model, data=data)
        gradient = jax.jit(jax.value_and_grad(functools.partial(loss_fn, config), has_aux=True))
        results.append(gradient(params, None, batch))
    ((loss, (tokens, _)), grads), ((loss_2, (tokens_2, _)), grads_2) = results
    chex.assert_trees_all_close((loss, tokens), (loss_2, tokens_2), rtol=1e-5)
    assert int(tokens.count) == (document[:, SEGMENTS] > 0).sum()
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 1e-2
    chex.assert_trees_all_close(grads_2, grads, rtol=0, atol=1e-5)


def test_deductive_outputs_have_an_entry_for_each_segment(tiny, rows) -> None:
    model, params = tiny
    document, segment = rows
    own, packed = FORWARD(model, params, document, 1), FORWARD(model, params, segment, K)
    g_lm, g_lm_2 = (np.asarray(x.outputs.deductive.G_LM) for x in (own, packed))
    assert g_lm_2.shape[1] == K * len(segment)
    real = np.asarray(packed.real_B).reshape(len(segment), K)
    np.testing.assert_array_equal(real.sum(1), segment[:, SEGMENTS].max(1))
    pieces = {tuple(row[0][row[SEGMENTS] > 0]): i for i, row in enumerate(document)}
    for b, row in enumerate(segment):
        for k in range(real[b].sum()):
            i = pieces[tuple(row[0][row[SEGMENTS] == k + 1])]
            np.testing.assert_allclose(g_lm_2[:, b * K + k], g_lm[:, i], atol=1e-5)


def test_a_segment_knows_nothing_of_the_others(tiny, rows) -> None:
    """Bit for bit: other tokens in one segment change no logit of another."""
    model, params = tiny
    batch = rows[1]
    changed = batch.copy()
    mine = (batch[:, SEGMENTS] == 1) | (batch[:, SEGMENTS] == 3)
    changed[:, 0][mine] = 50 - changed[:, 0][mine]
    before = np.asarray(FORWARD(model, params, batch, K).outputs.logits)
    after = np.asarray(FORWARD(model, params, changed, K).outputs.logits)
    others = (batch[:, SEGMENTS] == 2) | (batch[:, SEGMENTS] == 4)
    np.testing.assert_array_equal(after[others], before[others])
    assert np.abs(after - before)[mine].max() > 1e-2


def test_one_g_lm_from_outside_serves_every_segment(tiny, rows) -> None:
    model, params = tiny
    document, segment = rows
    shape = (model.num_layers, 1, model.num_heads, model.head_dim, model.head_dim)
    g_lm = jax.random.normal(jax.random.key(0), shape)
    one = by_piece(document, FORWARD(model, params, document, 1, g_lm).outputs.logits)
    other = by_piece(segment, FORWARD(model, params, segment, K, g_lm).outputs.logits)
    for piece, logits in one.items():
        np.testing.assert_allclose(other[piece], logits, rtol=0, atol=1e-5)


def test_positions_restart_and_blocks_do_not_touch() -> None:
    segments = Segments(jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0]]), 4)
    assert segments.positions_BT[0, :6].tolist() == [0, 1, 2, 0, 1, 0]
    zeros_BTNH = jnp.zeros((1, 8, 1, 2))
    mask = np.asarray(attention_weights(zeros_BTNH, zeros_BTNH, segments.ids_BT))[0, 0, :6, :6] > 0
    ids = np.asarray([1, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(mask, np.tril(ids[:, None] == ids))
    assert segments.real.tolist() == [True, True, True, False]


@pytest.mark.parametrize("sizes", [(4, 1, 2), (1, 8, 1)])
def test_segments_on_a_mesh(tiny, rows, sizes) -> None:
    """Loss and gradients are those of one device: rows, parameters and heads split."""
    model, params = tiny
    batch = np.concatenate([rows[1]] * 8)[:8]
    config = ExperimentConfig(model=model, data=DataConfig(packing="packed", max_segments=K))
    gradient = jax.jit(jax.value_and_grad(functools.partial(loss_fn, config), has_aux=True))
    (loss, _), grads = gradient(params, None, batch)
    mesh = build_mesh(MeshConfig(*sizes))
    placed = place_params(model, params, mesh)
    split = jax.device_put(batch, batch_sharding(mesh, batch.shape))
    with mesh_scope(mesh):
        (loss_2, _), grads_2 = gradient(placed, None, split)
    assert len(split.sharding.device_set) == 8
    chex.assert_trees_all_close(loss_2, loss, rtol=1e-5)
    chex.assert_trees_all_close(grads_2, grads, rtol=0, atol=1e-5)
