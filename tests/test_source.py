"""`Data.source` on raw text: which documents, on which side, and what is left out."""

import os
import pathlib
import subprocess
import sys
import venv

import numpy as np
import pytest
from sources import V, opened, sides, text_of

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.units import hash_of
from pldr_jax.data.text.inputs import STDLIB, find_inputs
from pldr_jax.data.text.tokenizer import Tokenizer

pytest_plugins = ("sources",)
pytestmark = pytest.mark.usefixtures("cache_dir")


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
