"""`infer.py`: the same text as the Python API gives, and one line where it cannot."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import finished_run, run_here, run_program

import pldr_jax
from pldr_jax.api import LanguageModel
from pldr_jax.cli.infer import infer_main
from pldr_jax.terminal import visible

PROMPT, OTHER = "def return", "print of the"
NEW = 6


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture
def lm(run_dir) -> LanguageModel:
    return pldr_jax.load(run_dir)


@pytest.fixture
def infer(run_dir, capsys) -> Any:
    """stdout of the program for the run."""

    def call(*arguments: object, prompts: tuple[str, ...] = (PROMPT,)) -> str:
        chosen = [f"--prompt={prompt}" for prompt in prompts]
        length = f"--max_new_tokens={NEW}"
        status, out, error = run_here(
            capsys, infer_main, f"--checkpoint={run_dir}", *chosen, length, *arguments
        )
        assert status == 0, error
        return out

    return call


def expected(lm: LanguageModel, **settings: Any) -> str:
    (generation,) = lm.generate(PROMPT, max_new_tokens=NEW, **settings)
    return visible(f"{PROMPT}{generation.text}\n")


def test_program_prints_prompt_and_continuation(run_dir, lm) -> None:
    arguments = ("--checkpoint", run_dir, "--prompt", PROMPT, "--max_new_tokens", NEW)
    result = run_program("infer.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected(lm) != f"{PROMPT}\n"
    assert result.stderr.startswith(f"--- {NEW} tokens, length\n1 prompt, ")


def test_several_prompts(infer, lm) -> None:
    out = infer(prompts=(PROMPT, OTHER))
    texts = [g.text for g in lm.generate([PROMPT, OTHER], max_new_tokens=NEW)]
    end = f"\n--- {NEW} tokens, length\n"
    assert out == visible(f"{PROMPT}{texts[0]}{end}{OTHER}{texts[1]}{end}")


def test_sampling_is_reproducible(infer, lm) -> None:
    hot = ("--temperature=1.5", "--top_k=50", "--top_p=0.95")
    texts = [infer(*hot, f"--seed={seed}") for seed in (1, 1, 2, 3)]
    settings = {"temperature": 1.5, "top_k": 50, "top_p": 0.95}
    assert texts[0] == texts[1] == expected(lm, **settings, seed=1)
    assert len(set(texts)) > 1 and texts[0] != expected(lm)


def test_an_older_checkpoint(infer, run_dir) -> None:
    assert infer("--step=11") == expected(pldr_jax.load(run_dir, step=11))


def test_cache_modes_agree(infer, lm) -> None:
    modes = [
        infer(f"--gin.Generation.kv_cache={kv}", f"--gin.Generation.g_cache={g}")
        for kv in (True, False)
        for g in (True, False)
    ]
    # With neither cache everything is recomputed: the definition, which the next test has.
    assert set(modes[:3]) == {expected(lm)}


def test_recomputed_g_lm_is_the_definition(infer, lm) -> None:
    tokens = lm.tokenizer.encode(PROMPT)
    for _ in range(NEW):
        tokens.append(int(np.argmax(lm([tokens]).logits[0, -1])))
    assert infer("--gin.Generation.g_mode=recompute") == visible(lm.tokenizer.decode(tokens)) + "\n"


def test_frozen_g_lm(infer, lm, tmp_path) -> None:
    own = np.asarray(lm([lm.tokenizer.encode(PROMPT)]).deductive.G_LM)[:, 0]
    normal = np.random.default_rng(0).normal(size=(20, *own.shape)).astype(np.float32)
    another = next(g for g in 100 * normal if expected(lm, g_lm=g) != expected(lm))
    outputs = {}
    for name, g_lm in {"own": own, "another": another}.items():
        np.savez(tmp_path / f"{name}.npz", G_LM=g_lm)
        outputs[name] = infer(
            "--gin.Generation.g_mode=frozen", f"--gin.Generation.g_file={tmp_path / name}.npz"
        )
        assert outputs[name] == expected(lm, g_lm=g_lm)
    assert outputs["own"] == expected(lm)
    assert outputs["another"] != outputs["own"]


def test_what_cannot_be_used_is_one_line(run_dir, tmp_path, capsys) -> None:
    np.savez(tmp_path / "wrong.npz", G_LM=np.zeros((2, 2, 8, 4), np.float32))
    (tmp_path / "empty").mkdir()
    run, prompt = f"--checkpoint={run_dir}", f"--prompt={PROMPT}"
    frozen = "--gin.Generation.g_mode=frozen"
    cases: list[tuple[list[str], str]] = [
        ([run], "--prompt"),
        ([prompt], "--checkpoint"),
        ([f"--checkpoint={tmp_path / 'missing'}", prompt], "missing"),
        ([f"--checkpoint={tmp_path / 'empty'}", prompt], "empty"),
        ([run, prompt, "--step=7777"], "7777"),
        ([run, prompt, frozen], "Generation.g_file"),
        ([run, prompt, frozen, f"--gin.Generation.g_file={tmp_path}/wrong.npz"], "(2, 2, 8, 4)"),
        ([run, prompt, frozen, f"--gin.Generation.g_file={tmp_path}/none.npz"], "none.npz"),
        ([run, f"--prompt={'x' * 200}"], "context of 32"),
        ([run, "--prompt="], "prompt 1: the prompt is empty"),
        ([run, prompt, "--promt=x"], "--promt"),
        ([run, prompt, "--temperature=-1"], "Generation.temperature"),
        ([run, prompt, "--top_p=0"], "Generation.top_p"),
    ]
    for arguments, named in cases:
        status, out, error = run_here(capsys, infer_main, *arguments)
        assert status in (1, 2) and out == "", arguments
        assert error.startswith(("error: ", "infer.py: error: ")), arguments
        first, *rest = error.splitlines()
        assert named in first, (arguments, error)
        assert not rest or [line.split(",")[0] for line in rest] == ["1 prompt"], error


def test_damaged_checkpoint_is_one_line(run_dir, tmp_path, capsys) -> None:
    damaged = shutil.copytree(run_dir, tmp_path / "run")
    for file in damaged.glob("checkpoints/*/state/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    arguments = (f"--checkpoint={damaged}", f"--prompt={PROMPT}")
    status, out, error = run_here(capsys, infer_main, *arguments)
    assert (status, out) == (1, "")
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error


def test_run_folder_is_not_changed(run_dir, infer) -> None:
    before = sorted(run_dir.rglob("*"))
    infer()
    assert sorted(run_dir.rglob("*")) == before
