"""Results of batch jobs: what is in the file after every accident, and what it belongs to."""

import errno
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REPOSITORY
from letters import LETTERS, Letters, infer_here, jsonl, letters_model, results

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.inference.jobs import JsonlWriter


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return letters_model()


@pytest.fixture
def infer(lm: LanguageModel, capsys: pytest.CaptureFixture[str]) -> Any:
    """`infer.py` in this process with the small model: exit status, stdout, stderr."""

    def call(*arguments: object, model: LanguageModel = lm) -> tuple[Any, str, str]:
        return infer_here(capsys, model, *arguments)

    return call


# Writing


def test_rows_are_in_the_file_when_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with JsonlWriter(path) as writer:
        for row_id in ("\u00e9", "\ud800", 3):
            writer.write({"id": row_id, "finish_reason": "error"})
            assert list(results(path))[-1] == row_id
    assert "\u00e9" in path.read_text()
    again = JsonlWriter(path, resume=True)
    again.close()
    assert set(again.done) == {"\u00e9", "\ud800", 3} and again.failed == 3


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"is there already; add --resume"):
        JsonlWriter(path)
    for foreign in ("precious", '{"prompt": "a"}', '{"id": 1, "prompt": "a"}\n', "\0\0\n", "x\0"):
        path.write_text(foreign)
        with pytest.raises(ConfigError, match="line 1 is not a result"):
            JsonlWriter(path, resume=True)
        assert path.read_text() == foreign
    with pytest.raises(ConfigError, match="No such file"):
        JsonlWriter(tmp_path / "no" / "out.jsonl")
    path.write_text("")
    JsonlWriter(path).close()


# The program


def test_a_killed_job_is_resumed(infer: Any, tmp_path: Path) -> None:
    rows = [{"id": f"row {i}", "prompt": "abc"[: i % 3 + 1] * (i + 1)} for i in range(9)]
    prompts = jsonl(tmp_path / "in.jsonl", *rows, {"prompt": ""})
    common = (
        f"--prompt_file={prompts}",
        "--max_new_tokens=5",
        "--temperature=1",
        "--batch_size=3",
        "--gin.Generation.g_mode=first",
    )
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert infer(*common, f"--output={whole}")[0] == 1  # the empty prompt
    data, wanted = whole.read_bytes(), results(whole)
    assert len(wanted) == 10
    chance = random.Random(0)
    for size in (0, 3, data.index(b"\n") + 1, *chance.sample(range(len(data)), 3), len(data)):
        cut.write_bytes(data[:size])
        kept = data[:size].rpartition(b"\n")[0]
        status, _, stderr = infer(*common, f"--output={cut}", "--resume")
        assert status == 1
        assert results(cut) == wanted
        assert cut.read_bytes().startswith(kept)
        decoded = 10 - len(kept.splitlines())
        assert f"\n{decoded} prompt" in f"\n{stderr}"


@pytest.mark.parametrize("kept", [0, 7, 40])
def test_zeros_after_a_loss_of_power_are_cut(infer: Any, tmp_path: Path, kept: int) -> None:
    """They stand where the end of the last line, or all of it, was to be."""
    prompts = jsonl(tmp_path / "in.jsonl", *({"prompt": text} for text in ("ab", "cd", "ef")))
    out = tmp_path / "out.jsonl"
    arguments = (f"--prompt_file={prompts}", f"--output={out}", "--max_new_tokens=3")
    assert infer(*arguments)[0] == 0
    wanted, lines = results(out), out.read_bytes().splitlines(keepends=True)
    for zeros in (1, 5000):
        out.write_bytes(b"".join(lines[:2]) + lines[2][:kept] + b"\0" * zeros)
        assert infer(*arguments, "--resume")[0] == 0
        assert results(out) == wanted and b"\0" not in out.read_bytes()
    out.write_bytes(b"\0" * 100)
    assert infer(*arguments, "--resume")[0] == 0 and results(out) == wanted


def test_failed_lines_leave_a_result_and_can_be_tried_again(infer: Any, tmp_path: Path) -> None:
    bad = ['{"id": "broken", ', {"id": "typo", "prompt": "a", "max_tokens": 3}, "[1]"]
    good = [{"id": "one", "prompt": "hello"}, {"id": "two", "prompt": "there"}]
    prompts = jsonl(
        tmp_path / "in.jsonl", good[0], *bad, {"id": "long", "prompt": "x" * 99}, good[1]
    )
    out = tmp_path / "out.jsonl"
    arguments = (f"--prompt_file={prompts}", f"--output={out}", "--max_new_tokens=3")
    assert infer(*arguments)[0] == 1
    first = results(out)
    assert set(first) == {"long", "one", "two", "typo", ("line", 2), ("line", 4)}
    for name, reason in ((("line", 2), "JSON"), ("typo", "max_tokens"), (("line", 4), "object")):
        assert first[name]["finish_reason"] == "error" and reason in first[name]["error"]
    # Going on does them no second time, and says how.
    status, _, stderr = infer(*arguments, "--resume")
    assert status == 1 and results(out) == first
    assert stderr.splitlines()[-1] == (
        "4 of the earlier results are failures; --retry_failed tries them again"
    )
    jsonl(tmp_path / "in.jsonl", good[0], *bad[:1], {**bad[1], "max_tokens": 3}, bad[2],
          {"id": "long", "prompt": "x" * 9}, good[1])  # fmt: skip
    status, _, stderr = infer(*arguments, "--retry_failed")
    again = results(out)
    assert status == 1 and set(again) == set(first) and again["one"] == first["one"]
    assert again["long"]["finish_reason"] == "length" and "error" in again["typo"]
    assert "4 prompts, 3 new tokens" in stderr and stderr.endswith("3 failures\n")


@pytest.mark.parametrize("kind", ["prompt", "settings", "flags", "order"])
def test_results_name_what_they_belong_to(infer: Any, tmp_path: Path, kind: str) -> None:
    """A prompt file that was edited before a job goes on is noticed, and nothing is lost."""
    texts = tmp_path / "in.jsonl"
    lines = [{"id": f"row {i}", "prompt": "abc"[i]} for i in range(3)]
    jsonl(texts, *lines)
    out = tmp_path / "out.jsonl"
    arguments = [
        f"--prompt_file={texts}",
        f"--output={out}",
        "--temperature=1",
        "--max_new_tokens=3",
    ]
    assert infer(*arguments)[0] == 0
    before = out.read_bytes()
    if kind == "prompt":
        jsonl(texts, lines[0], {**lines[1], "prompt": "z"}, lines[2])
    elif kind == "settings":
        jsonl(texts, lines[0], {**lines[1], "top_k": 3}, lines[2])
    elif kind == "order":  # another seed
        jsonl(texts, lines[0], lines[2], lines[1])
    else:
        arguments.append("--seed=1")
    status, _, stderr = infer(*arguments, "--resume")
    assert status == 2 and stderr.count("\n") == 1
    assert str(out) in stderr and "another prompt, or of other settings" in stderr
    assert out.read_bytes() == before
    # More lines behind are no other job.
    jsonl(texts, *lines, {"id": "more", "prompt": "d"})
    assert infer(*arguments[:4], "--resume")[0] == 0
    assert len(results(out)) == 4 and out.read_bytes().startswith(before)


def test_two_jobs_on_one_output_are_refused(infer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with JsonlWriter(out) as first:
        first.write({"id": 1, "finish_reason": "stop"})
        for more in ([], ["--resume"], ["--retry_failed"]):
            status, _, stderr = infer("--prompt=a", f"--output={out}", *more)
            assert status == 2 and "another job is writing to it" in stderr
            assert stderr.count("\n") == 1
        first.write({"id": 2, "finish_reason": "error"})
    assert set(results(out)) == {1, 2}
    assert set(JsonlWriter(out, retry_failed=True).done) == {1}


def test_jsonl_is_utf8_whatever_the_locale(lm: LanguageModel, tmp_path: Path) -> None:
    """As a user of an ASCII locale starts it; what goes to people is spelled out."""
    program = (
        "from letters import *; from pldr_jax.cli.infer import main;"
        "pldr_jax.api.load = lambda *_, **__: letters_model();"
        "letters_model().tokenizer.changed = {x: chr(233) for x in LETTERS};"
        "main()"
    )
    prompts = jsonl(tmp_path / "in.jsonl", json.dumps({"id": "\u00e9\u4e00", "tokens": [1, 2]}))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        "PYTHONIOENCODING": "ascii",
    }
    for form in ("jsonl", "text"):
        done = subprocess.run(
            [sys.executable, "-c", program, "--checkpoint=none", f"--prompt_file={prompts}",
             "--max_new_tokens=4", f"--format={form}"],
            env=environment, cwd=REPOSITORY, capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if form == "jsonl":
            (line,) = map(json.loads, done.stdout.decode("utf-8").splitlines())
            assert line["id"] == "\u00e9\u4e00" and set(line["text"]) == {"\u00e9"}
        else:
            assert b"\\xe9\\xe9" in done.stdout and b"?" not in done.stdout


class Full(io.TextIOWrapper):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.number = number

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_errors_of_stdout_name_stdout(
    infer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    arguments = (f"--prompt_file={prompts}", "--max_new_tokens=3", f"--format={form}")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full(errno.ENOSPC))
        status, _, stderr = infer(*arguments)
        assert status == 1 and stderr.splitlines()[-1] == "error: stdout: No space left on device"
        patch.setattr(sys, "stdout", Full(errno.EPIPE))  # the reader has seen enough
        status, _, stderr = infer(*arguments)
        assert status == 1 and "rror" not in stderr
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("pldr_jax.inference.jobs._SYNC_SECONDS", 0)
        patch.setattr(os, "fsync", lambda _: Full(errno.ENOSPC).flush())
        status, _, stderr = infer(*arguments, f"--output={out}")
        assert status == 1 and "No space left" in stderr.splitlines()[-1]
    assert len(results(out)) == 1 and infer(*arguments, f"--output={out}", "--resume")[0] == 0


@pytest.mark.parametrize("stream", [[], ["--stream"], ["--prompt=cd"]])
def test_nothing_that_is_printed_steers_a_terminal(
    infer: Any, lm: LanguageModel, stream: Any
) -> None:
    """Escape sequences of texts and prompts are spelled out; JSONL has them as JSON does."""
    escapes = {x: "\x1b[2J\u202e\r" for x in LETTERS}
    model = LanguageModel(lm.config, lm.params, tokenizer=Escapes(escapes))  # type: ignore[arg-type]
    prompt = "--prompt=a\x1b]0;title\x07"
    status, stdout, stderr = infer(prompt, "--max_new_tokens=4", *stream, model=model)
    assert status == 0 and "\\x1b[2J\\u202e" in stdout
    assert not set(stdout + stderr) & set("\x1b\x07\r\u202e")
    status, stdout, _ = infer(prompt, "--max_new_tokens=4", "--format=jsonl", model=model)
    assert status == 0 and json.loads(stdout)["text"].startswith("\x1b[2J\u202e\r")
    status, _, stderr = infer("--prompt_file=\x1b[31m")
    assert status == 2 and "\x1b" not in stderr


class Escapes(Letters):
    """Reads anything."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 60 for letter in text]


def test_a_source_without_an_end_is_one_line(infer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pldr_jax.inference.jobs.LONGEST_LINE", 1000)
    status, _, stderr = infer("--prompt_file=/dev/zero")
    assert status == 2 and stderr.count("\n") == 1 and "'/dev/zero': has a line of" in stderr
    status, _, stderr = infer("--prompt_file=/")
    assert status == 2 and stderr.count("\n") == 1 and "Is a directory" in stderr


def test_bad_numbers_end_no_job(infer: Any, tmp_path: Path) -> None:
    bad = [
        {"stop_ids": [99999999999]}, {"stop_ids": [64]}, {"top_k": 2**40},
        {"max_new_tokens": 10**12}, {"seed": 2**32}, {"temperature": True},
        {"tokens": [10**30]}, {"tokens": [-1]},
    ]  # fmt: skip
    lines = [{"id": i, "tokens": [5], **fields} for i, fields in enumerate(bad)]
    prompts = jsonl(
        tmp_path / "in.jsonl", {"id": "a", "prompt": "ab"}, *lines, {"id": "z", "prompt": "c"}
    )
    out = tmp_path / "out.jsonl"
    arguments = (
        f"--prompt_file={prompts}",
        f"--output={out}",
        "--max_new_tokens=3",
        "--batch_size=1",
    )
    for more in ([], ["--resume"], ["--retry_failed"]):
        status, _, stderr = infer(*arguments, *more)
        found = results(out)
        assert status == 1 and len(found) == len(bad) + 2 and "Traceback" not in stderr
        for i, fields in enumerate(bad):
            assert found[i]["finish_reason"] == "error"
            named = "token id" if "tokens" in fields else next(iter(fields))
            assert named in found[i]["error"]
        assert len(found["a"]["tokens"]) == len(found["z"]["tokens"]) == 3
