"""Packing: every token once, whatever the documents; rows hold what their packing says."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import shard_of

from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig
from pldr_jax.data.rows import (
    INPUTS,
    PAD_ID,
    SEGMENTS,
    TARGETS,
    SegmentRows,
    TokenRows,
    blank_rows,
    filled_share,
    join_rows,
    make_rows,
    pack_segments,
    stack_rows,
)
from pldr_jax.data.shards.prepared import ShardedTokens
from pldr_jax.training.losses import token_loss
from pldr_jax.training.rows import inputs_of, targets_of

EOS = 3


def store(folder, lengths: np.ndarray) -> ShardedTokens:
    """Documents of these lengths: every token a number of its own, but for the end piece."""
    tokens = np.arange(10, 10 + lengths.sum(), dtype=np.uint32)
    tokens[np.cumsum(lengths) - 1] = EOS
    return shard_of(folder, tokens, lengths)


def all_rows(rows) -> np.ndarray:
    return np.stack([rows[k] for k in range(len(rows))])


@pytest.mark.parametrize("seed", range(12))
def test_every_token_is_an_input_and_a_target_once(tmp_path, seed: int) -> None:
    """Random documents, context lengths and numbers of segments."""
    rng = np.random.default_rng(seed)
    context, segments = int(rng.integers(2, 40)), int(rng.integers(1, 9))
    mean = rng.choice([3, 20, 200])
    tokens = store(tmp_path, 1 + rng.geometric(1 / mean, size=int(rng.integers(1, 200))))
    rows = SegmentRows(tokens, context, segments)
    packed = all_rows(rows)
    assert packed.shape == (len(rows), 3, context - 1) and packed.dtype == np.int32

    whole = tokens.read(0, tokens.n_tokens)
    ends = np.cumsum(tokens.lengths)
    is_input, is_target = np.ones(len(whole), bool), np.ones(len(whole), bool)
    is_input[ends - 1] = False
    is_target[ends - tokens.lengths] = False
    real = packed[:, SEGMENTS] > 0
    inputs, targets = packed[:, INPUTS][real], packed[:, TARGETS][real]
    assert sorted(inputs) == sorted(whole[is_input])
    assert sorted(targets) == sorted(whole[is_target])
    assert rows.n_targets == real.sum()
    assert filled_share(rows) == pytest.approx(real.mean())
    assert not packed[:, :, :][np.broadcast_to(~real[:, None], packed.shape)].any()

    following = dict(zip(whole[:-1], whole[1:], strict=True))
    assert all(following[i] == t for i, t in zip(inputs, targets, strict=True))
    document = dict(
        zip(whole[is_input], np.repeat(np.arange(len(ends)), tokens.lengths - 1), strict=True)
    )
    for row in packed:
        numbers = row[SEGMENTS][row[SEGMENTS] > 0]
        # segments 1, 2, ... side by side, then padding; each holds neighbours of one document
        assert (row[SEGMENTS][: len(numbers)] > 0).all() and numbers[0] == 1
        assert set(np.diff(numbers)) <= {0, 1} and numbers[-1] <= segments
        for number in set(numbers):
            piece = row[INPUTS][row[SEGMENTS] == number]
            assert (np.diff(piece.astype(np.int64)) == 1).all()
            assert len({document[token] for token in piece}) == 1


@pytest.mark.parametrize("seed", range(4))
def test_packing_wastes_little(seed: int) -> None:
    """Without a limit to the segments, there are hardly more rows than the tokens need."""
    rng = np.random.default_rng(seed)
    counts = np.bincount(rng.geometric(1 / 30, 5000).clip(1, 126), minlength=127)
    total = int((counts * np.arange(127)).sum())
    shapes = pack_segments(counts, 127, 127)
    rows = sum(shape.count for shape in shapes)
    assert sum(shape.count * sum(shape.lengths) for shape in shapes) == total
    assert rows <= 1.01 * total / 127 + 1
    few = pack_segments(counts, 127, 2)
    assert max(len(shape.lengths) for shape in few) == 2
    assert len(few) < 1000  # shapes, not rows: the work does not grow with the documents


@pytest.mark.parametrize("mean,segments", [(130, 3), (130, 4), (60, 6), (60, 9), (100, 5)])
def test_rows_are_few_where_places_are_scarce(mean: int, segments: int) -> None:
    """Hardly more than tokens and segments need: long documents share their rows with short ones.
    By best fit the short ones are left to themselves at last, and it is 15% to 32% more rows.
    """
    rng = np.random.default_rng(0)
    counts = np.bincount(rng.geometric(1 / mean, 20_000).clip(1, 510), minlength=511)
    shapes = pack_segments(counts, 511, segments)
    assert sum(shape.count * len(shape.lengths) for shape in shapes) == counts.sum()
    assert max(len(shape.lengths) for shape in shapes) == segments
    needed = max(int((counts * np.arange(511)).sum()) / 511, counts.sum() / segments)
    assert sum(shape.count for shape in shapes) <= 1.06 * needed


def test_a_document_a_row_and_long_ones_in_pieces(tmp_path) -> None:
    tokens = store(tmp_path, np.asarray([3, 9, 2, 5]))
    rows = make_rows(tokens, 5, DataConfig(packing="document"))
    assert rows.max_segments == 1
    found = {tuple(row[INPUTS][row[SEGMENTS] > 0]) for row in all_rows(rows)}
    assert found == {(10, 11), (13, 14, 15, 16), (17, 18, 19, 20), (22,), (24, 25, 26, 27)}
    targets = {tuple(row[TARGETS][row[SEGMENTS] > 0]) for row in all_rows(rows)}
    assert (18, 19, 20, EOS) in targets and (11, EOS) in targets


def test_the_three_packings_by_name(tmp_path) -> None:
    tokens = store(tmp_path, np.asarray([3, 2, 3, 4]))
    pack = make_rows(tokens, 5, DataConfig())
    np.testing.assert_array_equal(all_rows(pack), [[10, 11, 3, 13, 3], [15, 16, 3, 18, 19]])
    segment = make_rows(tokens, 5, DataConfig(packing="packed", max_segments=4))
    # inputs of 3, 2, 2 and 1 tokens: 3 + 1 and 2 + 2
    assert sorted(all_rows(segment)[:, SEGMENTS].tolist()) == [[1, 1, 1, 2], [1, 1, 2, 2]]
    assert make_rows(tokens, 5, DataConfig(packing="document", max_segments=4)).max_segments == 1
    with pytest.raises(ConfigError, match=r"^Data\.packing = 'best_fit': is not one of"):
        DataConfig(packing="best_fit")  # type: ignore[arg-type]


def test_the_fused_kernel_knows_no_segments() -> None:
    model = ModelConfig(dtype="bfloat16", attention_kernel="cudnn")
    ExperimentConfig(model=model, data=DataConfig(packing="document"))
    with pytest.raises(ConfigError, match=r"^Model\.attention_kernel = 'cudnn': .*no segments"):
        ExperimentConfig(model=model, data=DataConfig(packing="packed"))


@pytest.mark.parametrize("packing", ["concat", "document", "packed"])
def test_every_id_can_be_a_target(tmp_path, packing: str) -> None:
    """An end piece of id 0, as some tokenizers have it, is learnt like any other token."""
    tokens = np.asarray([5, 6, 0, 7, 0, 8, 9, 4, 0])
    store = shard_of(tmp_path, tokens, np.asarray([3, 2, 4]))
    rows = make_rows(store, 5, DataConfig(packing=packing, max_segments=2))  # type: ignore[arg-type]
    batch = jnp.asarray(stack_rows(rows, range(len(rows))))
    filled = jnp.concatenate([batch, blank_rows(3, rows.row_shape)])
    targets = np.asarray(targets_of(filled))
    assert (targets != PAD_ID).sum() == rows.n_targets
    assert (targets == 0).sum() == (2 if packing == "concat" else 3)
    logits = jax.nn.one_hot(targets, 10) * 50
    loss = token_loss(logits, jnp.asarray(targets))
    assert float(loss.count) == rows.n_targets and float(loss.accuracy) == 1
    assert int(inputs_of(filled).min()) >= 0


@pytest.mark.parametrize("packing", ["concat", "document", "packed"])
def test_many_rows_at_once_are_the_single_ones(tmp_path, packing: str) -> None:
    rng = np.random.default_rng(0)
    tokens = store(tmp_path, 1 + rng.geometric(1 / 20, 300))
    rows = make_rows(tokens, 12, DataConfig(packing=packing, max_segments=3))  # type: ignore[arg-type]
    for many in (rows, join_rows([rows, rows])):
        numbers = rng.integers(0, len(many), 200)
        found = stack_rows(many, numbers)
        assert found.dtype == np.int32 and found.shape == (200, *rows.row_shape)
        np.testing.assert_array_equal(found, np.stack([many[k] for k in numbers]))
        for k in (-1, len(many)):
            with pytest.raises(IndexError):
                stack_rows(many, [0, k])
    assert stack_rows(rows, []).shape == (0, *rows.row_shape)


def test_rows_pickle_by_path_and_join(tmp_path) -> None:
    tokens = store(tmp_path, np.full(9000, 7))
    rows = SegmentRows(tokens, 16, 3)
    data = pickle.dumps(rows)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[40], rows[40])
    both = join_rows([rows, rows])
    assert len(both) == 2 * len(rows)
    np.testing.assert_array_equal(both[len(rows) + 3], rows[3])
    assert isinstance(join_rows([TokenRows(tokens, 16)]), TokenRows)
    for k in (-1, len(rows)):
        with pytest.raises(IndexError):
            rows[k]
