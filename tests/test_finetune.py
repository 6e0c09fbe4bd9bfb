"""Fine-tuning begins with the weights alone and never again; tasks at evaluation intervals."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from helpers import (
    QUICK,
    assert_same_bits,
    corpus_of,
    flags,
    one_device_mesh,
    rows_of,
    run_here,
    stored,
    tiny_config,
    train_here,
)

from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ExperimentConfig
from pldr_jax.config.load import config_from_dict, config_to_dict, load_config
from pldr_jax.data.mixture import open_training_text
from pldr_jax.interop.convert import export_run
from pldr_jax.model.decoder import init_params
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.folder import write_run
from pldr_jax.training import loop
from pldr_jax.training.finetune.begin import start_from
from pldr_jax.training.freeze.calibrate import without_plga
from pldr_jax.training.start import first_state

FIELDS = {**QUICK, "Training.steps": 1, "Optimizer.warmup_steps": 1, "Optimizer.decay_steps": 4}
"""One step, whose learning rate is 0: the weights are still those that it began with."""

MODEL = {"Model.unroll": "False", "Model.num_layers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of weights that no seed gives."""
    folder = tmp_path_factory.mktemp("base") / "run"
    make_base(folder, tiny_config(source, MODEL))
    return folder


def make_base(folder: Path, config: ExperimentConfig) -> None:
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(77)))
    g_lm = None
    if config.model.g_source == "external":
        params = without_plga(params)
        g_lm = jax.random.normal(jax.random.key(8), (1, 1, 2, 8, 8))
    tokenizer = open_training_text(config.data, config.model.vocab_size).tokenizer
    files = {"tokenizer.model": tokenizer.model_bytes}
    write_run(folder, 33, params, g_lm, config_to_dict(config), files)


@pytest.fixture
def train(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`train.py` in this process: status, stdout, stderr."""
    monkeypatch.setattr(loop, "build_mesh", one_device_mesh)

    def run(run_dir: Path, init: Path, *more: str, **fields: Any) -> tuple[Any, ...]:
        chosen = {**FIELDS, **{name.replace("_", ".", 1): x for name, x in fields.items()}}
        kept = [f for f in flags(source, chosen) if not f.startswith("--gin.Model.")]
        return run_here(
            capsys, train_main, f"--run_dir={run_dir}", f"--init_from={init}", *kept, *more
        )

    return run


def test_weights_alone_once(train: Any, base: Path, tmp_path: Path) -> None:
    copy, run_dir = shutil.copytree(base, tmp_path / "base"), tmp_path / "run"
    status, shown, error = train(run_dir, copy)
    assert status == 0, error
    assert f"weights of {copy} (step 33): " in shown and "begin anew" in shown
    state, _, step = stored(run_dir)
    weights = read_weights(base)
    assert step == 1 and int(state.step) == 1
    assert_same_bits(state.params, jax.device_get(weights.params))
    config = load_config([run_dir / "config.gin"])
    assert config.model == config_from_dict(weights.config_dict).model
    assert config.data.tokenizer == str(copy / "tokenizer.model")
    # Goes on without the checkpoint, to what a run that had not stopped comes to.
    shutil.rmtree(copy)
    status, shown, error = train(run_dir, copy, Training_steps=3)
    assert status == 0, error
    assert "not read again" in shown and "continuing at step 1" in shown
    whole = tmp_path / "whole"
    status, _, error = train(whole, base, Training_steps=3)
    assert status == 0, error
    assert_same_bits(stored(run_dir)[0], stored(whole)[0])
    moved, first = stored(run_dir)[0].params["head"]["bias"], weights.params["head"]["bias"]
    assert np.abs(np.asarray(moved) - np.asarray(first)).max() > 1e-4


def test_from_the_transformers_layout_with_its_g_lm(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, hub = tmp_path / "frozen", tmp_path / "hub"
    make_base(run_dir, tiny_config(source, {**MODEL, "Model.g_source": "external"}))
    export_run(run_dir, hub, log=lambda line: None)
    # No weight depends on the context length.
    given = ["Model.context_length=16", "Training.steps=9", "Optimizer.warmup_steps=1"]
    config, initial = start_from(hub, tmp_path / "run", [], given)
    shown = capsys.readouterr().out
    assert "(transformers layout)" in shown and "G_LM external" in shown
    assert (config.model.context_length, config.training.steps) == (16, 9)
    assert initial is not None
    weights = read_weights(run_dir)
    with jax.set_mesh(one_device_mesh(config.mesh)):
        state = first_state(config, one_device_mesh(config.mesh), initial)
    assert_same_bits((state.params, state.g_lm), (weights.params, weights.g_lm))
    assert int(state.step) == 0


def test_the_files_of_an_import_are_kept(train: Any, base: Path, tmp_path: Path) -> None:
    hub, run_dir = tmp_path / "hub", tmp_path / "run"
    export_run(base, hub, log=lambda line: None)
    (hub / "chat_template.jinja").write_text("{{ messages }}")
    status, _, error = train(run_dir, hub)
    assert status == 0, error
    export_run(run_dir, tmp_path / "again", log=lambda line: None)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_does_not_fit_is_one_line(
    train: Any, base: Path, source: Path, tmp_path: Path
) -> None:
    run_dir, bare = tmp_path / "run", tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "tokenizer.model").unlink()
    data = tiny_config(source, {"Model.vocab_size": 310}).data
    other = open_training_text(data, 310).tokenizer
    other.save(tmp_path / "other.model")
    cases = [
        (
            (base, "--gin.Model.num_layers=2"),
            "--init_from=.* is another model .*num_layers: 1 -> 2",
        ),
        ((base, "--gin.Model.g_source=identity"), "g_source: 'learned' -> 'identity'"),
        ((base, f"--gin.Data.tokenizer={tmp_path / 'other.model'}"), "is another one than"),
        ((bare,), "has no tokenizer.model"),
        ((tmp_path / "nowhere",), "no such folder; give a run folder"),
        ((tmp_path,), "no complete checkpoint"),
    ]
    for arguments, message in cases:
        status, _, error = train(run_dir, *arguments)
        assert status != 0 and error.count("\n") == 1
        assert re.search(message, error), error
    assert not run_dir.exists()


# Tasks


def test_task_metrics_at_every_evaluation(source: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def measure(model: Any, params: Any, g_lm: Any, tokenizer: Any, mesh: Any) -> dict[str, float]:
        seen.append((model, g_lm, tokenizer.vocab_size, mesh.size))
        return {"eval/tasks/quiz/acc": float(len(seen))}

    fields = {**QUICK, **MODEL, "Training.steps": 2, "Training.eval_every": 1}
    config = tiny_config(source, fields)
    last = train_here(config, tmp_path / "run", task_metrics=measure)
    assert last["eval/tasks/quiz/acc"] == 2
    rows = [row for row in rows_of(tmp_path / "run") if "eval/loss" in row]
    assert [(row["step"], row["eval/tasks/quiz/acc"]) for row in rows] == [(1, 1), (2, 2)]
    assert seen == [(config.model, None, 300, 1)] * 2


def test_eval_tasks(
    base: Path, train: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    os.environ.setdefault("HF_HOME", str(tmp_path_factory.mktemp("datasets")))
    pytest.importorskip("lm_eval", reason="tasks need lm-eval; pip install 'pldr_jax[eval]'")
    run_dir = tmp_path / "run"
    tasks = ("--eval_tasks=pldr_quiz,pldr_text", "--eval_tasks_limit=3")
    status, shown, error = train(run_dir, base, *tasks)
    assert status == 0, error
    (row,) = [row for row in rows_of(run_dir) if "eval/loss" in row]
    names = {name for name in row if name.startswith("eval/tasks/")}
    assert names == {
        *(f"eval/tasks/pldr_quiz/{name}" for name in ("acc", "acc_norm")),
        *(f"eval/tasks/pldr_text/{n}" for n in ("word_perplexity", "byte_perplexity")),
        "eval/tasks/pldr_text/bits_per_byte",
    }
    assert f"pldr_quiz/acc {row['eval/tasks/pldr_quiz/acc']:.4g}" in shown
    # The same as the command gives for the checkpoint.
    from pldr_jax.cli.evaluate import evaluate_main

    evaluate_main(
        [str(run_dir), "--tasks=pldr_quiz,pldr_text", "--limit=3", "--mode=causal"]
        + [f"--output={tmp_path / 'out'}"]
    )
    found = json.loads((tmp_path / "out" / "results.json").read_text())["modes"]["causal"]
    for name in names:
        _, _, task, metric = name.split("/")
        assert found[task][metric] == pytest.approx(row[name], rel=1e-5)


def test_bad_eval_tasks(train: Any, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    status, _, error = train(tmp_path / "run", base, "--eval_tasks_limit=3")
    assert status != 0 and "name them with --eval_tasks" in error
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, _, error = train(tmp_path / "run", base, "--eval_tasks=pldr_quiz")
    assert status != 0 and "--eval_tasks: need lm-evaluation-harness" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
