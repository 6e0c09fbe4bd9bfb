"""The cache of prepared text: when an entry is read, made again, gone on with, and by whom."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest
from helpers import contents, finish, run_program
from sources import V, opened, sides, text_of

from pldr_jax.config import ConfigError
from pldr_jax.data.mixture import TrainingText
from pldr_jax.data.shards import cached, parallel
from pldr_jax.data.shards.prepared import read_prepared
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import cache_folder

pytest_plugins = ("sources",)
pytestmark = pytest.mark.usefixtures("cache_dir")


def entry_of(cache_dir: pathlib.Path) -> pathlib.Path:
    (entry,) = cache_dir.iterdir()
    return entry


def test_second_run_reads_the_cache(folder, monkeypatch) -> None:
    first, lines = opened(folder)
    assert any("trained a tokenizer" in line for line in lines)
    monkeypatch.setattr(Tokenizer, "train", None)
    again, lines = opened(folder)
    assert lines == []
    assert again.digest == first.digest
    assert again.tokenizer.digest == first.tokenizer.digest
    assert sides(again) == sides(first)


def test_same_text_elsewhere_has_the_same_entry(folder, cache_dir) -> None:
    first, _ = opened(folder)
    moved = folder.rename(folder.parent / "moved")
    again, lines = opened(moved)
    assert (again.digest, lines) == (first.digest, []) and entry_of(cache_dir)


def test_whatever_changes_the_tokens_changes_the_entry(folder, cache_dir) -> None:
    opened(folder)
    opened(folder, vocab_size=V + 1)
    opened(folder, validation_fraction=0.3)
    opened(folder, tokenizer_sample_bytes=10_000)
    (folder / "00.txt").write_text(text_of(0).replace("document", "documenT"))
    opened(folder)
    assert len(list(cache_dir.iterdir())) == 5
    (folder / "00.txt").rename(folder / "00.jsonl")  # read as something else
    opened(folder)
    assert len(list(cache_dir.iterdir())) == 6
    (folder / "02.txt").rename(folder / "02b.txt")  # the same texts in the same order
    assert opened(folder)[1] == []


def test_text_is_prepared_as_pldr_data_prepares_it(folder, cache_dir, tmp_path) -> None:
    """The same shards, byte for byte."""
    text, _ = opened(folder)
    text.tokenizer.save(tmp_path / "t.model")
    result = run_program(
        *("-m", "pldr_jax.data", "build", f"--input={folder}", f"--output={tmp_path / 'out'}"),
        *(f"--tokenizer={tmp_path / 't.model'}", "--documents=block"),
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = contents(entry_of(cache_dir)), contents(tmp_path / "out")
    assert len(ours) == 6 and ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["manifest.json"]
    assert opened(tmp_path / "out")[0].digest == text.digest


@pytest.mark.parametrize(
    "name",
    ["train-000000.array_record", "validation-000000.lengths", "tokenizer.model", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["cut", "removed", "one bit", "zeros"])
def test_damaged_entry_is_made_again(folder, cache_dir, name: str, damage: str) -> None:
    first, _ = opened(folder)
    expected = sides(first)
    file = entry_of(cache_dir) / name
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "one bit":
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    else:
        file.write_bytes(bytes(len(content)))
    again, lines = opened(folder)
    assert "damaged" in lines[0]
    assert sides(again) == expected and again.digest == first.digest
    assert opened(folder)[1] == []


def test_swapped_files_of_an_entry_are_noticed(folder, cache_dir) -> None:
    first, _ = opened(folder, validation_fraction=0.5)
    expected, entry = sides(first), entry_of(cache_dir)
    for ending in (".array_record", ".lengths"):
        names = [f"{split}-000000{ending}" for split in ("train", "validation")]
        old = [(entry / name).read_bytes() for name in names]
        for name, content in zip(names, reversed(old), strict=True):
            (entry / name).write_bytes(content)
    again, lines = opened(folder, validation_fraction=0.5)
    assert "damaged" in lines[0] and sides(again) == expected


def test_entry_with_another_tokenizer_is_made_again(folder, cache_dir) -> None:
    first, _ = opened(folder)
    other = Tokenizer.train([text_of(k) for k in range(50, 90)], V)
    other.save(entry_of(cache_dir) / "tokenizer.model")
    again, lines = opened(folder)
    assert "damaged" in lines[0]
    assert again.tokenizer.digest == first.tokenizer.digest


def test_interrupted_run_leaves_no_entry(folder, cache_dir, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(folder)
    assert list(cache_dir.iterdir()) == []
    assert opened(folder)[0].texts[0].train.n_tokens > 0


def test_interrupted_work_of_several_shards_goes_on(folder, cache_dir, monkeypatch) -> None:
    expected = sides(opened(folder)[0])
    shutil.rmtree(entry_of(cache_dir))
    write, done = parallel.write_unit, []

    def write_two(unit, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit.number)
        return write(unit, *rest)

    settings = cached._settings
    monkeypatch.setattr(
        cached, "_settings", lambda *a: dataclasses.replace(settings(*a), unit_bytes=10_000)
    )
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "write_unit", write_two)
        with pytest.raises(KeyboardInterrupt):
            opened(folder)
    assert entry_of(cache_dir).name.endswith(".building") and done == [0, 1]
    text, lines = opened(folder)
    assert any("continuing: 2 of" in line for line in lines)
    assert [sorted(side) for side in sides(text)] == [sorted(side) for side in expected]


def test_runs_that_start_together_agree(folder, cache_dir) -> None:
    results: list[TrainingText] = []
    threads = [threading.Thread(target=lambda: results.append(opened(folder)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({text.digest for text in results}) == 1
    assert read_prepared(entry_of(cache_dir)).vocab_size == V


def test_programs_that_start_together_prepare_it_once(folder, cache_dir) -> None:
    code = (
        "from pldr_jax.config import DataConfig\n"
        "from pldr_jax.data.mixture import open_training_text\n"
        f"open_training_text(DataConfig(source={str(folder)!r}), {V})"
    )
    programs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    ends = [finish(program) for program in programs]
    assert [end.returncode for end in ends] == [0, 0]
    assert sum("trained a tokenizer" in end.stdout for end in ends) == 1
    assert read_prepared(entry_of(cache_dir)).vocab_size == V


def test_cache_folder_that_cannot_be_made_is_named(folder) -> None:
    with pytest.raises(ConfigError, match=r"^Data\.cache_dir=.*00\.txt"):
        opened(folder, cache_dir=str(folder / "00.txt" / "cache"))


def test_cache_folder_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"
    assert cache_folder(None) == tmp_path / "cache"
    monkeypatch.delenv("PLDR_CACHE")
    assert cache_folder(None) == tmp_path / "xdg" / "pldr_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == pathlib.Path.home() / ".cache" / "pldr_jax"
