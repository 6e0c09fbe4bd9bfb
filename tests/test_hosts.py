"""Several processes on one machine train as one program."""

import json
import signal
import socket
import time
from pathlib import Path

import pytest
from helpers import corpus_of, finish, flags, run_program, start

from pldr_jax.config import ConfigError
from pldr_jax.hosts import join, launched

# Without PLGA, whose powers amplify the rounding of sums in another order, and with an epsilon that
# keeps the rounding of near-zero gradients from changing whole updates.
FIELDS = {
    "Model.g_source": "identity",
    "Optimizer.eps": 1e-2,
    "Training.steps": 4,
    "Training.log_every": 1,
    "Training.eval_every": 4,
    "Training.sample_prompt": "",
    "Checkpoint.every_steps": 2,
}


def several(source: Path, run_dir: Path, count: int, **fields: object) -> list:
    """The processes of one run, started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [
        start(
            "train.py",
            f"--run_dir={run_dir}",
            f"--coordinator={address}",
            f"--processes={count}",
            f"--process_index={index}",
            *flags(source, {**FIELDS, **fields}),
        )
        for index in range(count)
    ]


def losses(run_dir: Path) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row.get("train/loss", row.get("eval/loss")) for row in rows]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_of(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process, one step more: of steps 1 to 4, held out, step 5, held out."""
    run_dir = tmp_path_factory.mktemp("hosts") / "run"
    more = {**FIELDS, "Training.steps": 5}
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(text, more))
    assert result.returncode == 0, result.stderr
    return losses(run_dir)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_as_one(text: Path, alone: list[float], tmp_path: Path, count: int) -> None:
    """The curve of one process; one log on the screen; a checkpoint that one process continues."""
    ended = [finish(process) for process in several(text, tmp_path / "run", count)]
    assert [process.returncode for process in ended] == [0] * count, ended[0].stderr[-2000:]
    assert losses(tmp_path / "run") == pytest.approx(alone[:5], abs=1e-5)
    assert f"on {count} x" in ended[0].stdout and "held-out loss" in ended[0].stdout
    for other in ended[1:]:
        assert "loss" not in other.stdout
    if count > 2:
        return
    more = {**FIELDS, "Training.steps": 5}
    result = run_program("train.py", f"--run_dir={tmp_path / 'run'}", *flags(text, more))
    assert result.returncode == 0 and "continuing at step 4" in result.stdout, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(alone, abs=1e-5)


def test_a_signal_to_one_process_stops_all(text: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    processes = several(text, run_dir, 2, **{"Training.steps": 100_000})
    end = time.monotonic() + 100
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in processes]
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-2000:]
    assert "the same command continues from here" in ended[0].stdout


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("localhost:1", None, None), "--processes"),
        ((None, 2, 0), "--coordinator"),
        (("localhost:1", 2, 2), "--process_index=2"),
    ],
)
def test_incomplete_addresses_are_one_line(given: tuple, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}") as error:
        join(*given, environment={})
    assert "\n" not in str(error.value)


def test_the_environment_says_the_same() -> None:
    with pytest.raises(ConfigError, match="PLDR_PROCESSES = 'two'"):
        join(environment={"PLDR_COORDINATOR": "localhost:1", "PLDR_PROCESSES": "two"})
    with pytest.raises(ConfigError, match="^--process_index=5: must be from 0 to 1"):
        places = {"PLDR_COORDINATOR": "localhost:1", "PLDR_PROCESSES": "2"}
        join(environment={**places, "PLDR_PROCESS_INDEX": "5"})
    join(environment={})  # one process: nothing to join


def test_launchers_are_known_by_what_they_set() -> None:
    assert launched({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert launched({"OMPI_COMM_WORLD_SIZE": "2"})
    assert launched({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not launched({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "TPU_WORKER_HOSTNAMES": "a"})
