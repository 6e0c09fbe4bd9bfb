"""Whole runs: what a run leaves behind, every kind of model, and what is refused."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    FINISHED,
    QUICK,
    REPOSITORY,
    contents,
    corpus_of,
    finished_run,
    flags,
    one_device_mesh,
    record_batches,
    rows_of,
    run_here,
    run_program,
    small_disk,
    stored,
    tiny_config,
    train_here,
)

import pldr_jax
from pldr_jax.cli.training.train import train_main
from pldr_jax.config import GROUPS
from pldr_jax.config.load import load_config
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import locked
from pldr_jax.training import loop
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.optimizer import decayed_matrices

OUTPUTS = ("A", "A_LM", "A_P", "G_LM")
EVALUATION = {
    *("eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte"),
    *("eval/loss_frozen_g", "eval/causal_gap"),
    *(f"eval/order_parameter/{name}" for name in OUTPUTS),
    *(f"eval/dag_loss/{name}" for name in OUTPUTS[1:]),
}
PREDEFINED = {"eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte"}


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return finished_run(tmp_path_factory.getbasetemp())


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run_dir) if "eval/loss" in row]


def training(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(run_dir) if "train/loss" in row]


def test_run_folder_holds_what_is_documented(finished, source) -> None:
    run_dir, output = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        *("config.gin", "tokenizer.model", "checkpoints", "metrics.jsonl", "samples.txt"),
        *("tensorboard", "curves.png", "tokenizer.model.sha256"),
    }
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    events = list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert events and b"eval/causal_gap" in events[0].read_bytes()
    assert Tokenizer.load(run_dir / "tokenizer.model").vocab_size == 300
    samples = (run_dir / "samples.txt").read_text()
    assert re.findall(r"^--- step (\d+)$", samples, re.M) == ["4", "8", "12"]
    assert samples.count("\ndef ") == 3
    assert f"run folder {run_dir}" in output and str(run_dir / "curves.png") in output


def test_config_of_a_run_can_be_fed_back(finished, source) -> None:
    expected = tiny_config(source, FINISHED)
    assert load_config([finished[0] / "config.gin"]) == expected


def test_metrics_have_the_documented_names(finished) -> None:
    run_dir, _ = finished
    assert [row["step"] for row in evaluations(run_dir)] == [4, 8, 12]
    for row in evaluations(run_dir):
        assert set(row) >= EVALUATION | {"step"}
        assert all(isinstance(row[name], float) for name in EVALUATION)
        gap = row["eval/loss_frozen_g"] - row["eval/loss"]
        assert row["eval/causal_gap"] == pytest.approx(gap, abs=1e-6)
        assert row["eval/perplexity"] == pytest.approx(np.exp(row["eval/loss"]))
    assert [row["step"] for row in training(run_dir)] == [2, 4, 6, 8, 10, 12]


def test_loss_falls(finished) -> None:
    run_dir, _ = finished
    rows, held_out = training(run_dir), evaluations(run_dir)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.5
    assert held_out[-1]["eval/loss"] < held_out[0]["eval/loss"] - 0.2
    assert held_out[-1]["eval/bits_per_byte"] < 8 * held_out[-1]["eval/loss"] / 5.55


def test_a_causal_gap_is_warned_of(finished) -> None:
    warnings = [line for line in finished[1].splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and "G_LM" in warnings[0]


def test_external_g_lm_is_in_the_checkpoint(source, tmp_path) -> None:
    g_file, run_dir = tmp_path / "g.npz", tmp_path / "run"
    g_lm = np.random.default_rng(0).normal(size=(2, 2, 8, 8)).astype(np.float32)
    np.savez(g_file, G_LM=g_lm)
    fields = {**QUICK, "Model.g_source": "external", "Model.g_file": g_file}
    assert set(train_here(tiny_config(source, fields), run_dir)) == PREDEFINED
    g_file.unlink()
    lm = pldr_jax.load(run_dir)
    np.testing.assert_array_equal(np.asarray(lm([[5, 6, 7]]).deductive.G_LM)[:, 0], g_lm)
    assert len(lm.generate("def ", max_new_tokens=3, stop_ids=[])[0].tokens) == 3
    # It is enough to continue from, too.
    train_here(tiny_config(source, {**fields, "Training.steps": 3}), run_dir)
    assert [row["step"] for row in evaluations(run_dir)] == [2, 3]
    np.testing.assert_array_equal(np.asarray(pldr_jax.load(run_dir).g_lm)[:, 0], g_lm)


def test_identity_g_lm(source, tmp_path) -> None:
    config = tiny_config(source, {**QUICK, "Model.g_source": "identity"})
    assert set(train_here(config, tmp_path)) == PREDEFINED
    lm = pldr_jax.load(tmp_path)
    given = lm([[5, 6, 7]], g_lm=np.broadcast_to(np.eye(8), (2, 2, 8, 8))).logits
    np.testing.assert_allclose(lm([[5, 6, 7]]).logits, given, atol=1e-5)
    assert len(lm.generate("def ", max_new_tokens=3, stop_ids=[])[0].tokens) == 3


def test_random_g_lm_with_decay_of_matrices_only(source, tmp_path) -> None:
    fields = {**QUICK, "Model.g_source": "random", "Training.log_every": 1}
    fields |= {"Optimizer.decay_mask": "matrices", "Optimizer.weight_decay": 1.0}
    fields |= {"Optimizer.clip": "norm", "Optimizer.clip_threshold": 1e-12}
    fields |= {"Checkpoint.save_every": 1}
    assert set(train_here(tiny_config(source, fields), tmp_path)) == PREDEFINED
    first, last = (stored(tmp_path, step)[0] for step in (1, 2))
    used = np.asarray(pldr_jax.load(tmp_path)([[5, 6, 7]]).deductive.G_LM)
    np.testing.assert_array_equal(used, first.g_lm)
    np.testing.assert_array_equal(used, last.g_lm)
    assert 0.8 < used.std() < 1.2
    # Clipped to nothing, the update is the decay of the matrices and nothing else.
    rows, mask = training(tmp_path), decayed_matrices(first.params)
    assert rows[1]["train/grad_norm"] > 1e-3  # measured before clipping
    assert {True, False} == set(jax.tree.leaves(mask))
    rate = rows[1]["train/learning_rate"]
    for (path, decays), before, after in zip(
        jax.tree.leaves_with_path(mask),
        jax.tree.leaves(first.params),
        jax.tree.leaves(last.params),
        strict=True,
    ):
        expected = before * (1 - rate) if decays else before
        np.testing.assert_allclose(after, expected, atol=1e-6, err_msg=str(path))


def test_bfloat16_remat_and_dag_losses(source, tmp_path, capsys) -> None:
    weights = {"a_lm": 0.5, "a_p": 0.25, "g_lm": 2.0}
    fields = {**QUICK, **{f"Loss.dag_{name}": value for name, value in weights.items()}}
    fields |= {"Model.dtype": "bfloat16", "Model.remat": "full"}
    fields |= {"Training.log_every": 100, "Training.gap_threshold": 50.0}
    train_here(tiny_config(source, fields), tmp_path)
    (row,) = training(tmp_path)
    assert row["step"] == 2  # the last one is always logged
    dag = {name: row[f"train/dag_loss/{name.upper()}"] for name in weights}
    assert all(value > 0 for value in dag.values())
    total = row["train/loss"] + sum(weights[name] * dag[name] for name in weights)
    assert row["train/total_loss"] == pytest.approx(total, rel=1e-5)
    output = capsys.readouterr().out
    assert "causal gap" in output and "warning" not in output
    lm = pldr_jax.load(tmp_path)
    assert (lm.config.dtype, lm.config.remat) == ("bfloat16", "full")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"float32"}
    assert np.isfinite(lm([[5, 6, 7]]).logits).all()


def test_loss_that_is_not_finite_ends_the_run(source, tmp_path) -> None:
    run_dir = tmp_path / "run"
    # The first update has learning rate 0, the second 1e30.
    fields = {"Optimizer.learning_rate": 1e30, "Optimizer.clip": "none"}
    fields |= {"Checkpoint.save_every": 1, "Optimizer.warmup_steps": 1, "Training.log_every": 100}
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(source, fields))
    assert result.returncode == 1
    message = r"error: step \d+: train/\w+ = .*Optimizer\.learning_rate.*\n"
    assert re.fullmatch(message, result.stderr)
    good = stored(run_dir)[2]
    assert f"step {good} in {run_dir} is the last good checkpoint" in result.stderr
    broken = training(run_dir)[-1]
    assert broken["step"] == good + 1 and None in broken.values()
    lm = pldr_jax.load(run_dir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lm.params))
    assert np.isfinite(lm([[5, 6, 7]]).logits).all()


REFUSED = {
    "typo": (["--gin.Model.num_layer=2"], "Model.num_layers"),
    "flag": (["--run_dri=x"], "--run_dri"),
    "type": (["--gin.Model.num_layers=two"], "Model.num_layers"),
    "range": (["--gin.Model.num_layers=0"], "Model.num_layers"),
    "choice": (["--gin.Model.dtype=float16"], "Model.dtype"),
    "inconsistent": (["--gin.Optimizer.warmup_steps=12"], "Optimizer.warmup_steps"),
    "batch": (["--gin.Data.batch_size=6"], "Data.batch_size"),
    "mesh": (["--gin.Mesh.data=3"], "Mesh.data"),
    "gin file": (["--gin_file=missing.gin"], "missing.gin"),
    "source": (["--gin.Data.source=missing_folder"], "Data.source"),
    "vocabulary": (["--gin.Model.vocab_size=100"], "Model.vocab_size"),
    "too little text": (["--gin.Model.context_length=8192"], "Data"),
    "tokenizer": (["--gin.Data.tokenizer=missing.model"], "Data.tokenizer"),
    "nothing to resume": (["--resume=required"], "--resume=required"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(source, tmp_path, capsys, case: str) -> None:
    extra, named = REFUSED[case]
    run_dir = tmp_path / "run"
    arguments = (f"--run_dir={run_dir}", *flags(source), *extra)
    status, _, error = run_here(capsys, train_main, *arguments)
    assert status == 2
    assert error.startswith(("error: ", "train.py: error: ")) and error.count("\n") == 1
    assert named in error
    assert not run_dir.exists()


def test_run_dir_that_cannot_be_made(source, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    argument = f"--run_dir={tmp_path / 'file'}"
    status, _, error = run_here(capsys, train_main, argument, *flags(source))
    assert status == 2 and error.count("\n") == 1
    assert error.startswith(f"error: {argument}")
    assert contents(tmp_path) == {"file": b"mine"}


def test_program_refuses_in_one_line(source, tmp_path) -> None:
    common = (f"--run_dir={tmp_path / 'run'}", *flags(source))
    for name, value in (("Model.num_layer", "2"), ("Data.source", "missing_folder")):
        result = run_program("train.py", *common, f"--gin.{name}={value}")
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(rf"(train\.py: )?error: .*{re.escape(name)}.*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_field() -> None:
    result = run_program("train.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for group, cls in GROUPS.items():
        for name in cls.__dataclass_fields__:
            assert f"--gin.{group}.{name} " in result.stdout
    assert "--run_dir" in result.stdout and "--resume" in result.stdout


def test_profile_of_some_steps(source, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(loop, "build_mesh", one_device_mesh)
    arguments = (f"--run_dir={tmp_path / 'run'}", *flags(source, QUICK))
    status, out, _ = run_here(capsys, train_main, *arguments, "--profile=2:1")
    assert status == 0 and f"trace: {tmp_path / 'run' / 'profile'}" in out
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    for wrong in ("1", "0:3", "a:b"):
        status, _, err = run_here(capsys, train_main, *arguments, f"--profile={wrong}")
        assert (
            status == 2
            and err == f"error: --profile={wrong}: must be STEP:COUNT, two positive numbers\n"
        )


def test_a_run_folder_in_use_is_refused(source, tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    with locked(run_dir):
        status, _, err = run_here(capsys, train_main, f"--run_dir={run_dir}", *flags(source, QUICK))
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --run_dir={run_dir}: is in use by process {os.getpid()}")
    with locked(run_dir):  # a lock that was left is no lock
        pass


def test_every_evaluation_is_drawn_and_the_best_one_saved(source, tmp_path, monkeypatch) -> None:
    drawn: list[bool] = []
    losses = iter([3.0, 4.0, 2.0, 5.0])

    def evaluate(*_: Any) -> dict[str, float]:
        loss = next(losses)
        return {"eval/loss": loss, "eval/bits_per_byte": loss / 2}

    monkeypatch.setattr(Evaluator, "__call__", evaluate)
    record_batches(monkeypatch, lambda n: drawn.append((tmp_path / "curves.png").exists()))
    fields = {**QUICK, "Training.steps": 7, "Training.eval_every": 2}
    fields |= {"Checkpoint.save_every": 1000, "Checkpoint.keep_last": 1}
    train_here(tiny_config(source, fields), tmp_path)
    assert drawn == [False, False, True, True, True, True, True]
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"6", "7", "manifests"}
    assert stored(tmp_path)[1]["best"] == 2.0


@pytest.mark.parametrize("shell", ["{} | head -n 1", "{} <&- >&- 2>&-", "{} >/dev/full"])
def test_a_run_outlives_its_terminal(source, tmp_path, shell: str) -> None:
    arguments = (sys.executable, "train.py", f"--run_dir={tmp_path / 'run'}", *flags(source, QUICK))
    command = shell.format(" ".join(map(shlex.quote, arguments)))
    end = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert end.returncode == 0 and not end.stderr, end
    assert stored(tmp_path / "run")[2] == 2


def test_a_disk_that_fills_up_is_one_line(source, tmp_path) -> None:
    """And the program ends."""
    fields = {**QUICK, "Training.steps": 50, "Checkpoint.save_every": 1, "Checkpoint.keep_last": 50}
    with small_disk(tmp_path / "disk", 1500) as disk:
        run_dir = disk / "run"
        result = run_program("train.py", f"--run_dir={run_dir}", *flags(source, fields))
        assert result.returncode == 1
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert "No space left on device" in result.stderr
        assert stored(run_dir)[2] >= 1
        rows_of(run_dir)
