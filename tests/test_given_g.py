"""G_LM of one run in another: `pldr-analyze --tensors`, training with that, `--other_g`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    QUICK,
    compiled_programs_kept,
    corpus_of,
    flags,
    one_device_mesh,
    rows_of,
    run_here,
    stored,
    untrained_run,
)

from pldr_jax.analysis.alteration import Alteration
from pldr_jax.analysis.section import Settings
from pldr_jax.analysis.texts import rows_of_file
from pldr_jax.api import load
from pldr_jax.cli.analyze import analyze_main
from pldr_jax.cli.training.train import train_main
from pldr_jax.config import MeshConfig
from pldr_jax.training import loop

ROWS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.getbasetemp())


def analyzed(capsys: Any, run: Path, out: Path, *arguments: object) -> dict[str, dict[str, float]]:
    """The alterations of a report."""
    given = (run, f"--out={out}", f"--rows={ROWS}", "--sections=alteration", *arguments)
    status, _, error = run_here(capsys, analyze_main, *given)
    assert status == 0, error
    (report,) = json.loads((out / "report.json").read_text())["runs"].values()
    return report["sections"]["alteration"]["numbers"]["alterations"]


def test_training_with_the_g_lm_of_a_report(
    run_dir, text, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays what it was, bit for bit, in all of a run, its checkpoints, and a run that goes on
    without the file; and it is the same to `--other_g` as the file and as the run that has it.
    """
    monkeypatch.setattr(loop, "build_mesh", one_device_mesh)
    analyzed(capsys, run_dir, tmp_path / "report", "--tensors")
    tensors = tmp_path / "report" / "tensors.npz"
    G_LM = np.load(tensors)["G_LM"]
    assert G_LM.shape == (2, 2, 8, 8) and np.ptp(G_LM) > 0
    fields = {
        **QUICK,
        "Model.unroll": False,
        "Model.num_gated_units": 1,
        "Model.g_source": "external",
        "Model.g_file": tensors,
        "Training.sample_prompt": "def ",
    }
    given = tmp_path / "identity"  # also the name of an alteration
    status, _, error = run_here(capsys, train_main, f"--run_dir={given}", *flags(text, fields))
    assert status == 0, error
    state, _, step = stored(given)
    assert step == 2 and "plga" not in state.params["layers"]["attention"]
    np.testing.assert_array_equal(state.g_lm[:, 0], np.float32(G_LM))
    assert rows_of(given)[-1]["eval/loss"] > 0 and "eval/causal_gap" not in rows_of(given)[-1]
    assert (given / "samples.txt").read_text().startswith("--- step 2\ndef ")

    numbers = analyzed(
        capsys, run_dir, tmp_path / "other", f"--other_g={tensors}", f"--other_g={given}"
    )
    assert list(numbers)[:4] == ["own", "mean", "tensors.npz", "identity_2"]
    assert numbers["tensors.npz"] == numbers["identity_2"]
    different = [numbers[name]["loss"] for name in ("own", "mean", "tensors.npz", "identity")]
    assert len(set(different)) == 4

    moved = tensors.rename(tmp_path / "moved.npz")
    longer = flags(text, {**fields, "Training.steps": 3})
    status, printed, error = run_here(capsys, train_main, f"--run_dir={given}", *longer)
    assert status == 0 and "continuing at step 2" in printed, error
    alone, split = load(given), load(given, mesh=MeshConfig(4, 1, 2))
    np.testing.assert_array_equal(alone.g_lm, state.g_lm)
    tokens = np.arange(24).reshape(4, 6)
    for g_lm in (None, alone(tokens).deductive.G_LM):
        logits = split(tokens, g_lm).logits
        np.testing.assert_allclose(logits, alone(tokens).logits, rtol=0, atol=1e-5)
    (one,), (other,) = (lm.generate(["def "], 4, stop_ids=[]) for lm in (alone, split))
    assert one.tokens == other.tokens and len(one.tokens) == 4
    status, _, error = run_here(capsys, train_main, f"--run_dir={tmp_path / 'new'}", *longer)
    assert status == 2 and "Model.g_file" in error and error.count("\n") == 1
    assert moved.exists() and not (tmp_path / "new" / "checkpoints").exists()


def test_other_g_is_what_it_says(run_dir, tmp_path, capsys) -> None:
    """Against the same rows with that G_LM in Python."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(["return the list of tokens", "for value in range"] * 40))
    rng = np.random.default_rng(2)
    G_LM = rng.normal(size=(2, 2, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "mine.npz", G_LM=G_LM)
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "7")
    arguments = (f"--other_g={tmp_path / 'mine.npz'}", f"--other_g={copy}", f"--prompts={prompts}")
    numbers = analyzed(capsys, run_dir, tmp_path / "out", *arguments)
    with compiled_programs_kept():
        lm, earlier = load(run_dir), load(copy)
        rows_RC = rows_of_file(prompts, lm.tokenizer, ROWS, lm.config.context_length)
        others = {"mine.npz": G_LM, "copy": earlier}
        section = Alteration.measure(lm, rows_RC, Settings(other_g=others))
        expected = section.numbers["alterations"]
    assert list(numbers) == list(expected)
    for name, values in expected.items():
        assert numbers[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert len({numbers[name]["loss"] for name in ("own", "mean", "mine.npz", "copy")}) == 4


@pytest.mark.parametrize("shape", [(2, 2, 8, 4), (1, 2, 8, 8)])
def test_a_g_lm_of_another_model_is_one_line(run_dir, tmp_path, capsys, shape) -> None:
    np.save(tmp_path / "g.npy", np.zeros(shape, np.float32))
    arguments = (f"--out={tmp_path / 'out'}", f"--other_g={tmp_path / 'g.npy'}")
    status, printed, error = run_here(capsys, analyze_main, run_dir, f"--rows={ROWS}", *arguments)
    assert status == 2 and printed == "" and not (tmp_path / "out").exists()
    last = error.splitlines()[-1]
    assert last.startswith("error: --other_g = ") and "this model needs (2, 2, 8, 8)" in last


def test_a_path_that_is_not_there_is_one_line(run_dir, tmp_path, capsys) -> None:
    arguments = (f"--out={tmp_path / 'out'}", "--other_g=none.npz")
    status, _, error = run_here(capsys, analyze_main, run_dir, f"--rows={ROWS}", *arguments)
    assert status == 2 and "--other_g = 'none.npz': no such file" in error.splitlines()[-1]
