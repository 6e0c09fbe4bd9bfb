"""Sources, split and cache: which documents, on which side, and when they are read again."""

import dataclasses
import pathlib
import random
import subprocess
import sys
import threading
import venv

import numpy as np
import pytest

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data.cache import new_entry
from pldr_jax.data.corpus import Corpus, TokenFile, prepare
from pldr_jax.data.text import sources
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


def prepared(source: object, vocab_size: int = V, **settings) -> tuple[Corpus, list[str]]:
    lines: list[str] = []
    config = DataConfig(source=str(source), **settings)
    return prepare(config, vocab_size, log=lines.append), lines


def texts_in(token_file: TokenFile, tokenizer: Tokenizer) -> list[str]:
    ids = np.asarray(token_file.tokens)
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(part) for part in np.split(ids, ends[:-1] + 1)]


def test_tokens_give_back_every_document_once(folder) -> None:
    corpus, _ = prepared(folder, validation_fraction=0.2)
    train, held = (texts_in(f, corpus.tokenizer) for f in (corpus.train, corpus.validation))
    assert sorted(train + held) == sorted(text_of(k) for k in range(40))
    assert not set(train) & set(held)
    names = [file.name for file in sources.open_source(str(folder)).files]
    held_names = sources.held_out(names, 0.2)
    assert sorted(held) == sorted((folder / name).read_text() for name in held_names)
    for file, texts in ((corpus.train, train), (corpus.validation, held)):
        assert file.n_documents == len(texts)
        assert file.n_bytes == sum(len(text.encode()) for text in texts)
        assert file.bytes_per_token == pytest.approx(file.n_bytes / len(file.tokens))
        assert file.tokens.dtype == np.uint16


def test_split_of_a_document_does_not_depend_on_the_others() -> None:
    names = [f"{k}.txt" for k in range(1000)]
    held = sources.held_out(names, 0.1)
    assert 60 < len(held) < 140
    assert sources.held_out(names[::2], 0.1) == held & set(names[::2])
    assert sources.held_out(names[::-1], 0.1) == held


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("fraction", [1e-6, 0.5])
def test_neither_side_is_empty(n: int, fraction: float) -> None:
    for seed in range(20):
        held = sources.held_out([f"{seed}-{k}" for k in range(n)], fraction)
        assert 1 <= len(held) < n


def test_tokenizer_is_not_trained_on_held_out_text(folder) -> None:
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")]
    held = sources.held_out(names, 0.1)
    for name in held:
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\u00e9" * 500)
    corpus, _ = prepared(folder, validation_fraction=0.1)
    assert len(corpus.tokenizer.encode("\u00e9")) == 2  # spelled in bytes


def test_tokenizer_sample_has_the_size_asked_for_and_spreads(folder, monkeypatch) -> None:
    seen: list[str] = []
    train = Tokenizer.train

    def record(texts, vocab_size):
        seen[:] = texts
        return train(seen, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", record)
    prepared(folder)
    everything = sum(map(len, seen))
    prepared(folder, tokenizer_sample_bytes=everything // 4)
    assert everything / 5 < sum(map(len, seen)) < everything / 3
    numbers = sorted(int(text.split()[1]) for text in seen)
    assert numbers[0] < 10 and numbers[-1] >= 30


def test_second_run_reads_the_cache(folder, monkeypatch) -> None:
    first, lines = prepared(folder)
    assert any("trained a tokenizer" in line for line in lines)
    monkeypatch.setattr(Tokenizer, "train", None)
    again, lines = prepared(folder)
    assert lines == []
    assert again.digest == first.digest
    assert again.tokenizer.digest == first.tokenizer.digest
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)


def test_same_text_elsewhere_has_the_same_entry(folder) -> None:
    first, _ = prepared(folder)
    moved = folder.rename(folder.parent / "moved")
    assert prepared(moved)[0].digest == first.digest


def test_whatever_changes_the_tokens_changes_the_entry(folder) -> None:
    digests = {prepared(folder)[0].digest}
    digests.add(prepared(folder, vocab_size=V + 1)[0].digest)
    digests.add(prepared(folder, validation_fraction=0.3)[0].digest)
    digests.add(prepared(folder, tokenizer_sample_bytes=10_000)[0].digest)
    (folder / "00.txt").write_text(text_of(0).replace("document", "documenT"))
    digests.add(prepared(folder)[0].digest)
    (folder / "00.txt").rename(folder / "00-renamed.txt")  # still the first
    digests.add(prepared(folder)[0].digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    "name", ["train.bin", "validation.lengths", "tokenizer.model", "meta.json"]
)
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_damaged_entry_is_made_again(folder, name: str, damage: str) -> None:
    first, _ = prepared(folder)
    expected = np.array(first.train.tokens)
    file = first.folder / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    again, lines = prepared(folder)
    assert "damaged" in lines[0]
    np.testing.assert_array_equal(again.train.tokens, expected)
    assert prepared(folder)[1] == []


def test_entry_with_another_tokenizer_is_made_again(folder) -> None:
    first, _ = prepared(folder)
    Tokenizer.train([text_of(k) for k in range(50, 90)], V).save(first.folder / "tokenizer.model")
    again, lines = prepared(folder)
    assert "damaged" in lines[0]
    assert again.tokenizer.digest == first.tokenizer.digest


def test_interrupted_run_leaves_no_entry(folder, cache, monkeypatch) -> None:
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder)
    assert list(cache.iterdir()) == []
    assert prepared(folder)[0].train.n_tokens > 0


def test_runs_that_start_together_agree(folder, cache) -> None:
    results: list[Corpus] = []
    threads = [
        threading.Thread(target=lambda: results.append(prepared(folder)[0])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({corpus.folder for corpus in results}) == 1
    assert list(cache.iterdir()) == [results[0].folder]
    assert results[0].train.tokens[-1] == 3


@pytest.mark.parametrize("good", [True, False])
def test_entry_that_appears_meanwhile_stays_if_good(cache, good: bool) -> None:
    entry = cache / "entry"
    with new_entry(entry, lambda path: good and path.exists()) as temporary:
        (temporary / "file").write_text("ours")
        entry.mkdir()
        (entry / "file").write_text("theirs")
    assert (entry / "file").read_text() == ("theirs" if good else "ours")
    assert list(cache.iterdir()) == [entry]


def test_loaded_tokenizer_is_used(folder, tmp_path) -> None:
    model = tmp_path / "own.model"
    own = Tokenizer.train([text_of(k) for k in range(50, 90)], V)
    own.save(model)
    corpus, lines = prepared(folder, tokenizer=str(model))
    assert corpus.tokenizer.digest == own.digest
    assert not any("trained" in line for line in lines)
    with pytest.raises(
        ConfigError, match=rf"Model\.vocab_size = 301.*Data\.tokenizer.* {V} pieces"
    ):
        prepared(folder, vocab_size=301, tokenizer=str(model))


def test_folder_leaves_out_hidden_and_binary_files(folder) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (folder / "notes.md").write_text("kept")
    names = [file.name for file in sources.open_source(str(folder)).files]
    assert names == sorted(names)
    assert len(names) == 41 and {"notes.md", "sub/01.txt"} < set(names)


def test_glob_is_recursive(folder) -> None:
    (folder / "notes.md").write_text("left out")
    found = sources.open_source(str(folder / "**" / "*.txt"))
    assert [f.name for f in found.files] == [
        f.name for f in sources.open_source(str(folder)).files if f.name != "notes.md"
    ]
    assert len(sources.open_source(str(folder / "*.txt")).files) == 20


@pytest.mark.parametrize("size", [3_000, 200_000, 5_000_000])
def test_single_file_is_cut_at_newlines(tmp_path, size: int) -> None:
    line = "a line with \u00e9 and a newline\n"
    path = tmp_path / "own.txt"
    path.write_text(line * (size // len(line)), encoding="utf-8")
    documents = list(sources.documents(sources.open_source(str(path))))
    assert "".join(d.text for d in documents).encode() == path.read_bytes()
    assert all(d.text.endswith("\n") and not d.repaired for d in documents)
    assert len(documents) >= 8 and len({d.name for d in documents}) == len(documents)
    assert max(len(d.text) for d in documents) < 70_000


def test_large_file_without_newlines_is_cut_between_characters(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("\u4e2d" * 150_000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("small", encoding="utf-8")
    documents = list(sources.documents(sources.open_source(str(tmp_path / "*.txt"))))
    assert [d.name for d in documents][-1] == "b.txt" and len(documents) > 5
    assert "".join(d.text for d in documents[:-1]) == "\u4e2d" * 150_000


def test_bad_utf8_and_empty_documents_are_counted_once(folder) -> None:
    (folder / "bad1.txt").write_bytes(b"caf\xe9\n" * 20)
    (folder / "bad2.txt").write_bytes(b"caf\xe9\n")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n")
    corpus, lines = prepared(folder)
    assert [line for line in lines if "UTF-8" in line][0].startswith("2 documents")
    assert [line for line in lines if "empty" in line] == [
        "2 of 44 documents are empty and left out"
    ]
    assert corpus.train.n_documents + corpus.validation.n_documents == 42


@pytest.mark.parametrize("source", ["missing", "missing/*.txt", "empty"])
def test_nothing_found_names_the_source(tmp_path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"^Data\.source = .*no text files found") as raised:
        prepared(tmp_path / source)
    assert "\n" not in str(raised.value)


def test_unreadable_file_names_the_source(folder, monkeypatch) -> None:
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"^Data\.source = .*00\.txt.*Permission denied"):
        sources.open_source(str(folder))


def test_one_tiny_document_cannot_be_split(tmp_path) -> None:
    (tmp_path / "one.txt").write_text("one line")
    with pytest.raises(ConfigError, match=r"^Data\.source = .*1 document.*more text"):
        prepared(tmp_path / "one.txt")


def test_cache_folder_that_cannot_be_made_is_named(folder) -> None:
    with pytest.raises(ConfigError, match=r"^Data\.cache_dir: .*00\.txt"):
        prepared(folder, cache_dir=str(folder / "00.txt" / "cache"))


def test_cache_folder_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(str(tmp_path / "own")) == tmp_path / "own"
    assert cache_folder(None) == tmp_path / "cache"
    monkeypatch.delenv("PLDR_CACHE")
    assert cache_folder(None) == tmp_path / "xdg" / "pldr_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == pathlib.Path.home() / ".cache" / "pldr_jax"


def test_stdlib_is_the_same_from_a_virtual_environment(tmp_path) -> None:
    here = sources.open_source("stdlib")
    names = {file.name for file in here.files}
    assert {"random.py", "json/decoder.py"} < names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    venv.create(tmp_path / "venv", with_pip=False)
    root = pathlib.Path(sources.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); assert sys.prefix != sys.base_prefix; "
        "from pldr_jax.data import sources; print(sources.open_source('stdlib').digest)"
    )
    python = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here.digest


def test_token_file_is_wide_enough_for_large_vocabularies(tmp_path) -> None:
    np.array([70_000, 3], np.uint32).tofile(tmp_path / "t.bin")
    file = TokenFile(tmp_path / "t.bin", "uint32", 1, 2, 5)
    assert file.tokens.tolist() == [70_000, 3]
    assert dataclasses.replace(file, n_bytes=8).bytes_per_token == 4.0
