"""A run that is killed again and again ends with the bits of one that nothing disturbed."""

import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers import assert_equal_runs, corpus_of, flags, rows_of, run_program
from zygote import Forked, Zygote

from pldr_jax.config import CheckpointConfig
from pldr_jax.files import LOCK
from pldr_jax.runs.checkpoint import Checkpointer

ROUNDS, STEPS, EVERY = 20, 48, 2
FIELDS = {
    "Model.num_layers": 1,
    "Model.num_gated_units": 1,
    "Model.unroll": False,
    "Optimizer.decay_steps": STEPS,
    "Training.steps": STEPS,
    "Training.log_every": 1,
    "Training.eval_every": 16,
    "Training.sample_prompt": "",
    "Checkpoint.save_every": EVERY,
}


class Killed:
    """A run folder, and what is known of it from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._saved = Checkpointer(folder, CheckpointConfig())

    @property
    def step(self) -> int:
        """Of the newest complete checkpoint; 0 where there is none."""
        return self._saved.latest_step() or 0

    @property
    def holder(self) -> int:
        """The process that holds the folder, or held it when it was killed."""
        lock = self.folder / LOCK
        return int(lock.read_text() or 0) if lock.exists() else 0

    def unfinished(self) -> set[tuple[str, int]]:
        """Temporary folders of saves, each with the time of its last change: that which a killed
        process left has the name of the one that is written next.
        """
        found = set()
        for path in self._saved.folder.glob("*tmp*"):
            try:
                found.add((path.name, path.stat().st_ctime_ns))
            except FileNotFoundError:
                continue
        return found

    def writes(self, step: int, left: set[tuple[str, int]]) -> bool:
        """Whether `step` is saved, and something newer than `left` is being saved."""
        return self.step >= step and bool(self.unfinished() - left)


def wait_for(condition: Callable[[], object], process: Forked) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_twenty_times_then_stopped_then_finished(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """SIGKILL at random moments, most of them while a checkpoint is written; then SIGTERM; then
    `train.py` as a user starts it.
    """
    fields = flags(corpus_of(tmp_path_factory.getbasetemp()), FIELDS)
    run, reference = Killed(tmp_path / "run"), tmp_path / "reference"
    seed = time.time_ns()
    rng, killed_at, held, saving = random.Random(seed), [0], 0, 0
    with Zygote(tmp_path / "output") as zygote:
        process = zygote.start(f"--run_dir={reference}", *fields)
        assert process.wait() == 0, process.output
        usual = 1.0
        while len(killed_at) <= ROUNDS:
            before, left, start = run.step, run.unfinished(), time.monotonic()
            process = zygote.start(f"--run_dir={run.folder}", *fields)
            if len(killed_at) % 4 == 0:  # anywhere: start, compilation, steps, saves
                time.sleep(rng.uniform(0, 1.5 * usual))
            else:
                wait_for(partial(run.writes, before + EVERY * rng.randrange(2), left), process)
                usual = time.monotonic() - start
                time.sleep(rng.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            if process.wait() == 0:  # it had ended: once more from the start
                assert_equal_runs(run.folder, reference)
                shutil.rmtree(run.folder)
                continue
            assert process.returncode == -signal.SIGKILL, process.output
            assert run.step >= before, f"step {before} was lost"
            killed_at.append(run.step)
            held += run.holder == process.pid
            saving += bool(run.unfinished() - left)
        seen = f"seed {seed}: at {killed_at[1:]}, {held} held the folder, {saving} while saving"
        print(seen)
        assert held > ROUNDS // 2 and saving > ROUNDS // 4, seen
        process = zygote.start(f"--run_dir={run.folder}", *fields)
        wait_for(partial(run.writes, run.step + EVERY, set()), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, process.output
        if step := re.search(rf"SIGTERM: saved step (\d+) of {STEPS}", process.output):
            assert run.step == int(step[1])
        else:
            assert run.step == STEPS
    result = run_program("train.py", f"--run_dir={run.folder}", *fields)
    assert result.returncode == 0, result.stderr
    assert_equal_runs(run.folder, reference)
    trained = [row["step"] for row in rows_of(run.folder) if "train/loss" in row]
    assert trained == list(range(1, STEPS + 1))
    assert not run.unfinished()
