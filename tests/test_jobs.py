"""Batch jobs: prompts from everywhere, results to a file, and the program that joins them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, finished_run
from letters import CONFIG, CONTEXT, LETTERS, infer_here, jsonl, letters_model, results

from pldr_jax.api import LanguageModel
from pldr_jax.config import GenerationConfig, ModelConfig, SamplingConfig
from pldr_jax.inference.batch import Output, run_batch
from pldr_jax.inference.jobs import BadLine, Job, JsonlWriter
from pldr_jax.inference.progress import JobProgress
from pldr_jax.inference.request import Request
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.terminal import Display


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return letters_model()


@pytest.fixture
def infer(lm: LanguageModel, capsys: pytest.CaptureFixture[str]) -> Any:
    """`infer.py` in this process with the small model: exit status, stdout, stderr."""

    def call(*arguments: object, model: LanguageModel = lm) -> tuple[Any, str, str]:
        return infer_here(capsys, model, *arguments)

    return call


def test_a_queue_and_its_failures(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    prompts = jsonl(
        tmp_path / "in.jsonl",
        {"id": "one", "prompt": "hello"},
        '{"id": "broken", ',
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "x" * CONTEXT},
        {"id": "unknown", "tokens": [1, 64]},
        {"tokens": [7, 4, 11, 11, 14], "max_new_tokens": 3},
        {"id": "typo", "prompt": "a", "max_tokens": 3},
    )
    out = tmp_path / "out.jsonl"
    status, stdout, stderr = infer(
        f"--prompt_file={prompts}", f"--output={out}", "--max_new_tokens=6", "--logprobs"
    )
    assert status == 1 and stdout == ""
    rows = results(out)
    assert set(rows) == {"one", ("line", 2), "empty", "long", "unknown", 6, "typo"}
    (wanted,) = lm.generate("hello", max_new_tokens=6)
    assert rows["one"] == {
        "id": "one",
        "text": wanted.text,
        "tokens": wanted.tokens,
        "finish_reason": "length",
        "logprobs": pytest.approx(wanted.logprobs, abs=1e-5),
        "input": rows["one"]["input"],
    }
    assert rows[6]["tokens"] == wanted.tokens[:3]  # the same prompt, as tokens
    for name, reason in (("empty", "empty"), ("long", "no room"), ("unknown", "vocabulary")):
        assert rows[name]["finish_reason"] == "error" and reason in rows[name]["error"]
    lines = stderr.splitlines()
    assert any(line.startswith("error: line 2: is not JSON") for line in lines)
    assert any(line.startswith("error: line 7: unknown key 'max_tokens'") for line in lines)
    assert lines[-1].startswith("7 prompts, 9 new tokens, ") and lines[-1].endswith("5 failures")


def test_existing_output_and_usage_errors(infer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("x\n")
    for arguments, message in (
        (["--prompt=a", f"--output={out}"], "add --resume"),
        (["--prompt=a", f"--output={out}", "--resume"], "is not a result"),
        ([], "none was given"),
        (["--prompt=a", "--prompt_file=-"], "choose one"),
        (["--prompt=a", "--resume"], "--output"),
        (["--prompt=a", "--stop="], "empty string"),
        (["--prompt=a", "--logprobs"], "JSONL"),
        (["--prompt=a", "--stream", "--format=jsonl"], "--output"),
        (["--prompt=a", "--truncate=right"], "'error', 'left'"),
        (["--prompt=a", "--min_p=2"], "min_p"),
        (["--prompt=a", "--batch_size=0"], "batch_size"),
        (["--prompt=a", "--rows=4"], "--rows: is called --batch_size now"),
        (["--prompt=a", "--freeze_g"], "pldr-freeze"),
        (["--prompt=a", "--gin.Generation.rows=4"], "is called Generation.batch_size now"),
        (["--prompt=a", "--gin.Model.num_layers=4"], "--gin.Model.num_layers=4: is read from"),
        (["--prompt=a", "--gin.Data.seed=4"], "--gin.Data.seed=4: is read from"),
        (["--prompt=a", "--retry_failed"], "--output"),
        (["--prompt=a", "--stop_ids=-2"], "stop_ids = (-2,)"),
        (["--prompt=a", "--temperature=nan"], "temperature = nan: must be finite"),
        (["--prompt=a", "--format=xml"], "xml"),
        (["--prompt=a", "--gin.Generation.g_mode=frozen"], "g_file"),
        (["--prompt=a", "--gin.Generation.g_file=G.npz"], "g_mode"),
        (["--prompt_file=no_such.txt"], "No such file"),
    ):
        status, stdout, stderr = infer(*arguments)
        assert status == 2 and message in stderr and len(stderr.splitlines()) == 1, arguments
    assert out.read_text() == "x\n"


def test_draws_depend_on_the_row_alone(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    texts = ["ab", "ab", "hello there", "c", "ab"]
    prompts = tmp_path / "in.txt"
    prompts.write_text("\n".join(texts))
    by_rows = {}
    for rows in (1, 4):
        out = tmp_path / f"{rows}.jsonl"
        flags = ("--temperature=1", "--seed=5", "--max_new_tokens=9", f"--batch_size={rows}")
        assert infer(f"--prompt_file={prompts}", f"--output={out}", *flags)[0] == 0
        by_rows[rows] = {name: row["tokens"] for name, row in results(out).items()}
    assert by_rows[1] == by_rows[4]
    same_prompt = [tuple(by_rows[1][i]) for i in (1, 2, 5)]
    assert len(set(same_prompt)) == 3
    # In another order, with the seeds stated.
    stated = [{"id": i + 1, "prompt": text, "seed": 5 + i} for i, text in enumerate(texts)]
    shuffled = jsonl(tmp_path / "shuffled.jsonl", *reversed(stated))
    out = tmp_path / "shuffled.out"
    flags = ("--temperature=1", "--seed=99", "--max_new_tokens=9", "--batch_size=2")
    assert infer(f"--prompt_file={shuffled}", f"--output={out}", *flags)[0] == 0
    assert {name: row["tokens"] for name, row in results(out).items()} == by_rows[1]
    assert lm.generate(texts, 9, temperature=1.0, seed=5)[4].tokens == by_rows[1][5]


def test_a_long_prompt_is_cut_at_its_left(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    prompt = (LETTERS * 2)[:100]
    flags = ("--max_new_tokens=8", "--format=jsonl", f"--prompt={prompt}", "--prompt=ab")
    status, stdout, stderr = infer(*flags)
    assert status == 1 and "prompt 1: the prompt has 100 tokens" in stderr
    rows = {row["id"]: row for row in map(json.loads, stdout.splitlines())}
    assert rows[1]["finish_reason"] == "error" and rows[2]["finish_reason"] == "length"
    status, stdout, _ = infer(*flags, "--truncate=left")
    rows = {row["id"]: row for row in map(json.loads, stdout.splitlines())}
    assert status == 0
    wanted = lm.generate([prompt[-(CONTEXT - 8) :], "ab"], max_new_tokens=8)
    assert [rows[1]["tokens"], rows[2]["tokens"]] == [result.tokens for result in wanted]
    assert len(rows[1]["tokens"]) == 8
    # New tokens that would fill the context, as the default of 128 does, leave half of it.
    for length in ([], [f"--max_new_tokens={CONTEXT}"]):
        status, stdout, _ = infer(
            f"--prompt={prompt}", "--format=jsonl", *length, "--truncate=left"
        )
        (wanted,) = lm.generate(prompt[-CONTEXT // 2 :])
        assert status == 0 and json.loads(stdout)["tokens"] == wanted.tokens
        assert len(wanted.tokens) == CONTEXT // 2


def test_stop_strings(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    (free,) = lm.generate("hello", max_new_tokens=20, temperature=1.0)
    stop = free.text[4:7]
    cut = free.text[: free.text.index(stop)]
    flags = ("--max_new_tokens=20", "--temperature=1", "--prompt=hello")
    status, stdout, _ = infer(*flags, f"--stop={stop}", "--stop=never there")
    assert status == 0 and stdout == f"hello{cut}\n"  # streamed: nothing of the stop is shown
    own = {"prompt": "hello", "stop": [free.text[8:10]]}
    ids = {"prompt": "hello", "stop_ids": [free.tokens[3]], "seed": 0}
    prompts = jsonl(tmp_path / "in.jsonl", {"prompt": "hello"}, {**own, "seed": 0}, ids)
    out = tmp_path / "out.jsonl"
    file_flags = (f"--prompt_file={prompts}", f"--output={out}", f"--stop={stop}")
    assert infer(*flags[:2], *file_flags)[0] == 0
    rows = results(out)
    assert rows[1]["text"] == cut and rows[1]["finish_reason"] == "stop"
    assert rows[2]["text"] == free.text[: free.text.index(own["stop"][0])]
    assert rows[3]["tokens"] == free.tokens[: free.tokens.index(free.tokens[3])]


def test_text_on_stdout(infer: Any, lm: LanguageModel) -> None:
    one, two = (result.text for result in lm.generate(["ab", "cd"], max_new_tokens=12))
    status, stdout, stderr = infer("--prompt=ab", "--max_new_tokens=12")
    assert (status, stdout) == (0, f"ab{one}\n")
    assert stderr.splitlines()[0] == "--- 12 tokens, length" and "1 prompt, 12" in stderr
    status, stdout, _ = infer("--prompt=ab", "--prompt=cd", "--max_new_tokens=12")
    tail = "\n--- 12 tokens, length\n"
    assert (status, stdout) == (0, f"ab{one}{tail}cd{two}{tail}")
    _, stdout, _ = infer("--prompt=ab", "--prompt=cd", "--max_new_tokens=12", "--stream")
    pieces = [line.split("] ", 1) for line in stdout.splitlines()]
    assert len(pieces) == 4  # eight tokens at a time
    texts = {name: "".join(p for n, p in pieces if n == name) for name in ("[1", "[2")}
    assert texts == {"[1": one, "[2": two}
    status, stdout, stderr = infer("--prompt=")
    assert (status, stdout) == (1, "") and "prompt 1: the prompt is empty" in stderr


def test_without_a_tokenizer(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    bare = LanguageModel(CONFIG, lm.params)
    prompts = jsonl(
        tmp_path / "in.jsonl",
        {"tokens": [1, 2]},
        {"prompt": "ab"},
        {"tokens": [1], "stop": ["a"]},
    )
    flags = (f"--prompt_file={prompts}", "--max_new_tokens=4", "--format=jsonl")
    status, stdout, _ = infer(*flags, model=bare)
    rows = {row["id"]: row for row in map(json.loads, stdout.splitlines())}
    assert status == 1 and len(rows[1]["tokens"]) == 4 and "error" not in rows[1]
    assert "no tokenizer" in rows[2]["error"] and "no tokenizer" in rows[3]["error"]


def test_g_modes(infer: Any, lm: LanguageModel, tmp_path: Path) -> None:
    texts = ["hello there", "abc", "zZ9"]
    tensor = np.asarray(lm([[5, 6, 7, 8]]).deductive.G_LM)
    np.savez(tmp_path / "g.npz", G_LM=tensor)
    prompts = tmp_path / "in.txt"
    prompts.write_text("x" * CONTEXT + "\n" + "\n".join(texts))  # the first cannot be decoded

    def tokens(*flags: str, model: LanguageModel = lm) -> list[list[int]]:
        common = (
            f"--prompt_file={prompts}",
            "--max_new_tokens=10",
            "--format=jsonl",
            "--batch_size=2",
        )
        _, stdout, _ = infer(*common, *flags, model=model)
        rows = {row["id"]: row["tokens"] for row in map(json.loads, stdout.splitlines())}
        return [rows[i] for i in (2, 3, 4)]

    def wanted(**settings: Any) -> list[list[int]]:
        sampling = SamplingConfig(10, stop_ids=(63,))
        requests = [Request(tuple(lm.encode(text)), sampling) for text in texts]
        # A generator: slots of the same size as those of the program.
        ended = {
            i: r.tokens
            for i, r in lm.run(iter(requests), batch_size=2, **settings)
            if r.finish_reason
        }
        return [ended[i] for i in range(len(texts))]

    g_mode, cache = "--gin.Generation.g_mode=", "--gin.Generation."
    file = f"--gin.Generation.g_file={tmp_path / 'g.npz'}"
    own = wanted()
    recomputed = wanted(kv_cache=False, g_cache="none")
    assert own != wanted(share_first_g=True) and own != recomputed  # or nothing is tested
    assert tokens() == own
    assert tokens(f"{g_mode}first") == wanted(share_first_g=True)
    assert tokens(f"{g_mode}identity") == wanted(g_lm=identity_g_lm(CONFIG)) != own
    assert tokens(f"{g_mode}frozen", file) == wanted(g_lm=tensor) != own
    assert tokens(f"{g_mode}recompute") == recomputed
    assert tokens(f"{cache}kv_cache=False") == own == tokens(f"{cache}g_cache=False")
    assert tokens(f"{cache}kv_cache=False", f"{cache}g_cache=False") == recomputed
    fixed = ModelConfig(**{**vars(CONFIG), "g_source": "random"})
    predefined = LanguageModel(fixed, lm.params, tensor, lm.tokenizer)
    assert tokens(f"{g_mode}frozen", model=predefined) == wanted(g_lm=tensor)


def test_cache_dtype_reaches_the_engine(lm: LanguageModel) -> None:
    def logprobs(dtype: str | None) -> list[float]:
        model = LanguageModel(CONFIG, lm.params, cache_dtype=dtype)
        return model.generate([[1, 2, 3]], 10)[0].logprobs

    plain = logprobs(None)
    assert plain == logprobs("float32") != logprobs("bfloat16")


def test_a_queue_is_read_as_rows_become_free(lm: LanguageModel, tmp_path: Path) -> None:
    """No more rows are read than are decoded, and each is written before many more are read."""
    out = tmp_path / "out.jsonl"
    ahead = []

    def endless() -> Iterator[Job | BadLine]:
        for i in range(60):
            ahead.append(i - (len(results(out)) if out.exists() else 0))
            yield Job(i, "ab", index=i)

    with JsonlWriter(out) as writer:
        output = Output(JobProgress(None, display=Display(enabled=False)), writer)
        run_batch(lm, endless(), GenerationConfig(max_new_tokens=2, batch_size=4), output)
    assert len(results(out)) == 60 and max(ahead) <= 8


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    progress = JobProgress(4, 1, Display(terminal=False, clock=lambda: now[0]))
    with progress:
        for now[0] in (2.0, 9.0, 10.0, 12.0):
            progress.add_tokens(30)
        progress.finish(failed=True)
        now[0] = 24.0
        progress.finish(failed=False)
    assert capsys.readouterr().err.splitlines() == [
        "prompts 1/4  tokens 90  tokens/s 9.0",
        "prompts 3/4  tokens 120  tokens/s 5.0",
    ]
    assert progress.summary() == "2 prompts, 120 new tokens, 5.0 tokens/s, 1 failure"
    with JobProgress(None, display=Display(terminal=True)) as bar:
        bar.print("line 3: [bad]")
    assert "line 3: [bad]" in capsys.readouterr().err


def test_stdin_and_exit_status(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    run_dir, _ = finished_run(tmp_path_factory.getbasetemp())
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "infer.py", f"--checkpoint={run_dir}", "--prompt_file=-"]
    command += [f"--output={out}", "--max_new_tokens=4"]

    def call(text: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more],
            input=text,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=120,
        )

    done = call("def \n\nreturn self\n")
    assert done.returncode == 0, done.stderr
    rows = results(out)
    assert set(rows) == {1, 3} and all(len(row["tokens"]) == 4 for row in rows.values())
    assert done.stderr.splitlines()[-1].startswith("2 prompts, 8 new tokens")
    done = call('{"id": 1, "prompt": "def "}\n{"prompt"\n{"id": "n", "prompt": "in"}', "--resume")
    assert done.returncode == 1 and "line 2: is not JSON" in done.stderr
    assert set(results(out)) == {1, 3, "n", ("line", 2)}
    assert call("x\n").returncode == 2
