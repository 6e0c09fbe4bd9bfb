"""Several processes on one machine train as one program."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import corpus_of, finish, flags, run_program, start

from pldr_jax import hosts
from pldr_jax.config import ConfigError, UnavailableError
from pldr_jax.hosts import REMIND_SECONDS, connected_hosts, join, launched

# Without PLGA, whose powers amplify the rounding of sums in another order, and with an epsilon that
# keeps the rounding of near-zero gradients from changing whole updates.
FIELDS = {
    "Model.g_source": "identity",
    "Model.num_layers": 1,
    "Model.unroll": False,
    "Optimizer.eps": 1e-2,
    "Training.steps": 4,
    "Training.log_every": 1,
    "Training.eval_every": 4,
    "Checkpoint.save_every": 2,
}


def several(source: Path, run_dir: Path, count: int, fields: list[dict]) -> list:
    """The processes of one run, started, each with fields of its own."""
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
            *flags(source, {**FIELDS, **fields[index]}),
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
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, one step more: its losses are of steps 1 to 4, held out, step 5, held
    out; its samples of steps 4 and 5.
    """
    run_dir = tmp_path_factory.mktemp("hosts") / "run"
    more = {**FIELDS, "Training.steps": 5}
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(text, more))
    assert result.returncode == 0, result.stderr
    return run_dir


@pytest.mark.parametrize(
    ("count", "mesh"),
    [(2, {}), (4, {"Mesh.data": 1, "Mesh.fsdp": 2, "Mesh.tensor": 2})],
    ids=["replicated", "split"],
)
def test_processes_train_as_one(
    text: Path, alone: Path, tmp_path: Path, count: int, mesh: dict[str, int]
) -> None:
    """The curve and the samples of one process; one log on the screen; a checkpoint that one
    process continues.
    """
    run_dir = tmp_path / "run"
    ended = [finish(process) for process in several(text, run_dir, count, [mesh] * count)]
    assert [process.returncode for process in ended] == [0] * count, ended[0].stderr[-2000:]
    assert losses(run_dir) == pytest.approx(losses(alone)[:5], abs=1e-5)
    samples, expected = (folder / "samples.txt" for folder in (run_dir, alone))
    before, _ = expected.read_text().split("--- step 5")
    assert samples.read_text() == before
    assert f"on {count} x" in ended[0].stdout and "held-out loss" in ended[0].stdout
    for other in ended[1:]:
        assert "loss" not in other.stdout and "def" not in other.stdout
    if mesh:
        return
    more = {**FIELDS, "Training.steps": 5}
    result = run_program("train.py", f"--run_dir={run_dir}", *flags(text, more))
    assert result.returncode == 0 and "continuing at step 4" in result.stdout, result.stderr
    assert losses(run_dir) == pytest.approx(losses(alone), abs=1e-5)
    assert samples.read_bytes() == expected.read_bytes()


def test_a_signal_to_one_process_stops_all(text: Path, tmp_path: Path) -> None:
    """Of a model that learns its G_LM, so that each of the two also writes samples with one."""
    run_dir = tmp_path / "run"
    fields = {"Training.steps": 400, "Model.g_source": "learned"}
    processes = several(text, run_dir, 2, [fields] * 2)
    end = time.monotonic() + 300
    while not (run_dir / "samples.txt").exists() and time.monotonic() < end:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in processes]
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-2000:]
    assert "the same command continues from here" in ended[0].stdout
    samples = (run_dir / "samples.txt").read_text()
    assert samples.startswith("--- step 4\ndef ") and samples.count("--- step 4\n") == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("localhost:1", None, None), "--processes"),
        ((None, 2, 0), "--coordinator"),
        (("localhost:1", 2, 2), "--process_index=2"),
        (("localhost", 2, 0), "--coordinator=localhost: must be HOST:PORT"),
        (("localhost:", 2, 0), "--coordinator=localhost:"),
        (("localhost:http", 2, 1), "--coordinator=localhost:http"),
        (("localhost:99999", 2, 1), "--coordinator=localhost:99999"),
        ((":1234", 1, 0), "--coordinator=:1234"),
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


SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}


def test_launchers_are_known_by_what_they_set() -> None:
    assert launched(SRUN)
    assert launched({**SRUN, "SLURM_STEP_NUM_TASKS": "4"})
    assert launched({"OMPI_COMM_WORLD_SIZE": "2"})
    assert launched({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert not launched({**SRUN, "SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "a"})


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # a batch script
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "node[1-2]"},  # salloc
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # the interactive step of salloc
        {"SLURM_NTASKS": "2(x2)", "SLURM_JOB_ID": "1"},
    ],
)
def test_in_an_allocation_without_srun_a_run_is_alone(environment: dict[str, str]) -> None:
    assert not launched(environment)
    join(environment=environment)


@pytest.mark.parametrize(
    "environment",
    [
        {**SRUN, "SLURM_NTASKS": "2(x2)"},
        {**SRUN, "SLURM_NTASKS": ""},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "two"},
        {"OMPI_COMM_WORLD_SIZE": "x"},
        {"OMPI_COMM_WORLD_SIZE": "-2"},
    ],
)
def test_what_no_launcher_sets_is_one_line(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be a whole number; unset it") as error:
        join(environment=environment)
    assert "\n" not in str(error.value)


def one_error(output: str) -> str:
    """The only line on stderr that is no note."""
    lines = [line for line in output.splitlines() if " waits for the others" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), output
    return lines[0]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"Training.steps": 5}, "Training.steps"),
        ({"Optimizer.learning_rate": 0.5}, "Optimizer.learning_rate"),
        ({"Data.validation_fraction": 0.3}, "Data.validation_fraction"),
    ],
)
def test_processes_that_differ_say_so(
    text: Path, tmp_path: Path, other: dict[str, object], named: str
) -> None:
    """Before the first step; all of them end."""
    ended = [finish(process) for process in several(text, tmp_path / "run", 2, [{}, other])]
    for process in ended:
        assert process.returncode != 0
        assert one_error(process.stderr).startswith(f"error: {named}: not the same in process 1 ")
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_another_text_in_one_process(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "text"
    shutil.copytree(text, other)
    words = (other / "07.txt").read_text()
    (other / "07.txt").write_text(words.replace("document", "documents"))
    fields = [{}, {"Data.source": other}]
    ended = [finish(process) for process in several(text, tmp_path / "run", 2, fields)]
    for process in ended:
        assert process.returncode != 0
        assert "not the same in process 1 as in process 0" in one_error(process.stderr)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_in_one_line(
    text: Path, tmp_path: Path, victim: int
) -> None:
    run_dir = tmp_path / "run"
    fields = {"Training.steps": 10**6, "Training.eval_every": 10**6, "Checkpoint.save_every": 2}
    processes = several(text, run_dir, 2, [fields, fields])
    end = time.monotonic() + 400
    while not (run_dir / "checkpoints" / "2").exists() and time.monotonic() < end:
        time.sleep(0.1)
    processes[victim].kill()
    begun = time.monotonic()
    process = finish(processes[1 - victim])
    assert time.monotonic() - begun < 60
    assert process.returncode != 0  # 1, or where XLA is the first to notice, that of an abort
    assert "another process of the run is lost" in one_error(process.stderr)
    finish(processes[victim])
    assert any(path.name.isdigit() for path in (run_dir / "checkpoints").iterdir())


WAITING = """
import sys
from pldr_jax import hosts
hosts.REMIND_SECONDS, hosts.WAIT_SECONDS = 2.0, 60
hosts.join(sys.argv[1], 3, int(sys.argv[2]))
"""


def test_a_host_that_is_missing_is_noticed() -> None:
    """The first process says who has come, another one that the first answers, or that it does
    not.
    """
    assert REMIND_SECONDS <= 60
    with socket.socket() as free, socket.socket() as other:
        free.bind(("localhost", 0))
        other.bind(("localhost", 0))
        here, nowhere = (f"localhost:{end.getsockname()[1]}" for end in (free, other))
    places = [(here, 0), (here, 1), (nowhere, 2)]
    waiting = [start("-c", WAITING, address, index) for address, index in places]
    expected = [
        "of 3 processes 2 are here: 2 on 127.0.0.1",
        f"process 0, at {here}, answers: another process is missing",
        f"{nowhere}, process 0, does not answer (Connection refused)",
    ]
    try:
        for process, text in zip(waiting, expected, strict=True):
            assert any(text in line for line in process.stderr)  # until it says so
    finally:
        for process in waiting:
            process.kill()


def test_others_that_do_not_come_are_no_error_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A script that starts a run again after a crash goes on."""

    def initialize(**_: Any) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out")

    monkeypatch.setattr(hosts, "_shorten_fatal_errors", lambda: None)
    monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
    with pytest.raises(UnavailableError, match="process 1 of 2 cannot join the others"):
        join("localhost:1", 2, 1, environment={})


def test_connections_are_counted_by_their_hosts(tmp_path: Path) -> None:
    """Of the port alone, and only those that stand; IPv4 in IPv6 as IPv4."""
    head = "  sl  local_address rem_address   st\n"
    (tmp_path / "tcp").write_text(
        f"{head} 0: 0100007F:04D2 0200A8C0:9C40 01 x\n 1: 0100007F:04D2 0300A8C0:9C40 06 x\n"
        f" 2: 0100007F:04D3 0400A8C0:9C40 01 x\n"
    )
    mapped, local = "0000000000000000FFFF00000500A8C0", "00000000000000000000000001000000"
    (tmp_path / "tcp6").write_text(f"{head} 0: {local}:04D2 {mapped}:9C40 01 x\n")
    assert connected_hosts(1234, tmp_path) == ["192.168.0.2", "192.168.0.5"]
    assert connected_hosts(1234, tmp_path / "none") == []
