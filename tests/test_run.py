"""Whole runs: what a run leaves behind, every kind of model, and what is refused."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    QUICK,
    STEPS,
    contents,
    corpus_of,
    finished_run,
    flags,
    rows_of,
    run_here,
    run_program,
    stored,
    tiny_config,
    train_here,
)

import pldr_jax
from pldr_jax.cli.train import train_main
from pldr_jax.config import GROUPS
from pldr_jax.data.tokenizer import Tokenizer
from pldr_jax.flags import load_config
from pldr_jax.training.optimizer import decayed_matrices

OUTPUTS = ("A", "A_LM", "A_P", "G_LM")
EVALUATION = {
    *("eval/loss", "eval/accuracy", "eval/perplexity", "eval/bits_per_byte"),
    *("eval/loss_frozen_g", "eval/causal_gap"),
    *(f"eval/order_parameter/{name}" for name in OUTPUTS),
    *(f"eval/dag_loss/{name}" for name in OUTPUTS[1:]),
}


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
        *("tensorboard", "curves.png"),
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
    expected = tiny_config(source, {"Training.tensorboard": True})
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


def test_last_step_is_logged_and_a_gap_warned_of(source, tmp_path, finished, capsys) -> None:
    fields = {**QUICK, "Training.log_every": 100, "Training.gap_threshold": 50.0}
    train_here(tiny_config(source, fields), tmp_path / "run")
    assert [row["step"] for row in training(tmp_path / "run")] == [2]
    assert "causal gap" in (output := capsys.readouterr().out) and "warning" not in output
    warnings = [line for line in finished[1].splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 3 and "G_LM" in warnings[0]


@pytest.mark.parametrize("g_source", ["identity", "random", "external"])
def test_predefined_g_lm(source, tmp_path, g_source: str) -> None:
    fields: dict[str, Any] = {**QUICK, "Model.g_source": g_source, "Model.g_seed": 3}
    g_file, run_dir = tmp_path / "g.npz", tmp_path / "run"
    g_lm = np.random.default_rng(0).normal(size=(2, 2, 8, 8)).astype(np.float32)
    if g_source == "external":
        np.savez(g_file, G_LM=g_lm)
        fields["Model.g_file"] = g_file
    metrics = train_here(tiny_config(source, fields), run_dir)
    assert set(metrics) == {f"eval/{x}" for x in ("loss", "accuracy", "perplexity", "bits_per_byte")}
    g_file.unlink(missing_ok=True)
    lm = pldr_jax.load(run_dir)
    assert lm.config.g_source == g_source
    used = np.asarray(lm([[5, 6, 7]]).deductive.G_LM)[:, 0]
    if g_source == "external":
        np.testing.assert_array_equal(used, g_lm)
    elif g_source == "identity":
        np.testing.assert_array_equal(used, np.broadcast_to(np.eye(8), used.shape))
    else:
        np.testing.assert_array_equal(used, np.asarray(stored(run_dir)[0].g_lm)[:, 0])
        assert 0.8 < used.std() < 1.2
    assert len(lm.generate("def ", max_new_tokens=3, stop_ids=[])[0].tokens) == 3
    # The checkpoint is enough to continue, too.
    longer = tiny_config(source, {**fields, "Training.steps": 3})
    train_here(longer, run_dir)
    assert [row["step"] for row in evaluations(run_dir)] == [2, 3]


def test_bfloat16_with_remat(source, tmp_path, finished) -> None:
    fields = {"Model.dtype": "bfloat16", "Model.remat": "full", "Training.sample_prompt": ""}
    train_here(tiny_config(source, fields), tmp_path / "run")
    state, _, step = stored(tmp_path / "run")
    assert step == STEPS
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    rows, reference = training(tmp_path / "run"), training(finished[0])
    for row, other in zip(rows, reference, strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], abs=0.05)
    assert rows != reference


def test_decay_mask_and_clip(source, tmp_path) -> None:
    common = {**QUICK, "Training.log_every": 1}
    quiet = {**common, "Optimizer.decay_mask": "matrices", "Optimizer.clip": "norm"}
    quiet |= {"Optimizer.clip_threshold": 1e-12, "Optimizer.weight_decay": 1.0}
    train_here(tiny_config(source, {**common, "Optimizer.clip": "none"}), tmp_path / "plain")
    train_here(tiny_config(source, quiet), tmp_path / "quiet")
    first, last = (stored(tmp_path / "quiet", step)[0].params for step in (1, 2))
    mask = decayed_matrices(first)
    assert {True, False} == set(jax.tree.leaves(mask))
    rate = training(tmp_path / "quiet")[1]["train/learning_rate"]
    # Clipped to nothing, the update is the decay of the matrices and nothing else.
    for (path, decays), before, after in zip(
        jax.tree.leaves_with_path(mask), jax.tree.leaves(first), jax.tree.leaves(last), strict=True
    ):
        expected = before * (1 - rate) if decays else before
        np.testing.assert_allclose(after, expected, atol=1e-7, err_msg=str(path))
    norms = {n: training(tmp_path / n)[1]["train/grad_norm"] for n in ("plain", "quiet")}
    assert norms["plain"] == pytest.approx(norms["quiet"], rel=1e-5)  # measured before clipping


def test_dag_losses_are_trained_on(source, tmp_path) -> None:
    weights = {"a_lm": 0.5, "a_p": 0.25, "g_lm": 2.0}
    fields = {**QUICK, **{f"Loss.dag_{name}": value for name, value in weights.items()}}
    train_here(tiny_config(source, fields), tmp_path / "run")
    row = training(tmp_path / "run")[-1]
    dag = {name: row[f"train/dag_loss/{name.upper()}"] for name in weights}
    assert all(value > 0 for value in dag.values())
    total = row["train/loss"] + sum(weights[name] * dag[name] for name in weights)
    assert row["train/total_loss"] == pytest.approx(total, rel=1e-5)


def test_loss_that_is_not_finite_ends_the_run(source, tmp_path) -> None:
    run_dir = tmp_path / "run"
    # The first update has learning rate 0, the second 1e30.
    fields = {"Optimizer.learning_rate": 1e30, "Optimizer.clip": "none", "Checkpoint.every_steps": 1}
    fields |= {"Optimizer.warmup_steps": 1, "Training.log_every": 100}
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(source, fields))
    assert result.returncode == 1
    assert re.fullmatch(r"error: step \d+: train/\w+ = .*Optimizer\.learning_rate.*\n", result.stderr)
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
    status, _, error = run_here(
        capsys, train_main, f"--run_dir={run_dir}", *flags(source), *extra
    )
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
    for arguments in (["--gin.Model.num_layer=2"], ["--gin.Data.source=missing_folder"]):
        result = run_program("train.py", f"--run_dir={tmp_path / 'run'}", *flags(source), *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(r"(train\.py: )?error: .*(Model\.num_layer|Data\.source).*\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_field() -> None:
    result = run_program("train.py", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    for group, cls in GROUPS.items():
        for name in cls.__dataclass_fields__:
            assert f"--gin.{group}.{name} " in result.stdout
    assert "--run_dir" in result.stdout and "--resume" in result.stdout
