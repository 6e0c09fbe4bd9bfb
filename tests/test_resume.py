"""A run that was stopped, by whatever means, continues to the same bits."""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    FINISHED,
    STEPS,
    assert_equal_runs,
    assert_same_bits,
    contents,
    corpus_of,
    finished_run,
    flags,
    make_corpus,
    record_batches,
    rows_of,
    run_here,
    run_program,
    stored,
    tiny_config,
    train_here,
)

from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError
from pldr_jax.inference.engine import Engine
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.training import loop
from pldr_jax.training.evaluate import Evaluator


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp())[0]


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A run in this process, and the batches that it took."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        batches = record_batches(patch)
        train_here(tiny_config(source), run_dir)
    assert len(batches) == STEPS
    return run_dir, batches


@pytest.mark.parametrize(("name", "at"), [("SIGTERM", 5), ("SIGINT", 8)])
def test_signal_saves_and_the_rest_is_bit_for_bit(
    source, tmp_path, uninterrupted, capsys, monkeypatch, name: str, at: int
) -> None:
    reference, expected = uninterrupted
    run_dir, number = tmp_path / "run", getattr(signal, name)

    def on_batch(n: int) -> None:
        if n == at:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    batches = record_batches(monkeypatch, on_batch)
    train_here(tiny_config(source), run_dir)
    output = capsys.readouterr().out
    assert f"{name}: saved step {at} of {STEPS} in {run_dir}" in output
    assert len(batches) == at and signal.getsignal(number) is handler
    state, data, step = stored(run_dir)
    assert (step, int(state.step), data["next_row"]) == (at, at, 8 * at)
    train_here(tiny_config(source), run_dir, resume="required")
    assert f"continuing at step {at}" in capsys.readouterr().out
    assert [batch.tobytes() for batch in batches] == [batch.tobytes() for batch in expected]
    assert_equal_runs(run_dir, reference)


LAW = {
    "Model.init": "normalized",
    "Loss.targets": "random_one",
    "Optimizer.name": "muon",
    "Optimizer.schedule": "hold",
    "Optimizer.hold_until": 6,
    "Optimizer.pulses": "((4, 3, 1e-3),)",
    "Optimizer.generator_learning_rate": 1e-2,
    "Optimizer.average_decay": 0.9,
    "Training.freeze": "(('couplings', 7), ('embedding', 0))",
    "Training.sample_prompt": "",
}


def test_a_run_under_another_law_goes_on_to_the_same_bits(
    source, tmp_path, monkeypatch, capsys
) -> None:
    """What is frozen too, and the stated order of its rows, over which it goes twice."""
    order = tmp_path / "order.npy"
    np.save(order, np.random.default_rng(1).permutation(48))
    config = tiny_config(source, LAW | {"Data.order": order, "Data.epochs": 2})
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        batches = record_batches(patch)
        train_here(config, whole)
        np.testing.assert_array_equal(batches[0], batches[6])

    def on_batch(n: int) -> None:
        if n == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        record_batches(patch, on_batch)
        train_here(config, run_dir)
        train_here(config, run_dir, resume="required")
    assert_equal_runs(run_dir, whole)
    (early, *_), (late, *_) = stored(whole, 9), stored(whole, 12)
    plga = [state.params["layers"]["attention"]["plga"] for state in (early, late)]
    assert_same_bits(*({name: each[name] for name in ("W", "P", "a")} for each in plga))
    evaluated = [row for row in rows_of(whole) if "eval/loss" in row]
    assert {"eval/average/loss", "eval/loss_last", "eval/average/loss_last"} <= set(evaluated[-1])
    assert evaluated[-1]["eval/average/loss"] != evaluated[-1]["eval/loss"]
    with pytest.raises(ConfigError, match="the text is used up after 6 steps"):
        train_here(tiny_config(source, LAW | {"Data.order": order}), tmp_path / "short")


def signal_in_compilation(patch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the first step is compiled, from another thread."""
    jit = loop.jit_train_step

    def jit_and_signal(*arguments: Any) -> Any:
        step = jit(*arguments)

        def lowered(state: Any, rows: Any) -> Any:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            patch.setattr(loop, "jit_train_step", jit)
            compiled = step.lower(state, rows).compile()
            time.sleep(0.1)
            return compiled(state, rows)

        calls = iter([lowered])
        return lambda state, rows: next(calls, step)(state, rows)

    patch.setattr(loop, "jit_train_step", jit_and_signal)


def signal_in(owner: type, method: str) -> Callable[[pytest.MonkeyPatch], None]:
    """SIGTERM in the midst of the first call of a method, to the thread that handles it: on a busy
    machine another thread, to which a signal of the process may go, can run some steps later.
    """

    def install(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, method)

        def call(*arguments: Any, **options: Any) -> Any:
            patch.setattr(owner, method, original)
            result = original(*arguments, **options)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
            return result

        patch.setattr(owner, method, call)

    return install


MOMENTS = {
    "compilation": (signal_in_compilation, {1}),
    "evaluation": (signal_in(Evaluator, "__call__"), {5}),
    "sample": (signal_in(Engine, "run"), {5}),
    "save": (signal_in(Checkpointer, "save"), {4}),
}
"""Where a signal comes, and the step that is then saved."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_signal_at_a_busy_moment(
    source, tmp_path, uninterrupted, capsys, monkeypatch, moment: str
) -> None:
    install, steps = MOMENTS[moment]
    with monkeypatch.context() as patch:
        install(patch)
        train_here(tiny_config(source), tmp_path)
    assert "SIGTERM: saved step" in capsys.readouterr().out
    assert stored(tmp_path)[2] in steps
    train_here(tiny_config(source), tmp_path)
    assert_equal_runs(tmp_path, uninterrupted[0])


def test_worker_processes_resume_to_the_same_bits(
    source, tmp_path, uninterrupted, monkeypatch
) -> None:
    config = tiny_config(source, {"Data.workers": 1})
    with monkeypatch.context() as patch:
        record_batches(patch, lambda n: n != 5 or os.kill(os.getpid(), signal.SIGTERM))
        train_here(config, tmp_path)
    assert stored(tmp_path)[2] == 5
    train_here(config, tmp_path)
    assert rows_of(tmp_path) == rows_of(uninterrupted[0])
    assert_same_bits(stored(tmp_path)[0], stored(uninterrupted[0])[0])


def test_another_mesh_continues_with_the_same_numbers(source, tmp_path) -> None:
    """To 1e-5: without PLGA, and an epsilon that keeps the rounding of near-zero gradients from
    changing whole updates, as in test_hosts.py.
    """
    fields = {
        "Model.g_source": "identity",
        "Optimizer.eps": 1e-2,
        "Training.log_every": 1,
        "Training.sample_prompt": "",
    }
    mesh = {"Mesh.data": 2, "Mesh.fsdp": 2, "Mesh.tensor": 2}
    short = {**fields, "Training.steps": 4}
    train_here(tiny_config(source, short), tmp_path / "moved")
    train_here(tiny_config(source, fields), tmp_path / "stayed")
    loop.train(tiny_config(source, {**fields, **mesh}), tmp_path / "moved")
    moved, stayed = (
        {row["step"]: row for row in rows_of(tmp_path / name) if "train/loss" in row}
        for name in ("moved", "stayed")
    )
    assert list(moved) == list(stayed) == list(range(1, STEPS + 1))
    for step, row in stayed.items():
        assert moved[step]["train/loss"] == pytest.approx(row["train/loss"], abs=1e-5), step
    mine, theirs = (stored(tmp_path / name)[0].params for name in ("moved", "stayed"))
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_signal_at_the_last_step_ends_the_run_as_usual(
    source, tmp_path, uninterrupted, capsys, monkeypatch
) -> None:
    record_batches(monkeypatch, lambda n: n < STEPS or os.kill(os.getpid(), signal.SIGTERM))
    train_here(tiny_config(source), tmp_path)
    assert "saved step" not in capsys.readouterr().out and (tmp_path / "curves.png").exists()
    assert_equal_runs(tmp_path, uninterrupted[0])


def test_crash_between_checkpoints_repeats_nothing(
    source, tmp_path, uninterrupted, monkeypatch
) -> None:
    """The evaluation and the sample of step 4 were written, its state was not."""

    def crash(*_: Any) -> bool:
        raise OSError("crash")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="crash"):
        patch.setattr(loop.Trainer, "_is_best", crash)
        train_here(tiny_config(source), tmp_path)
    assert stored(tmp_path)[2] == 3 and rows_of(tmp_path)[-1]["step"] == 4
    assert "--- step 4\n" in (tmp_path / "samples.txt").read_text()
    train_here(tiny_config(source), tmp_path)
    assert_equal_runs(tmp_path, uninterrupted[0])


def test_program_started_again_after_the_end(copy, finished) -> None:
    before = contents(copy / "checkpoints")
    result = run_program("train.py", f"--gin_file={copy / 'config.gin'}", f"--run_dir={copy}")
    assert result.returncode == 0, result.stderr
    assert "nothing left to train" in result.stdout
    assert f"eval/loss {rows_of(copy)[-1]['eval/loss']:.4f}" in re.sub(" +", " ", result.stdout)
    assert contents(copy / "checkpoints") == before
    assert_equal_runs(copy, finished)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--gin.Model.num_residual_layers=2"], "Model.num_residual_layers: 1 -> 2"),
        (["--gin.Model.g_source=identity"], "Model.g_source: 'learned' -> 'identity'"),
        (["--resume=never"], "--resume=never"),
    ],
)
def test_refused_before_anything_is_changed(copy, source, capsys, extra, named: str) -> None:
    before = contents(copy)
    arguments = (f"--run_dir={copy}", *flags(source, FINISHED), *extra)
    status, _, error = run_here(capsys, train_main, *arguments)
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert named in error and str(copy) in error
    assert contents(copy) == before


def test_changed_text_with_another_tokenizer_is_refused(copy, tmp_path, capsys) -> None:
    other = make_corpus(tmp_path / "text", 50)
    before = contents(copy)
    arguments = (f"--run_dir={copy}", *flags(other, FINISHED))
    status, _, error = run_here(capsys, train_main, *arguments)
    assert status == 2 and error.count("\n") == 1 and "Data.tokenizer" in error
    assert contents(copy) == before


def test_more_steps_continue_with_a_note(source, tmp_path, uninterrupted, capsys) -> None:
    reference, _ = uninterrupted
    run_dir = shutil.copytree(reference, tmp_path / "run")
    longer = tiny_config(source, {"Training.steps": STEPS + 2, "Training.eval_rows": 8})
    train_here(longer, run_dir)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "Training.steps: 12 -> 14" in notes[0]
    assert stored(run_dir)[2] == STEPS + 2
    assert_same_bits(stored(run_dir, STEPS)[0], stored(reference)[0])
    rows = rows_of(run_dir)
    assert rows[: len(rows_of(reference))] == rows_of(reference)
    assert rows[-1]["step"] == STEPS + 2 and "eval/loss" in rows[-1]
    assert "Training.steps = 14" in (run_dir / "config.gin").read_text()
