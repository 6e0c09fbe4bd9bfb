"""Shards: any range of their tokens, records that are kept, damaged or in the place of others."""

import concurrent.futures
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import contents

from pldr_jax.data.shards import records as shards
from pldr_jax.data.shards.records import (
    KEPT_RECORDS,
    RECORD_TOKENS,
    DataError,
    ShardWriter,
    read_lengths,
    read_tokens,
)


def read(folder: Path, dtype: str, start: int, stop: int) -> np.ndarray:
    """Tokens of the shard "a" of a folder."""
    return read_tokens(f"{folder}/a.array_record", np.dtype(dtype), start, stop)


def test_shards_give_any_range_of_their_tokens(tmp_path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60_000, n) for n in (5, 3 * RECORD_TOKENS, 1, 40_000, 200_000)]
    writer = ShardWriter(tmp_path, "a", "uint16")
    for tokens in documents:
        writer.add(tokens, np.asarray([len(tokens)]), 1)
    shard, whole = writer.close(), np.concatenate(documents)
    np.testing.assert_array_equal(read_lengths(tmp_path, shard), [len(d) for d in documents])
    for start, stop in [(0, len(whole)), (3, 4), (8190, 8195), (len(whole) - 1, len(whole))]:
        np.testing.assert_array_equal(read(tmp_path, "uint16", start, stop), whole[start:stop])
    assert {path.name for path in tmp_path.iterdir()} == {"a.array_record", "a.lengths"}


def test_a_shard_is_the_same_however_documents_come_to_it(tmp_path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4_000, 200)
    whole, ends = rng.integers(0, 60_000, lengths.sum()), np.cumsum(lengths)
    for name, steps in (("one", [200]), ("few", [3, 100, 200]), ("each", range(1, 201))):
        (tmp_path / name).mkdir()
        writer, done = ShardWriter(tmp_path / name, "a", "uint16"), 0
        for k in steps:
            start = ends[done - 1] if done else 0
            writer.add(whole[start : ends[k - 1]], lengths[done:k], 7 * (k - done))
            done = k
        assert writer.close().n_bytes == 7 * 200
    files = contents(tmp_path)
    for ending in (".array_record", ".lengths"):
        one, few, each = (files[f"{name}/a{ending}"] for name in ("one", "few", "each"))
        assert one == few == each


def test_records_are_kept_up_to_a_bound(tmp_path, monkeypatch) -> None:
    """A record is decompressed once; of more than are kept, the ones used last."""
    n, reader, opened = KEPT_RECORDS + 20, shards._reader, []
    writer = ShardWriter(tmp_path, "a", "uint32")
    tokens = np.repeat(np.arange(n), RECORD_TOKENS)
    writer.add(tokens, np.asarray([len(tokens)]), 1)
    writer.close()
    del tokens, writer
    monkeypatch.setattr(shards, "_reader", lambda path: opened.append(path) or reader(path))

    def check(k: int) -> None:
        start, stop = k * RECORD_TOKENS, (k + 1) * RECORD_TOKENS
        found = read(tmp_path, "uint32", start + 5, stop)
        assert found[0] == found[-1] == k

    shards._record.cache_clear()
    tracemalloc.start()
    for k in range(n):
        check(k)
    here = tracemalloc.Filter(True, shards.__file__)
    held = tracemalloc.take_snapshot().filter_traces([here]).statistics("filename")[0].size
    tracemalloc.stop()
    assert 32e6 < held < 37e6  # as KEPT_RECORDS says
    assert len(opened) == n
    for k, reads in ((n - 1, 0), (n - KEPT_RECORDS, 0), (0, 1), (0, 0), (n - KEPT_RECORDS + 1, 1)):
        opened.clear()
        check(k)
        assert len(opened) == reads
    shards._record.cache_clear()


def test_threads_read_the_same_tokens(tmp_path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 60_000, 50 * RECORD_TOKENS + 7)
    writer = ShardWriter(tmp_path, "a", "uint16")
    writer.add(whole, np.asarray([len(whole)]), 1)
    writer.close()

    def reads(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(whole) - 5_000, 300)
        return all(
            (read(tmp_path, "uint16", k, k + 5_000) == whole[k : k + 5_000]).all() for k in starts
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(8)))


@pytest.mark.parametrize("damage", ["flip", "checksum"])
def test_a_corrupted_record_is_named_with_its_file(tmp_path, damage, monkeypatch) -> None:
    writer = ShardWriter(tmp_path, "a", "uint16")
    tokens = np.random.default_rng(0).integers(0, 60_000, 10 * RECORD_TOKENS)
    if damage == "checksum":  # damaged before it came to the library, which then knows nothing
        monkeypatch.setattr("pldr_jax.data.shards.records._checksum", lambda *_: 0)
    writer.add(tokens, np.asarray([len(tokens)]), 1)
    writer.close()
    monkeypatch.undo()
    path = tmp_path / "a.array_record"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[20_000] ^= 1
        path.write_bytes(content)
    for _ in range(2):  # what was read is kept, what is damaged is not
        bad = []
        for k in range(10):
            try:
                read(tmp_path, "uint16", k * RECORD_TOKENS, (k + 1) * RECORD_TOKENS)
            except DataError as error:
                assert str(error).startswith(f"{path}: record {k}: ") and "\n" not in str(error)
                bad.append(k)
        assert len(bad) == (1 if damage == "flip" else 10)


def test_a_record_in_the_place_of_another_is_noticed(tmp_path) -> None:
    """A shard under another's name: every record is whole, and none of this shard."""
    tokens = np.random.default_rng(0).integers(0, 60_000, RECORD_TOKENS)
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path, name, "uint16")
        writer.add(tokens, np.asarray([len(tokens)]), 1)
        writer.close()
    shutil.copy(tmp_path / "b.array_record", tmp_path / "a.array_record")
    with pytest.raises(DataError, match=r"a\.array_record: record 0: is damaged"):
        read(tmp_path, "uint16", 0, 5)
