"""Prepared text: the same for any number of processes, resumable, whole or not there; pldr-data."""

import dataclasses
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, WORDS, contents, run_here

from pldr_jax.cli.data import data_main
from pldr_jax.config import ConfigError
from pldr_jax.data.shards import parallel
from pldr_jax.data.shards.build import BuildSettings, build, work_folder
from pldr_jax.data.shards.prepared import SPLITS, Manifest, ShardedTokens, read_prepared
from pldr_jax.data.shards.progress import BuildProgress
from pldr_jax.data.shards.records import (
    DataError,
)
from pldr_jax.data.shards.units import UnitSettings, split_of, tokenize
from pldr_jax.data.text.inputs import find_inputs
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.terminal import Display

LOG: list[str] = []


def document(k: int) -> str:
    rng = np.random.default_rng(k)
    return f"document {k}: {' '.join(rng.choice(WORDS, rng.integers(1, 80)))}\nÄ 字 {k}"


DOCUMENTS = [document(k) for k in range(300)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A JSONL file, and beside it a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": document}) for document in DOCUMENTS]
    lines[150:150] = ["broken", json.dumps({"text": ""})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    Tokenizer.train(DOCUMENTS, 300).save(folder / "tok.model")
    return str(folder)


UNITS = UnitSettings(validation_fraction=0.1, test_fraction=0.05)


def prepare(text: str, output: object, log=LOG.append, **changed: Any) -> Manifest:
    settings = BuildSettings(UNITS, unit_bytes=10_000, workers=1)
    return build(
        find_inputs([f"{text}/a.jsonl"]),
        changed.pop("tokenizer", None) or Tokenizer.load(f"{text}/tok.model"),
        Path(str(output)),
        dataclasses.replace(settings, **changed),
        log,
    )


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("prepared") / "out"
    prepare(text, output)
    return str(output)


def test_every_document_is_there_once_in_its_split(text, prepared) -> None:
    manifest = read_prepared(prepared)
    found = {split: [] for split in SPLITS}
    for split in SPLITS:
        tokens = ShardedTokens(manifest, split)
        ends = np.cumsum(tokens.lengths)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            ids = tokens.read(int(start), int(end))
            assert ids[-1] == manifest.eos_id and manifest.eos_id not in ids[:-1]
            found[split].append(manifest.tokenizer.decode(ids))
        assert manifest.count(split, "n_bytes") == sum(len(t.encode()) for t in found[split])
        assert manifest.count(split, "n_documents") == len(found[split]) > 5
        assert manifest.count(split, "n_tokens") == tokens.n_tokens == ends[-1]
    for split in SPLITS:
        assert found[split] == [d for d in DOCUMENTS if split_of(d, UNITS) == split]
    assert manifest.problems == {"broken_line": 1, "empty": 1}
    assert len(manifest.splits["train"]) > 3


def test_copies_of_a_document_are_in_one_split_and_the_seed_chooses() -> None:
    units = [UnitSettings(validation_fraction=0.5, seed=seed) for seed in range(2)]
    chosen = [[split_of(document, unit) for document in DOCUMENTS] for unit in units]
    assert chosen[0] == [split_of(document, units[0]) for document in DOCUMENTS]
    assert chosen[0] != chosen[1]
    assert 0.4 < np.mean([split == "validation" for split in chosen[0]]) < 0.6


def test_the_result_does_not_depend_on_the_processes(text, prepared, tmp_path) -> None:
    prepare(text, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == contents(prepared_path(prepared))
    assert multiprocessing.active_children() == []


def prepared_path(prepared: str):
    return read_prepared(prepared).folder


def test_interrupted_work_goes_on_and_done_shards_are_kept(
    text, prepared, tmp_path, monkeypatch
) -> None:
    whole, done = parallel.write_unit, []

    def fails_at_the_third(unit, *rest):
        if len(done) == 2:
            (rest[0] / ".train-000002.1.tmp.array_record").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        done.append(unit.number)
        return whole(unit, *rest)

    monkeypatch.setattr(parallel, "write_unit", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(text, tmp_path / "out")
    assert not (tmp_path / "out").exists() and done == [0, 1]

    def records(unit, *rest):
        done.append(unit.number)
        return whole(unit, *rest)

    monkeypatch.setattr(parallel, "write_unit", records)
    with pytest.raises(ConfigError, match="holds unfinished work on other inputs or settings"):
        prepare(text, tmp_path / "out", unit_bytes=9_000)
    prepare(text, tmp_path / "out")
    assert done == list(range(len(done))) and len(done) > 3
    assert contents(tmp_path / "out") == contents(prepared_path(prepared))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_work_goes_on(text, prepared, tmp_path) -> None:
    """Workers end with the process that was killed, and the next one starts from their shards."""
    arguments = [sys.executable, "-m", "pldr_jax.data", "build", f"--output={tmp_path}/out"]
    arguments += [f"--input={text}/a.jsonl", f"--tokenizer={text}/tok.model", "--workers=2"]
    arguments += ["--shard_bytes=10000", "--validation_fraction=0.1", "--test_fraction=0.05"]
    process = subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    units = tmp_path / "out.building" / "units"
    while process.poll() is None and not list(units.glob("*.json")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    prepare(text, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared_path(prepared))


def test_an_output_that_is_there_is_not_touched(text, prepared) -> None:
    before, lines = contents(prepared_path(prepared)), []
    prepare(text, prepared, lines.append)
    assert "already there" in lines[0]
    with pytest.raises(ConfigError, match=r"^--output=.*something else; name another"):
        prepare(text, prepared, unit_bytes=5_000)
    assert contents(prepared_path(prepared)) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_on_error_fail_names_the_place(text, tmp_path, workers: int) -> None:
    units = UnitSettings(on_error="fail")
    with pytest.raises(DataError, match=r"a\.jsonl: byte \d+: not a JSON object.*--on_error=skip"):
        prepare(text, tmp_path / "out", units=units, workers=workers)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_work_on_one_output(text, tmp_path) -> None:
    with (
        work_folder(tmp_path / "out", "--output"),
        pytest.raises(ConfigError, match=r"^--output=.*is in use by process"),
    ):
        prepare(text, tmp_path / "out")


def test_a_missing_or_cut_shard_is_refused_at_once(prepared, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / "train-000001.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"train-000001\.array_record is cut or changed"):
        read_prepared(copy)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"train-000001\.array_record is missing"):
        read_prepared(copy)
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a manifest"):
        read_prepared(copy)


def test_long_texts_give_the_tokens_of_the_whole(text, monkeypatch) -> None:
    tokenizer = Tokenizer.load(f"{text}/tok.model")
    long = " ".join(DOCUMENTS[:40])
    whole = tokenize(tokenizer, [long, "a"])
    monkeypatch.setattr("pldr_jax.data.shards.units.LONG_TEXT", 100)
    parts = tokenize(tokenizer, [long, "a"])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)
    ids, lengths = whole
    assert ids.dtype == np.int32 and lengths.sum() == len(ids)
    assert (np.flatnonzero(ids == tokenizer.eos_id) == np.cumsum(lengths) - 1).all()
    assert [tokenizer.decode(part) for part in np.split(ids, lengths[:1])] == [long, "a"]


def test_progress_tells_speed_and_time_left(capsys) -> None:
    now = [0.0]
    display = Display(terminal=False, interval=5.0, clock=lambda: now[0])
    progress = BuildProgress(40_000_000, 10_000_000, display)
    with progress:
        now[0] = 10.0
        progress.add(10_000_000, 3, 2_000_000)
    expected = "20.0 of 40.0 MB  3 documents  2,000,000 tokens  200,000 tokens/s  0:20 left"
    assert capsys.readouterr().err.strip() == progress.text() == expected


def test_the_program_builds_and_inspects(text, tmp_path, capsys) -> None:
    arguments = ["build", f"--input={text}/a.jsonl", f"--output={tmp_path}/out"]
    arguments += [f"--tokenizer={text}/tok.model", "--workers=1"]
    status, out, err = run_here(capsys, data_main, *arguments)
    assert status == 0 and "left out: 1 not a JSON object" in out and "tokens/s" in err
    assert f"--gin.Data.source={tmp_path}/out --gin.Model.vocab_size=300" in out
    status, out, _ = run_here(capsys, data_main, "inspect", f"--path={tmp_path}/out", "--samples=2")
    assert status == 0 and out.count("'document ") == 4
    manifest = read_prepared(tmp_path / "out")
    assert f"train: {manifest.count('train', 'n_documents')} documents" in out
    histogram = [line for line in out.splitlines() if " - " in line]
    assert sum(int(line.split()[3].replace(",", "")) for line in histogram) == len(DOCUMENTS)
    shard = f"--path={tmp_path}/out/validation-000000.array_record"
    status, out, _ = run_here(capsys, data_main, "inspect", shard, "--samples=0")
    assert status == 0 and "train:" not in out and "validation: " in out


def test_the_program_trains_and_measures_tokenizers(text, tmp_path, capsys) -> None:
    arguments = ["tokenizer", f"--input={text}/a.jsonl", "--validation_fraction=0.2"]
    more = ["--vocab_size=305", "--special=[SEP]", "--special=[CLS]", f"--output={tmp_path}/t"]
    status, out, err = run_here(capsys, data_main, *arguments, *more)
    assert status == 0, err
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert tokenizer.vocab_size == 305
    pieces = [tokenizer._processor.id_to_piece(i) for i in range(6)]
    assert pieces == ["[PAD]", "[UNK]", "[START]", "[END]", "[SEP]", "[CLS]"]
    assert tokenizer.encode("[SEP]")[0] > 5  # no text gives a special piece
    units = UnitSettings(validation_fraction=0.2)
    held_out = [d for d in DOCUMENTS if split_of(d, units) != "train"]
    assert f"exact round trips     {len(held_out)} of {len(held_out)} documents" in out
    n_bytes = sum(len(d.encode()) for d in held_out)
    n_tokens = sum(len(tokenizer.encode(d)) for d in held_out)
    assert f"bytes per token       {n_bytes / n_tokens:.3f}" in out
    fallback = sum(tokenizer.is_byte(i) for d in held_out for i in tokenizer.encode(d))
    assert f"byte-fallback tokens  {fallback / n_tokens:.4%}" in out
    status, again, _ = run_here(capsys, data_main, *arguments, f"--tokenizer={tmp_path}/t")
    assert status == 0 and again.splitlines()[-6:] == out.splitlines()[-6:]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "no command was given; the commands are build, tokenizer, inspect"),
        (["bild"], "'bild' is no command"),
        (["build", "--input=a", "--output=b", "--tokenizer=c"], "--tokenizer='c': cannot be read"),
        (["inspect", "--path=/no/such"], "--path = '/no/such': /no/such cannot be read"),
        (["tokenizer", "--input=a"], "--output: name the file to write"),
    ],
)
def test_wrong_commands_are_one_line(capsys, arguments, message) -> None:
    status, _, err = run_here(capsys, data_main, *arguments)
    assert status == 2 and err.count("\n") == 1 and message in err


def test_nothing_to_prepare_says_what_was_left_out(text, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\nbroken\n')
    with pytest.raises(
        ConfigError, match=r"holds no document.*JSON object, first .*l:2; .*1 empty, first .*l:1$"
    ):
        prepare(str(tmp_path), tmp_path / "out", tokenizer=Tokenizer.load(f"{text}/tok.model"))
    assert not (tmp_path / "out.building").exists()


def test_unreadable_input_under_on_error_fail(text, tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    arguments = ["build", f"--input={tmp_path}", f"--output={tmp_path}/out"]
    arguments += [f"--tokenizer={text}/tok.model"]
    status, _, err = run_here(capsys, data_main, *arguments, "--on_error=fail")
    assert status == 1 and "gone.txt (a link to" in err and "no file to read from" in err
    status, out, _ = run_here(capsys, data_main, *arguments)
    assert status == 0 and "left out: 1 no file to read from" in out and "gone.txt" in out


def test_small_text_is_worth_no_process(text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", None)
    prepare(text, tmp_path / "out", workers=None)
    with pytest.raises(TypeError):
        prepare(text, tmp_path / "asked", workers=2)


def test_home_is_meant_in_every_path(text, prepared, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(text, tmp_path / "in")
    arguments = ["build", "--input=~/in/a.jsonl", "--output=~/out", "--tokenizer=~/in/tok.model"]
    assert run_here(capsys, data_main, *arguments)[0] == 0
    assert run_here(capsys, data_main, "inspect", "--path=~/out", "--samples=0")[0] == 0
    measured = ["tokenizer", "--input=~/in/a.jsonl", "--output=~/t.model", "--vocab_size=300"]
    assert run_here(capsys, data_main, *measured)[0] == 0 and (tmp_path / "t.model").is_file()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid")))
    for command in (arguments, ["inspect", "--path=~/out"], measured):
        status, _, err = run_here(capsys, data_main, *command)
        assert status == 2 and err.count("\n") == 1 and "no home folder" in err


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_are_bounded(text, tmp_path, capsys, seed: int) -> None:
    arguments = ["build", f"--input={text}/a.jsonl", f"--output={tmp_path}/out"]
    arguments += [f"--tokenizer={text}/tok.model", f"--seed={seed}"]
    status, _, err = run_here(capsys, data_main, *arguments)
    assert status == 2 and err.count("\n") == 1
    assert f"--seed={seed}: must be at" in err or f"--seed: invalid int value: '{seed}'" in err


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_the_work_goes_on(text, tmp_path, workers: int) -> None:
    """No file may grow beyond 4 KiB: what a disk does that has no room left."""
    words = np.random.default_rng(0).choice(WORDS, 6000)
    lines = [json.dumps({"text": f"{k} {words[k]} {k * k}"}) for k in range(6000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = f"-m pldr_jax.data build --input={tmp_path}/a.jsonl --output={tmp_path}/out"
    command = f"{sys.executable} {arguments} --tokenizer={text}/tok.model --workers={workers}"
    command += " --shard_bytes=100000"
    for limit, status in (("ulimit -f 4", 1), ("true", 0)):
        result = subprocess.run(
            ["bash", "-c", f"{limit}; exec {command}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert result.returncode in (status, 2 * status), result.stderr
        errors = [line for line in result.stderr.splitlines() if "error: " in line]
        assert len(errors) == status and "Traceback" not in result.stderr
        assert not errors or "cannot be written to (File too large)" in errors[0]
    assert read_prepared(tmp_path / "out").count("train", "n_documents") > 5000
