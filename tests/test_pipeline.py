"""Batches of numbers: every row once an epoch, for any number of processes, resumable."""

import json
import pathlib
import pickle

import grain
import numpy as np
import pytest
from helpers import shard_of

from pldr_jax.config import ConfigError
from pldr_jax.data.pipeline import TrainIterator, _Shuffled, train_iterator, validation_rows
from pldr_jax.data.rows import TokenRows
from pldr_jax.data.shards.prepared import ShardedTokens

C, B, ROWS = 4, 8, 50


@pytest.fixture
def token_file(tmp_path) -> ShardedTokens:
    """Token k is the number k, so a row says where it comes from; 3 tokens fill no row."""
    return numbered(tmp_path, ROWS * C + 3)


def numbered(folder: pathlib.Path, n_tokens: int) -> ShardedTokens:
    return shard_of(folder / f"{n_tokens}", np.arange(n_tokens))


def at_row(row: int, text: str = "", seed: int = 0) -> dict[str, object]:
    """The state of an iterator that has taken so many rows."""
    return {"next_row": row, "text": text, "seed": seed}


def take(iterator: TrainIterator, n: int) -> np.ndarray:
    return np.stack([next(iterator) for _ in range(n)])


def batches(token_file: ShardedTokens, n: int, seed: int = 0, process=(0, 1)) -> np.ndarray:
    with train_iterator([TokenRows(token_file, C)], B, seed, process) as iterator:
        return take(iterator, n)


def row_numbers(batch: np.ndarray) -> np.ndarray:
    """Row k is [4k, 4k+1, 4k+2, 4k+3]; gives k, having checked that rows are whole."""
    rows = batch.reshape(-1, C)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(C))
    assert not (rows[:, 0] % C).any()
    return rows[:, 0] // C


def test_rows_are_windows_of_the_file(token_file) -> None:
    rows = TokenRows(token_file, C)
    assert len(rows) == ROWS
    np.testing.assert_array_equal(rows[7], [28, 29, 30, 31])
    assert rows[7].dtype == np.int32
    assert rows[np.int64(ROWS - 1)].tolist() == [196, 197, 198, 199]
    for k in (ROWS, -1):
        with pytest.raises(IndexError):
            rows[k]


def test_rows_pickle_by_path(tmp_path) -> None:
    rows = TokenRows(numbered(tmp_path, 60_000), C)
    data = pickle.dumps(rows)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[9], rows[9])


def test_every_row_once_in_an_epoch_and_epochs_differ(token_file) -> None:
    n_epochs = 3
    stream = row_numbers(batches(token_file, -(-n_epochs * ROWS // B)))
    epochs = stream[: n_epochs * ROWS].reshape(n_epochs, ROWS)
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len({tuple(epoch) for epoch in epochs}) == n_epochs
    assert (epochs[0] != np.arange(ROWS)).any()


def test_batches_are_int32_of_the_size_asked_for(token_file) -> None:
    batch = batches(token_file, 1)[0]
    assert batch.shape == (B, C) and batch.dtype == np.int32


def test_equal_seeds_agree_and_others_differ(token_file) -> None:
    np.testing.assert_array_equal(batches(token_file, 5), batches(token_file, 5))
    assert (batches(token_file, 5, seed=0) != batches(token_file, 5, seed=1)).any()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch(token_file, processes: int) -> None:
    n = 20  # over three epochs
    whole = batches(token_file, n)
    parts = [batches(token_file, n, process=(p, processes)) for p in range(processes)]
    assert all(part.shape == (n, B // processes, C) for part in parts)
    for k in range(n):
        together = np.concatenate([row_numbers(part[k]) for part in parts])
        assert sorted(together) == sorted(row_numbers(whole[k]))


@pytest.mark.parametrize("taken", [0, 1, 6, 7, 20])
def test_resumed_stream_equals_the_uninterrupted_one(token_file, taken: int) -> None:
    expected = batches(token_file, taken + 10)
    with train_iterator([TokenRows(token_file, C)], B, 0) as first:
        for _ in range(taken):
            next(first)
        state = json.loads(json.dumps(first.state))
    assert state == {"next_row": taken * B, "text": "", "seed": 0}
    with train_iterator([TokenRows(token_file, C)], B, 0) as second:
        next(second)  # whatever was read ahead must be dropped
        second.state = state
        assert second.state == state
        np.testing.assert_array_equal(take(second, 10), expected[taken:])


def test_worker_processes_give_the_same_stream_from_any_position(token_file) -> None:
    expected = batches(token_file, 9)
    with train_iterator([TokenRows(token_file, C)], B, 0, workers=2) as iterator:
        np.testing.assert_array_equal(take(iterator, 3), expected[:3])
        iterator.state = at_row(5 * B)
        np.testing.assert_array_equal(take(iterator, 4), expected[5:])
        assert iterator.state == at_row(9 * B)


def test_state_moves_to_another_number_of_processes(token_file) -> None:
    expected = batches(token_file, 9)[5:]
    parts = []
    for p in range(2):
        with train_iterator([TokenRows(token_file, C)], B, 0, (p, 2)) as iterator:
            iterator.state = at_row(5 * B)
            parts.append(take(iterator, 4))
    for k in range(4):
        together = np.concatenate([row_numbers(part[k]) for part in parts])
        assert sorted(together) == sorted(row_numbers(expected[k]))


@pytest.mark.parametrize("state", [{}, {"next_row": -1}, {"next_row": "5"}])
def test_bad_state_is_refused(token_file, state) -> None:
    with (
        train_iterator([TokenRows(token_file, C)], B, 0) as iterator,
        pytest.raises(ValueError, match="state"),
    ):
        iterator.state = state


def test_closed_iterator_gives_nothing(token_file) -> None:
    iterator = train_iterator([TokenRows(token_file, C)], B, 0)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_less_text_than_a_batch_is_a_one_line_error(tmp_path) -> None:
    assert batches(numbered(tmp_path, B * C), 1).shape == (1, B, C)
    with pytest.raises(ConfigError, match=r"^Data\.batch_size = 8: .*Data\.source.* 7 rows") as e:
        train_iterator([TokenRows(numbered(tmp_path, B * C - 1), C)], B, 0)
    assert "\n" not in str(e.value)


def test_processes_must_divide_the_batch(token_file) -> None:
    with pytest.raises(ConfigError, match=r"^Data\.batch_size = 8: .*3 processes"):
        train_iterator([TokenRows(token_file, C)], B, 0, (0, 3))


def test_validation_rows_spread_and_never_overlap_calibration(token_file) -> None:
    chosen = validation_rows([TokenRows(token_file, C)], 20, calibration_rows=10)
    rows, calibration = row_numbers(chosen.rows_BC), row_numbers(chosen.calibration_BC)
    assert (len(rows), len(calibration)) == (20, 10)
    assert len({*rows, *calibration}) == 30
    assert rows.min() < ROWS // 4 and rows.max() >= ROWS - ROWS // 4
    assert chosen.rows_BC.dtype == np.int32


def test_validation_rows_are_repeatable_and_nested(token_file) -> None:
    few, more = (validation_rows([TokenRows(token_file, C)], n) for n in (5, 20))
    np.testing.assert_array_equal(few.rows_BC, more.rows_BC[:5])
    np.testing.assert_array_equal(few.calibration_BC, more.calibration_BC)
    other = validation_rows([TokenRows(token_file, C)], 20, seed=1)
    assert (other.rows_BC != more.rows_BC).any()


@pytest.mark.parametrize("rows", [0, 1000])
def test_all_validation_rows(token_file, rows: int) -> None:
    chosen = validation_rows([TokenRows(token_file, C)], rows, calibration_rows=10)
    both = [*row_numbers(chosen.rows_BC), *row_numbers(chosen.calibration_BC)]
    assert sorted(both) == list(range(ROWS))
    assert len(chosen.calibration_BC) == 10


def test_no_calibration_rows(token_file) -> None:
    chosen = validation_rows([TokenRows(token_file, C)], 0, calibration_rows=0)
    assert chosen.calibration_BC.shape == (0, C) and chosen.rows_BC.shape == (ROWS, C)


def test_short_held_out_text(tmp_path) -> None:
    chosen = validation_rows([TokenRows(numbered(tmp_path, 2 * C), C)], 0)
    assert (len(chosen.rows_BC), len(chosen.calibration_BC)) == (1, 1)
    with pytest.raises(ConfigError, match=r"^Data\.source: .*only 1 rows.*validation_fraction"):
        validation_rows([TokenRows(numbered(tmp_path, 2 * C - 1), C)], 0)


def test_the_stream_is_the_one_it_always_was(token_file) -> None:
    """The default run must not change: these numbers were taken before there were packings."""
    first = row_numbers(batches(token_file, 2)).reshape(2, B)
    assert first.tolist() == [[21, 37, 31, 14, 9, 46, 28, 6], [24, 41, 36, 15, 23, 38, 5, 4]]
    part = row_numbers(batches(token_file, 2, seed=3, process=(1, 2))).reshape(2, B // 2)
    assert part.tolist() == [[30, 7, 3, 19], [0, 23, 49, 41]]
    held_out = validation_rows([TokenRows(token_file, C)], 5)
    assert row_numbers(held_out.rows_BC).tolist() == [47, 22, 10, 45, 30]


@pytest.mark.parametrize("epochs", [None, 3])
def test_numbers_are_shuffled_as_grain_shuffles_them(epochs: int | None) -> None:
    ours = _Shuffled(100, 137, 2**31 + 5, epochs)
    its_own = grain.MapDataset.range(100, 137).seed(2**31 + 5).shuffle().repeat(epochs)
    assert len(ours) == len(its_own)
    assert [ours[k] for k in range(3 * 37)] == [its_own[k] for k in range(3 * 37)]
    assert [ours[5::2][k] for k in range(50)] == [its_own[5::2][k] for k in range(50)]


@pytest.fixture
def two(tmp_path, token_file) -> list[TokenRows]:
    """Two texts of 50 and 20 rows; the second's numbers start at 1000."""
    second = shard_of(tmp_path / "second", np.arange(1000, 1000 + 20 * C))
    return [TokenRows(token_file, C), TokenRows(second, C)]


def mixed(two: list[TokenRows], n: int, process=(0, 1), **settings) -> np.ndarray:
    with train_iterator(two, B, 0, process, weights=(0.75, 0.25), **settings) as iterator:
        return take(iterator, n)


def test_a_mixture_has_its_shares_and_every_row_once_an_epoch(two) -> None:
    stream = row_numbers(mixed(two, 40))
    second = stream >= 250
    assert second.mean() == 0.25
    for k in range(0, len(stream), 40):
        assert second[k : k + 40].sum() == 10  # evenly spread
    for rows, size, offset in ((stream[~second], ROWS, 0), (stream[second], 20, 250)):
        for k in range(len(rows) // size):
            epoch = sorted(rows[k * size : (k + 1) * size])
            assert epoch == list(range(offset, offset + size))


def test_the_stream_of_a_mixture_is_the_one_it_always_was(two) -> None:
    """Taken when Grain carried the rows themselves, and not their numbers."""
    assert row_numbers(mixed(two, 2)).reshape(2, B).tolist() == [
        [21, 37, 31, 260, 14, 9, 46, 255],
        [28, 6, 24, 257, 41, 36, 15, 253],
    ]


def test_a_mixture_is_shared_and_resumed_like_one_text(two) -> None:
    whole = mixed(two, 12)
    parts = [mixed(two, 12, process=(p, 2)) for p in range(2)]
    for k in range(12):
        together = np.concatenate([row_numbers(part[k]) for part in parts])
        assert sorted(together) == sorted(row_numbers(whole[k]))
    with train_iterator(two, B, 0, weights=(0.75, 0.25), digest="d") as iterator:
        iterator.state = at_row(5 * B, text="d")
        np.testing.assert_array_equal(take(iterator, 7), whole[5:])
        assert iterator.state == at_row(12 * B, text="d")
        with pytest.raises(ConfigError, match="not the text"):
            iterator.state = at_row(5 * B, text="other")


def test_epochs_end_the_stream(token_file) -> None:
    with train_iterator([TokenRows(token_file, C)], B, 0, epochs=2) as iterator:
        rows = row_numbers(np.stack(list(iterator)))
        assert len(rows) // B == 2 * ROWS // B and iterator.batches_left == 0
    assert np.bincount(rows).max() == 2


def test_held_out_rows_of_a_mixture_by_weight(two) -> None:
    chosen = validation_rows(two, 12, 4, weights=(0.75, 0.25))
    rows = row_numbers(chosen.rows_BC)
    assert (rows >= 250).sum() == 3 and len(rows) == 12
    assert len(chosen.calibration_BC) == 4 and row_numbers(chosen.calibration_BC).max() < 250


@pytest.mark.parametrize("then", [1, 3, 16, 25])
@pytest.mark.parametrize("taken", [1, 4])
def test_another_batch_size_gives_every_row_of_the_epoch_once(token_file, taken, then) -> None:
    rows = [TokenRows(token_file, C)]
    with train_iterator(rows, B, 0) as first:
        before = take(first, taken)
        state = json.loads(json.dumps(first.state))
    with train_iterator(rows, then, 0) as second:
        second.state = state
        after = take(second, -(-2 * ROWS // then))
    stream = np.concatenate([row_numbers(before), row_numbers(after)])
    expected = row_numbers(batches(token_file, 2 * ROWS // B + 1))
    np.testing.assert_array_equal(stream[: 2 * ROWS], expected[: 2 * ROWS])
    assert sorted(stream[:ROWS]) == sorted(stream[ROWS : 2 * ROWS]) == list(range(ROWS))


def test_another_batch_size_and_other_processes_end_the_epochs_together(token_file) -> None:
    rows, parts = [TokenRows(token_file, C)], []
    for p in range(2):
        with train_iterator(rows, 4, 0, (p, 2), epochs=2) as iterator:
            iterator.state = at_row(3 * B)
            assert iterator.batches_left == (2 * ROWS - 3 * B) // 4 == 19
            parts.append(row_numbers(np.stack(list(iterator))))
            assert iterator.batches_left == 0
    with train_iterator(rows, B, 0) as whole:
        before = row_numbers(take(whole, 3))
    assert [len(part) for part in parts] == [38, 38]
    assert np.bincount(np.concatenate([before, *parts])).tolist() == [2] * ROWS


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"next_row": 8, "text": "other", "seed": 0}, r"^Data\.source.*not the text.*--init_from"),
        ({"next_row": 8, "text": "", "seed": 1}, r"^Data\.seed = 0: the run has 1.*--init_from"),
        ({"next_row": 8}, r"^Data\.source.*not the text"),
        ({"next_index": 8}, r"^--run_dir: .*held out other documents.*--init_from"),
    ],
)
def test_a_position_in_another_stream_is_refused(token_file, state, message: str) -> None:
    with (
        train_iterator([TokenRows(token_file, C)], B, 0) as iterator,
        pytest.raises(ConfigError, match=message) as error,
    ):
        iterator.state = state
    assert "\n" not in str(error.value)


def test_a_stated_order_is_followed_once_and_kept(token_file, tmp_path) -> None:
    """Also from its middle; another order, or none, is refused there."""
    path = str(tmp_path / "order.npy")
    order = np.random.default_rng(5).permutation(ROWS)[: 4 * B]
    np.save(path, order)
    rows = [TokenRows(token_file, C)]
    with train_iterator(rows, B, 0, order=path) as iterator:
        assert iterator.batches_left == 4
        np.testing.assert_array_equal(row_numbers(take(iterator, 2)), order[: 2 * B])
        state = iterator.state
    with train_iterator(rows, B, 0, order=path) as iterator:
        iterator.state = state
        np.testing.assert_array_equal(row_numbers(take(iterator, 2)), order[2 * B :])
        assert iterator.batches_left == 0
    with train_iterator(rows, B, 0, order=path, epochs=2) as iterator:
        np.testing.assert_array_equal(row_numbers(take(iterator, 8)), np.tile(order, 2))
    np.save(path, order[::-1])
    for other in (path, None):
        with train_iterator(rows, B, 0, order=other) as iterator:
            with pytest.raises(ConfigError, match="Data.order: not the order"):
                iterator.state = state


@pytest.mark.parametrize(
    "numbers,message",
    [
        ([*range(ROWS), 3], f"place {ROWS} has row 3 again"),
        ([0, 1, 2, ROWS], f"place 3 has {ROWS}; the text has rows 0 to {ROWS - 1}"),
        ([0, -1, 2, 3], "place 1 has -1"),
        ([0.0] * ROWS, "one axis of integers"),
        ([0], "has 1 rows, fewer than Data.batch_size"),
        (None, "no npy file"),
    ],
)
def test_an_order_that_cannot_be_is_one_line(token_file, tmp_path, numbers, message) -> None:
    path = tmp_path / "order.npy"
    path.write_text("1 2 3")
    if numbers is not None:
        np.save(path, np.asarray(numbers))
    with pytest.raises(ConfigError, match=message) as caught:
        train_iterator([TokenRows(token_file, C)], 4, 0, order=str(path))
    assert str(caught.value).startswith("Data.order = ") and "\n" not in str(caught.value)
