"""`Data.source` on raw text: which documents, on which side, and when they are prepared again."""

import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import venv

import numpy as np
import pytest
from helpers import contents, finish, run_program

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data.mixture import TrainingText, open_training_text
from pldr_jax.data.shards import cached, parallel
from pldr_jax.data.shards.prepared import ShardedTokens, read_prepared
from pldr_jax.data.shards.units import hash_of
from pldr_jax.data.text.inputs import STDLIB, find_inputs
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import cache_folder

WORDS = "def return self the of value list for in if else print range tokens model layer".split()
V = 300


def text_of(k: int, words: int = 200) -> str:
    rng = random.Random(k)
    return f"document {k}\n" + " ".join(rng.choices(WORDS, k=words)) + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("PLDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for k in range(40):
        path = root / ("sub" if k % 2 else "") / f"{k:02d}.txt"
        path.write_text(text_of(k), encoding="utf-8")
    return root


def opened(source: object, vocab_size: int = V, **settings) -> tuple[TrainingText, list[str]]:
    lines: list[str] = []
    config = DataConfig(source=str(source), **settings)
    return open_training_text(config, vocab_size, log=lines.append), lines


def texts_in(tokens: ShardedTokens, tokenizer: Tokenizer) -> list[str]:
    ids = tokens.read(0, tokens.n_tokens)
    assert ids[-1] == tokenizer.eos_id
    return [tokenizer.decode(part) for part in np.split(ids, np.cumsum(tokens.lengths)[:-1])]


def sides(text: TrainingText) -> tuple[list[str], list[str]]:
    """Texts of documents, trained on and held out."""
    (one,) = text.texts
    return texts_in(one.train, text.tokenizer), texts_in(one.validation, text.tokenizer)


def entry_of(cache: pathlib.Path) -> pathlib.Path:
    (entry,) = cache.iterdir()
    return entry


def test_tokens_give_back_every_document_once(folder) -> None:
    text, _ = opened(folder, validation_fraction=0.2)
    train, held = sides(text)
    assert sorted(train + held) == sorted(text_of(k) for k in range(40))
    assert set(held) == {text for text in train + held if hash_of(text) < 0.2}
    for tokens, texts in ((text.texts[0].train, train), (text.texts[0].validation, held)):
        assert tokens.n_documents == len(texts)
        assert tokens.n_bytes == sum(len(text.encode()) for text in texts)
        assert tokens.bytes_per_token == pytest.approx(tokens.n_bytes / tokens.n_tokens)
        assert tokens.read(0, 5).dtype == np.uint16


def test_a_document_stays_on_its_side_while_others_come_and_go(folder) -> None:
    """Whatever its name: the text alone decides."""
    held = set(sides(opened(folder, validation_fraction=0.3)[0])[1])
    for k in range(0, 40, 4):
        (folder / f"{k:02d}.txt").rename(folder / f"moved-{k}.txt")
    for k in range(1, 40, 4):
        (folder / "sub" / f"{k:02d}.txt").unlink()
    train, fewer = sides(opened(folder, validation_fraction=0.3)[0])
    assert 3 < len(fewer) < 20 and set(fewer) == held & {*train, *fewer}


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("fraction", [1e-6, 0.5])
def test_neither_side_is_empty(tmp_path, n: int, fraction: float) -> None:
    Tokenizer.train([text_of(k) for k in range(50, 90)], V).save(tmp_path / "t.model")
    for seed in range(3):
        root = tmp_path / f"{seed}"
        root.mkdir()
        for k in range(n):
            (root / f"{k}.txt").write_text(text_of(100 * seed + k, 20))
        settings = {"validation_fraction": fraction, "tokenizer": str(tmp_path / "t.model")}
        train, held = sides(opened(root, **settings)[0])
        assert len(train) + len(held) == n and train and held


def test_tokenizer_is_not_trained_on_held_out_text(folder) -> None:
    for path in folder.rglob("*.txt"):
        text = path.read_text() + "\u00e9" * 500
        if hash_of(text) < 0.1:
            path.write_text(text, encoding="utf-8")
    text, _ = opened(folder, validation_fraction=0.1)
    assert any("\u00e9" in one for one in sides(text)[1])
    assert len(text.tokenizer.encode("\u00e9")) == 2  # spelled in bytes


def test_tokenizer_sample_has_the_size_asked_for_and_spreads(folder, monkeypatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train

    def record(texts, vocab_size):
        seen[:] = texts
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", record)
    opened(folder)
    everything = sum(map(len, seen))
    opened(folder, tokenizer_sample_bytes=everything // 4)
    assert everything / 5 < sum(map(len, seen)) < everything / 3
    numbers = sorted(int(text.split()[1]) for text in seen)
    assert numbers[0] < 10 and numbers[-1] >= 30


def test_second_run_reads_the_cache(folder, monkeypatch) -> None:
    first, lines = opened(folder)
    assert any("trained a tokenizer" in line for line in lines)
    monkeypatch.setattr(Tokenizer, "train", None)
    again, lines = opened(folder)
    assert lines == []
    assert again.digest == first.digest
    assert again.tokenizer.digest == first.tokenizer.digest
    assert sides(again) == sides(first)


def test_same_text_elsewhere_has_the_same_entry(folder, cache) -> None:
    first, _ = opened(folder)
    moved = folder.rename(folder.parent / "moved")
    again, lines = opened(moved)
    assert (again.digest, lines) == (first.digest, []) and entry_of(cache)


def test_whatever_changes_the_tokens_changes_the_entry(folder, cache) -> None:
    opened(folder)
    opened(folder, vocab_size=V + 1)
    opened(folder, validation_fraction=0.3)
    opened(folder, tokenizer_sample_bytes=10_000)
    (folder / "00.txt").write_text(text_of(0).replace("document", "documenT"))
    opened(folder)
    assert len(list(cache.iterdir())) == 5
    (folder / "00.txt").rename(folder / "00.jsonl")  # read as something else
    opened(folder)
    assert len(list(cache.iterdir())) == 6
    (folder / "02.txt").rename(folder / "02b.txt")  # the same texts in the same order
    assert opened(folder)[1] == []


def test_text_is_prepared_as_pldr_data_prepares_it(folder, cache, tmp_path) -> None:
    """The same shards, byte for byte."""
    text, _ = opened(folder)
    text.tokenizer.save(tmp_path / "t.model")
    result = run_program(
        *("-m", "pldr_jax.data", "build", f"--input={folder}", f"--output={tmp_path / 'out'}"),
        *(f"--tokenizer={tmp_path / 't.model'}", "--documents=block"),
    )
    assert result.returncode == 0, result.stderr
    ours, theirs = contents(entry_of(cache)), contents(tmp_path / "out")
    assert len(ours) == 6 and ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == ["manifest.json"]
    assert opened(tmp_path / "out")[0].digest == text.digest


@pytest.mark.parametrize(
    "name",
    ["train-000000.array_record", "validation-000000.lengths", "tokenizer.model", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["cut", "removed", "one bit", "zeros"])
def test_damaged_entry_is_made_again(folder, cache, name: str, damage: str) -> None:
    first, _ = opened(folder)
    expected = sides(first)
    file = entry_of(cache) / name
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


def test_swapped_files_of_an_entry_are_noticed(folder, cache) -> None:
    first, _ = opened(folder, validation_fraction=0.5)
    expected, entry = sides(first), entry_of(cache)
    for ending in (".array_record", ".lengths"):
        names = [f"{split}-000000{ending}" for split in ("train", "validation")]
        old = [(entry / name).read_bytes() for name in names]
        for name, content in zip(names, reversed(old), strict=True):
            (entry / name).write_bytes(content)
    again, lines = opened(folder, validation_fraction=0.5)
    assert "damaged" in lines[0] and sides(again) == expected


def test_entry_with_another_tokenizer_is_made_again(folder, cache) -> None:
    first, _ = opened(folder)
    other = Tokenizer.train([text_of(k) for k in range(50, 90)], V)
    other.save(entry_of(cache) / "tokenizer.model")
    again, lines = opened(folder)
    assert "damaged" in lines[0]
    assert again.tokenizer.digest == first.tokenizer.digest


def test_interrupted_run_leaves_no_entry(folder, cache, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened(folder)
    assert list(cache.iterdir()) == []
    assert opened(folder)[0].texts[0].train.n_tokens > 0


def test_interrupted_work_of_several_shards_goes_on(folder, cache, monkeypatch) -> None:
    expected = sides(opened(folder)[0])
    shutil.rmtree(entry_of(cache))
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
    assert entry_of(cache).name.endswith(".building") and done == [0, 1]
    text, lines = opened(folder)
    assert any("continuing: 2 of" in line for line in lines)
    assert [sorted(side) for side in sides(text)] == [sorted(side) for side in expected]


def test_runs_that_start_together_agree(folder, cache) -> None:
    results: list[TrainingText] = []
    threads = [threading.Thread(target=lambda: results.append(opened(folder)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({text.digest for text in results}) == 1
    assert read_prepared(entry_of(cache)).vocab_size == V


def test_programs_that_start_together_prepare_it_once(folder, cache) -> None:
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
    assert read_prepared(entry_of(cache)).vocab_size == V


def test_loaded_tokenizer_is_used(folder, tmp_path) -> None:
    model = tmp_path / "own.model"
    own = Tokenizer.train([text_of(k) for k in range(50, 90)], V)
    own.save(model)
    text, lines = opened(folder, tokenizer=str(model))
    assert text.tokenizer.digest == own.digest
    assert not any("trained" in line for line in lines)
    with pytest.raises(
        ConfigError, match=rf"Model\.vocab_size = 301.*Data\.tokenizer.* {V} pieces"
    ):
        opened(folder, vocab_size=301, tokenizer=str(model))


@pytest.mark.parametrize("size", [3_000, 200_000, 5_000_000])
def test_single_file_is_cut_at_newlines(tmp_path, size: int) -> None:
    lines = [f"line {k} with \u00e9 and a newline\n" for k in range(size // 30)]
    path = tmp_path / "own.txt"
    path.write_text("".join(lines), encoding="utf-8")
    Tokenizer.train([text_of(k) for k in range(40)], V).save(tmp_path / "t.model")
    text, _ = opened(path, tokenizer=str(tmp_path / "t.model"))
    train, held = sides(text)
    assert sorted("".join(train + held).splitlines(True)) == sorted(lines)
    assert all(document.endswith("\n") for document in train + held)
    assert len(train + held) >= 8 and held
    assert max(map(len, train + held)) < 140_000


def test_bad_utf8_and_empty_documents_are_named_once(folder) -> None:
    (folder / "bad1.txt").write_bytes(b"caf\xe9\n" * 20)
    (folder / "bad2.txt").write_bytes(b"caf\xe9\n")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    text, lines = opened(folder)
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert {line.partition(", first")[0] for line in left_out} == {
        "left out: 2 not UTF-8",
        "left out: 1 not text: a NUL among the first bytes",
        "left out: 2 empty",
    }
    assert any(f"{folder}/bad1.txt" in line for line in left_out)
    assert sum(map(len, sides(text))) == 40


@pytest.mark.parametrize("source", ["missing", "missing/*.txt", "empty"])
def test_nothing_found_names_the_source(tmp_path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^Data\.source = .*no text files found") as raised:
        opened(tmp_path / source)
    assert "\n" not in str(raised.value)


def test_only_empty_files_say_what_was_left_out(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ConfigError, match=r"^Data\.source = .*0 document.*more text"):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_cannot_be_read_names_the_source(folder, monkeypatch, what: str) -> None:
    real_open, scandir = open, os.scandir

    def refuse_open(path, *rest, **more):
        if str(path).endswith("00.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *rest, **more)

    def refuse_scandir(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    if what == "file":
        monkeypatch.setattr("builtins.open", refuse_open)
    else:
        monkeypatch.setattr(os, "scandir", refuse_scandir)
    name = "00.txt" if what == "file" else "sub"
    with pytest.raises(ConfigError, match=rf"^Data\.source = .*{name}.*Permission denied"):
        opened(folder)


def test_one_tiny_document_cannot_be_split(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("one line")
    with pytest.raises(ConfigError, match=r"^Data\.source = .*1 document.*more text"):
        opened(tmp_path / "one.txt")


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


def test_stdlib_is_the_same_from_a_virtual_environment(tmp_path) -> None:
    pieces = find_inputs([STDLIB])
    paths = [piece.path for piece in pieces]
    assert any(path.endswith("/random.py") for path in paths)
    assert any(path.endswith("/json/decoder.py") for path in paths)
    left_out = {"test", "tests", "site-packages", "__pycache__"}
    root = os.path.commonpath(paths)
    assert not [p for p in paths if left_out & set(p.removeprefix(root).split("/"))]
    venv.create(tmp_path / "venv", with_pip=False)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path += {[*map(str, [pathlib.Path.cwd()]), *packages]!r}; "
        "assert sys.prefix != sys.base_prefix; "
        "from pldr_jax.data.text.inputs import find_inputs; "
        "print(*[piece.path for piece in find_inputs(['stdlib'])], sep='\\n')"
    )
    python = tmp_path / "venv" / "bin" / "python"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:-1] == paths
