"""Sweeps: which runs, in which folders; what is done about finished, broken and failing ones."""

import csv
import json
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import QUICK, contents, corpus_of, flags, rows_of, run_here

from pldr_jax.cli import sweep as cli
from pldr_jax.cli.train import train_main
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import load_config, parse_values
from pldr_jax.runs.curves import write_comparison
from pldr_jax.terminal import Display
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import StopRequest
from pldr_jax.training.sweep import runs as sweeps
from pldr_jax.training.sweep.phase import PANELS, _value, write_phase_diagram
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


def options(*sweep: str, **others: Any) -> Any:
    fields = {"sweep_zip": False, "sweep_seeds": None, "sweep_index": None, "sweep_list": False}
    return SimpleNamespace(sweep=list(sweep), gin_files=[], overrides=[], **{**fields, **others})


def names(*sweep: str, **others: Any) -> list[str]:
    return [run.name for run in cli.plan_runs(options(*sweep, **others), Path("runs"))]


def test_a_grid_is_every_combination_each_in_its_own_folder() -> None:
    runs = cli.plan_runs(options(f"{RATE}=8e-4,1e-3", f"{WARMUP}=100,200"), Path("runs"))
    assert [run.name for run in runs] == [
        "learning_rate=0.0008,warmup_steps=100",
        "learning_rate=0.0008,warmup_steps=200",
        "learning_rate=0.001,warmup_steps=100",
        "learning_rate=0.001,warmup_steps=200",
    ]
    assert runs[2].folder == Path("runs/learning_rate=0.001,warmup_steps=100")
    optimizer = runs[2].config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-3, 100)
    assert runs[2].settings == {RATE: 1e-3, WARMUP: 100}
    assert load_config([], runs[2].overrides) == runs[2].config


def test_zip_pairs_values() -> None:
    assert names(f"{RATE}=8e-4,1e-3", f"{WARMUP}=100,200", sweep_zip=True) == [
        "learning_rate=0.0008,warmup_steps=100",
        "learning_rate=0.001,warmup_steps=200",
    ]
    with pytest.raises(ConfigError, match="^--sweep_zip: .*rate has 1, .*steps has 2$"):
        names(f"{RATE}=8e-4", f"{WARMUP}=100,200", sweep_zip=True)


def test_seeds_repeat_each_point() -> None:
    asked = options(f"{RATE}=8e-4,1e-3", sweep_seeds=2)
    asked.overrides = ["Training.seed=5", "Data.seed=7"]
    runs = cli.plan_runs(asked, Path("runs"))
    assert [run.name for run in runs] == [
        f"learning_rate={rate},seed={seed}" for rate in (0.0008, 0.001) for seed in (5, 6)
    ]
    assert [(r.config.training.seed, r.config.data.seed) for r in runs] == [(5, 7), (6, 8)] * 2
    with pytest.raises(ConfigError, match="^--sweep_seeds: Data.seed is given by --sweep"):
        names("Data.seed=1,2", sweep_seeds=2)


def test_values_of_a_sweep() -> None:
    assert parse_values(f"{RATE}=8e-4, 1e-3", "--sweep") == (RATE, ("8e-4", "1e-3"))
    assert parse_values("Data.source='a,b',c", "--sweep") == ("Data.source", ("'a,b'", "c"))
    assert names("Data.source='a,b','t/*.txt'") == ["source=a_b", "source=t__.txt"]
    assert names("Training.seed=1", "Data.seed=2") == ["Training.seed=1,Data.seed=2"]


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


def test_shares_of_a_job_array_are_all_runs_once() -> None:
    runs = cli.plan_runs(options(f"{RATE}=1e-3,2e-3,3e-3,4e-3,5e-3"), Path("runs"))
    assert [sweeps.share(runs, str(i))[0] for i in range(5)] == runs
    parts = [sweeps.share(runs, f"{i}/2") for i in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    assert sorted(run.name for part in parts for run in part) == [run.name for run in runs]
    for index, message in [
        ("5", "5 runs, 0 to 4"),
        ("2/2", "2 jobs, 0 to 1"),
        ("-1", "expected I"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sweeps.share(runs, index)


def sweep_runs(folder: Path, *sweep: str) -> list[sweeps.SweepRun]:
    asked = options(*sweep)
    asked.overrides = [f"Training.steps={STEPS}", f"{WARMUP}=1"] if WARMUP not in str(sweep) else []
    return cli.plan_runs(asked, folder)


def record(run: sweeps.SweepRun, step: int, **values: float) -> None:
    """What a run leaves behind, as far as a sweep looks at it."""
    (run.folder / "checkpoints" / str(step)).mkdir(parents=True)
    row = {"step": step, **{f"eval/{name.replace('__', '/')}": v for name, v in values.items()}}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def execute(
    runs: Sequence[sweeps.SweepRun], command: Any, stop: StopRequest | None = None
) -> dict[str, str]:
    with SweepProgress(len(runs), Display(terminal=False)) as progress:
        return sweeps.execute(
            runs, command, sweeps.child_environment(Path()), progress, stop or StopRequest()
        )


def test_a_failure_does_not_stop_the_rest_and_finished_runs_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = sweep_runs(tmp_path, f"{RATE}=1e-3,2e-3,3e-3,4e-3")
    record(runs[0], STEPS, loss=2.0)  # finished
    record(runs[1], 2, loss=3.0)  # broken off
    before = contents(runs[0].folder)
    started: list[str] = []

    def command(run: sweeps.SweepRun) -> list[str]:
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
    assert status == 2 and "another config (Data.batch_size: 4 -> 16)" in err
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
