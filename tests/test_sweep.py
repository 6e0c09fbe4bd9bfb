"""Sweeps: which runs, in which folders; what is done about finished, broken and failing ones."""

import csv
import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK, contents, corpus_of, flags, rows_of, run_here, untrained_run

from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import dump_config, load_run
from pldr_jax.runs.curves import write_comparison
from pldr_jax.terminal import Display
from pldr_jax.training.finetune.begin import model_of
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import StopRequest
from pldr_jax.training.sweep import runs as sweeps
from pldr_jax.training.sweep.phase import PANELS, _value, write_phase_diagram
from pldr_jax.training.sweep.points import SweepRun, runs_of
from pldr_jax.training.sweep.settings import Command, SweepConfig
from pldr_jax.training.sweep.sweep import list_runs
from pldr_jax.training.sweep.table import table_text, write_table

RATE, WARMUP = "Optimizer.learning_rate", "Optimizer.warmup_steps"
STEPS = 4
FIELDS = {
    **QUICK,
    "Model.num_layers": 1,
    "Model.unroll": False,
    "Training.steps": STEPS,
    "Checkpoint.save_every": 2,
}


def runs_here(folder: Path, *sweep: str, overrides: Sequence[str] = (), **others: Any) -> Any:
    command = Command(overrides=overrides)
    return runs_of(SweepConfig(sweep=sweep, **others), folder, command.config)


def test_tuple_fields_can_be_swept(tmp_path: Path) -> None:
    mixture = ["Data.mixture=('a', 'b')"]
    runs = runs_here(
        tmp_path, "Data.mixture_weights=(1,2),[0.5, 1],()", "Data.seed=1,2", overrides=mixture
    )
    assert [run.config.data.mixture_weights for run in runs[::2]] == [(1, 2), (0.5, 1), ()]
    assert [run.name for run in runs[:3]] == [
        "mixture_weights=_1.0__2.0_,seed=1",
        "mixture_weights=_1.0__2.0_,seed=2",
        "mixture_weights=_0.5__1.0_,seed=1",
    ]
    assert load_run([], [*mixture, *runs[2].overrides]) == runs[2].config
    # Folders have long names, which the names of runs shorten, and stay apart.
    long = "/data/" + "x" * 100
    swept = f"Data.mixture=('{long}/a', '{long}/c'),('{long}/b',)"
    first, second = runs_here(tmp_path, swept)
    assert first.config.data.mixture == (f"{long}/a", f"{long}/c")
    assert first.name != second.name and len(first.name) < 80
    # Brackets are nothing special in a field of another type.
    prompts = runs_here(tmp_path, "Training.sample_prompt=f(,g(")
    assert [run.config.training.sample_prompt for run in prompts] == ["f(", "g("]
    outcomes = [sweeps.outcome(run) for run in runs]
    assert "(1.0, 2.0)" in write_table(tmp_path, outcomes).read_text()


@pytest.mark.parametrize("packing", ["packed", "concat"])
def test_a_sweep_whose_runs_choose_their_segments_goes_on(tmp_path: Path, packing: str) -> None:
    sweep, command = SweepConfig(sweep=(f"{RATE}=1e-3",)), [f"Data.packing={packing}"]

    def listed(*more: str) -> list[str]:
        runs = list_runs(sweep, tmp_path, Command(overrides=[*command, *more]))
        return [one.status for one in runs]

    (run,) = runs_here(tmp_path, *sweep.sweep, overrides=command)
    record(run, 3, loss=2.0)
    data = run.config.data
    if packing == "packed":
        data = dataclasses.replace(data, max_segments=5)  # as chosen when the run began
    kept = dataclasses.replace(run.config, data=data)
    (run.folder / "config.gin").write_text(dump_config(kept))
    assert listed() == ["unfinished"]
    for other in ("Data.batch_size=4", "Data.tokenizer=/a.model", "Model.num_layers=7"):
        with pytest.raises(ConfigError, match="another config"):
            listed(other)
    if packing == "packed":
        assert listed("Data.max_segments=5") == ["unfinished"]
        with pytest.raises(ConfigError, match="Data.max_segments: 5 -> 6"):
            listed("Data.max_segments=6")


def test_a_sweep_of_fine_tuning_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = untrained_run(tmp_path_factory.getbasetemp())
    base = shutil.copytree(source, tmp_path / "base")
    folder, model = tmp_path / "sweep", model_of(base)
    sweep = SweepConfig(sweep=(f"{RATE}=1e-3,2e-3",))
    command = Command(init_from=str(base))
    first = list_runs(sweep, folder, command)[0].run
    assert first.config.model == model and first.config.data.tokenizer is None
    record(first, 3, loss=2.0)
    data = dataclasses.replace(first.config.data, tokenizer=str(base / "tokenizer.model"))
    kept = dataclasses.replace(first.config, data=data)
    (first.folder / "config.gin").write_text(dump_config(kept))

    def listed(*overrides: str) -> list[str]:
        asked = Command(overrides=overrides, init_from=str(base))
        return [one.status for one in list_runs(sweep, folder, asked)]

    assert listed() == ["unfinished"] * 2
    assert f"--init_from={base}" in command.arguments(first.overrides, first.folder)
    for other in ("Data.batch_size=4", "Data.tokenizer=/a.model", "Model.num_layers=7"):
        with pytest.raises(ConfigError, match="another config"):
            listed(other)
    # As for a run that goes on, the checkpoint need not be there any more.
    shutil.rmtree(base)
    assert listed() == ["unfinished"] * 2
    with pytest.raises(ConfigError, match="another config"):
        listed("Model.num_layers=7")
    shutil.rmtree(first.folder)
    with pytest.raises(ConfigError, match=f"--init_from={base}: "):
        listed()


@pytest.mark.parametrize(
    "sweep,message",
    [
        ([f"{RATE}=1e-3,"], "a value is missing"),
        ([RATE], "expected Group.field=A,B,..."),
        (["Optimizer.learning_rat=1e-3"], "did you mean Optimizer.learning_rate"),
        ([f"{RATE}=1e-3,fast"], "expected float"),
        ([f"{RATE}=1e-3,-1"], "must be greater than 0"),
        ([f"{RATE}=1e-3,0.001"], "gives learning_rate=0.001 twice"),
        ([f"{RATE}=1e-3", f"{RATE}=2e-3"], "is given twice"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, sweep: list[str], message: str
) -> None:
    given = [f"--sweep={text}" for text in sweep]
    status, out, err = run_here(capsys, train_main, f"--run_dir={tmp_path / 'runs'}", *given)
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()


def test_options_that_need_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--sweep_zip", "--sweep_seeds=2", "--sweep_index=0", "--sweep_list"):
        status, _, err = run_here(capsys, train_main, flag)
        assert status == 2 and "needs --sweep" in err


def sweep_runs(folder: Path, *sweep: str) -> list[SweepRun]:
    few = [f"Training.steps={STEPS}", f"{WARMUP}=1"] if WARMUP not in str(sweep) else []
    return runs_here(folder, *sweep, overrides=few)


def record(run: SweepRun, step: int, **values: float) -> None:
    """What a run leaves behind, as far as a sweep looks at it."""
    (run.folder / "checkpoints" / str(step)).mkdir(parents=True)
    row = {"step": step, **{f"eval/{name.replace('__', '/')}": v for name, v in values.items()}}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def execute(
    runs: Sequence[SweepRun], command: Any, stop: StopRequest | None = None
) -> dict[str, str]:
    with SweepProgress(len(runs), Display(terminal=False)) as progress:
        return sweeps.execute(runs, command, progress, stop or StopRequest())


def test_a_failure_does_not_stop_the_rest_and_finished_runs_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep_runs(tmp_path, f"{RATE}=1e-3,2e-3,3e-3,4e-3")
    record(runs[0], STEPS, loss=2.0)  # finished
    record(runs[1], 2, loss=3.0)  # broken off
    before = contents(runs[0].folder)
    started: list[str] = []

    def command(run: SweepRun) -> list[str]:
        started.append(run.name)
        if run is runs[2]:
            return python("print('error: no luck'); raise SystemExit(3)")
        if run is runs[3]:
            return python("import os; os.kill(os.getpid(), 9)")
        row = json.dumps({"step": STEPS, "eval/loss": 1.0}) + "\n"
        return python(
            f"import os; os.chdir({str(run.folder)!r}); os.mkdir('checkpoints/{STEPS}');"
            f"open('metrics.jsonl', 'a').write({row!r})"
        )

    failures = execute(runs, command)
    assert started == [run.name for run in runs[1:]]
    assert contents(runs[0].folder) == before
    assert failures == {
        runs[2].name: "no luck (exit status 3)",
        runs[3].name: "killed by signal 9",
    }
    outcomes = [sweeps.outcome(run) for run in runs]
    assert [one.status for one in outcomes] == ["finished", "finished", "failed", "failed"]
    out = capsys.readouterr().out
    assert f"[1/4] {runs[0].name}: finished before, skipped" in out
    assert f"[2/4] {runs[1].name}: resumed at step 2" in out
    assert f"[3/4] {runs[2].name}: failed: no luck (exit status 3)" in out
    # Every job of an array reads the reason in the folder; a new try forgets it.
    assert outcomes[2].error == "no luck (exit status 3)"
    execute(runs[2:3], lambda run: python("pass"))
    assert sweeps.outcome(runs[2]).error == "it ended before its last step"


def test_a_signal_reaches_the_run_at_work_and_starts_no_other(tmp_path: Path) -> None:
    runs = sweep_runs(tmp_path, f"{RATE}=1e-3,2e-3")
    stop = StopRequest()
    code = (
        "import signal, time, sys\n"
        "def save(*_): print('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(60)"
    )

    def when_ready() -> None:
        log = runs[0].folder / sweeps.LOG
        while not (log.exists() and "ready" in log.read_text()):
            pass
        stop.signal_name = "SIGTERM"

    threading.Thread(target=when_ready, daemon=True).start()
    assert execute(runs, lambda run: python(code), stop) == {}
    assert "saved" in (runs[0].folder / sweeps.LOG).read_text()
    assert sweeps.outcome(runs[0]).status == "unfinished" and not runs[1].folder.exists()


def test_another_config_in_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "learning_rate=0.001"
    folder.mkdir()
    (folder / "config.gin").write_text(f"{RATE} = 1e-3\nData.batch_size = 4\n")
    status, _, err = run_here(
        capsys, train_main, f"--run_dir={tmp_path}", f"--sweep={RATE}=1e-3,2e-3"
    )
    assert status == 2 and "another config (" in err and "Data.batch_size: 4 -> 16)" in err
    assert "Optimizer.metric_learner_weight_decay: None -> 10.0; " in err  # nano.gin
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_table_and_phase_diagram(tmp_path: Path) -> None:
    runs = sweep_runs(tmp_path, f"{RATE}=1e-3,2e-3", f"{WARMUP}=10,20")
    steps = ExperimentConfig().training.steps
    for number, run in enumerate(runs[:3]):
        values = {"order_parameter__G_LM": 10.0**-number, "causal_gap": 0.1 * number}
        record(run, steps, loss=2.0 + number, **values)
    outcomes = [sweeps.outcome(run) for run in runs]
    with write_table(tmp_path, outcomes).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["unfinished"]
    assert rows[2] == rows[2] | {
        RATE: "0.002", WARMUP: "10", "step": str(steps), "eval/loss": "4.0",
        "eval/order_parameter/G_LM": "0.01", "eval/accuracy": "", "error": "",
    }  # fmt: skip
    assert rows[3]["eval/loss"] == ""
    text = table_text(outcomes)
    assert "+0.10000" in text and "1.0e-02" in text and "3.0000" in text
    path = write_phase_diagram(tmp_path, outcomes)
    assert path is not None and path.read_bytes().startswith(b"\x89PNG")
    assert [_value(PANELS[0], one) for one in outcomes] == [[1.0], [0.1], [0.01], []]
    named = {run.name: run.folder for run in runs}
    assert write_comparison(tmp_path / "more", dict(list(named.items())[:1])) is None
    (tmp_path / "more").mkdir()
    curves = write_comparison(tmp_path / "more", named)
    assert curves is not None and curves.read_bytes().startswith(b"\x89PNG")
    # One place is no diagram.
    assert write_phase_diagram(tmp_path, outcomes[:1]) is None
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "sweep.csv",
        "phase.png",
    }


def test_a_sweep_of_real_runs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = corpus_of(tmp_path_factory.getbasetemp()), tmp_path / "sweep"
    given = [f"--run_dir={folder}", *flags(source, FIELDS), f"--sweep={RATE}=1e-2,1e30"]
    good, bad = folder / "learning_rate=0.01", folder / "learning_rate=1e+30"
    status, out, err = run_here(capsys, train_main, *given)
    assert status == 1
    assert f"failed: {bad.name}: step " in err and "error: 1 of 2 runs failed" in err
    assert "[1/2] learning_rate=0.01: finished in " in out and "held-out loss" in out
    assert (folder / "sweep.csv").is_file() and (folder / "phase.png").is_file()
    assert "training: " in (good / sweeps.LOG).read_text()
    # Broken off after step 2, it is resumed and ends with the same metrics.
    rows = rows_of(good)
    shutil.rmtree(good / "checkpoints" / str(STEPS))
    status, out, _ = run_here(capsys, train_main, *given, "--sweep_list")
    assert status == 0 and out.split() == ["0", "unfinished", good.name, "1", "failed", bad.name]
    status, out, _ = run_here(capsys, train_main, *given, "--sweep_index=0")
    assert status == 0 and "[1/1] learning_rate=0.01: resumed at step 2" in out
    assert rows_of(good) == rows
    before = contents(good)
    status, out, _ = run_here(capsys, train_main, *given, "--sweep_index=0/2")
    assert status == 0 and "finished before, skipped" in out and contents(good) == before


def test_labels_and_the_base_of_adapters_are_what_the_runs_have_found(tmp_path: Path) -> None:
    """A config leaves them open; a folder whose run has other ones that were stated is refused."""
    task = ["Task.kind=sequence", "Lora.rank=2"]
    sweep = SweepConfig(sweep=(f"{RATE}=1e-3,2e-3",))
    (run, _) = runs_here(tmp_path, *sweep.sweep, overrides=task)
    found = load_run([], [*task, *run.overrides, "Task.labels=('a','b','c')", "Lora.base=x"])
    run.folder.mkdir()
    (run.folder / "config.gin").write_text(dump_config(found))
    command = Command(overrides=task)
    assert [one.status for one in list_runs(sweep, tmp_path, command)] == ["unfinished"] * 2
    for other in (["Task.labels=('a','b')"], ["Task.dropout=0.1"], ["Lora.alpha=3"]):
        with pytest.raises(ConfigError, match="holds a run of another config .*(Task|Lora)"):
            list_runs(sweep, tmp_path, Command(overrides=[*task, *other]))
