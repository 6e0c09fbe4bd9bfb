"""Runs in a bucket, on a real S3 server on loopback."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import s3_server
from helpers import assert_equal_runs, corpus_of, finish, flags, rows_of, run_program
from test_hosts import FIELDS as SEVERAL
from test_hosts import losses, several
from test_kills import wait_for
from zygote import Zygote

from pldr_jax.bucket import Bucket

ROUNDS, STEPS, EVERY = 5, 16, 2
RUN = "s3://models/run"
FIELDS = {
    "Model.num_layers": 1,
    "Model.num_gated_units": 1,
    "Model.unroll": False,
    "Optimizer.decay_steps": STEPS,
    "Training.steps": STEPS,
    "Training.log_every": 1,
    "Training.eval_every": 8,
    "Training.tensorboard": True,
    "Checkpoint.save_every": EVERY,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The file system; the text lies at `models/text`."""
    with s3_server(tmp_path_factory.mktemp("cache")) as files:
        text = corpus_of(tmp_path_factory.getbasetemp())
        files.put(f"{text}/", "models/text/", recursive=True)
        yield files


def copy_of(server: Any, name: str, folder: Path) -> Path:
    server.get(f"models/{name}/", str(folder), recursive=True)
    return folder


def complete(run: Bucket) -> int:
    """The newest step that others see."""
    names = [n for n in run.objects() if n.startswith("checkpoints/manifests/") and "/." not in n]
    return max((int(Path(name).stem) for name in names), default=0)


def test_killed_five_times_it_is_the_local_run(server: Any, tmp_path: Path) -> None:
    """Text, run, init_from, prompts, results and report, all in the bucket; every round begins on
    a machine that has nothing.
    """
    fields, run = flags(Path("s3://models/text"), FIELDS), Bucket(RUN, "")
    reference, rng, killed_at = tmp_path / "reference", random.Random(0), []
    work = Path(os.environ["PLDR_CACHE"]) / "runs"
    with Zygote(tmp_path / "output") as zygote:
        process = zygote.start(f"--run_dir={reference}", *fields)
        assert process.wait() == 0, process.output
        for _ in range(ROUNDS):
            before = complete(run)
            process = zygote.start(f"--run_dir={RUN}", *fields)
            wait_for(lambda before=before: complete(run) > before, process)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.output
            assert complete(run) >= before
            killed_at.append(complete(run))
            shutil.rmtree(work)
        process = zygote.start(f"--run_dir={RUN}", *fields)
        assert process.wait() == 0, process.output
        assert f"run folder {RUN}" in process.output
    assert not list(work.rglob("*.json")), "the local copy is removed"
    copy = copy_of(server, "run", tmp_path / "copy")
    assert_equal_runs(copy, reference)
    trained = [row["step"] for row in rows_of(copy) if "train/loss" in row]
    assert trained == list(range(1, STEPS + 1)), killed_at
    steps = {path.name for path in (copy / "checkpoints").iterdir()}
    assert steps == {path.name for path in (reference / "checkpoints").iterdir()}
    assert (copy / "curves.png").is_file() and list((copy / "tensorboard").iterdir())
    assert not [name for name in run.objects() if "/." in f"/{name}"], "nothing is left over"
    used_from_the_bucket(tmp_path, fields)


def used_from_the_bucket(tmp_path: Path, fields: list[str]) -> None:
    """Infer, analyse and fine-tune."""
    models = Bucket("s3://models", "")
    models.write("prompts.txt", b"def value\nlist of tokens\n")
    out = ["--prompt_file=s3://models/prompts.txt", "--output=s3://models/out.jsonl"]
    done = run_program("infer.py", f"--checkpoint={RUN}", *out, "--max_new_tokens=3")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in models.read("out.jsonl").splitlines()]
    assert [len(result["tokens"]) for result in results] == [3, 3]
    analyse = ("-m", "pldr_jax.analysis", RUN, "--rows=4", "--sections=structure", "--length=8")
    done = run_program(*analyse)
    assert done.returncode == 0, done.stderr
    assert f"{RUN}/analysis/report.html" in done.stdout and models.read("run/analysis/report.json")
    tuned = ["--run_dir=s3://models/tuned", f"--init_from={RUN}", "--resume=never"]
    fewer = [*fields, "--gin.Training.steps=2", "--gin.Training.sample_prompt="]
    fewer = [flag for flag in fewer if not flag.startswith("--gin.Model")]
    done = run_program("train.py", *tuned, *fewer)
    assert done.returncode == 0, done.stderr
    assert complete(Bucket("s3://models/tuned", "")) == 2
    done = run_program("train.py", *tuned, *fewer)
    assert done.returncode == 2 and "s3://models/tuned already holds step 2" in done.stderr


def test_processes_without_a_shared_folder(server: Any, tmp_path: Path) -> None:
    """Two processes, each with local files of its own, and arrays split between them: the curve of
    one; one process goes on from their checkpoint, and damage to it is noticed.
    """
    text, url = Path("s3://models/text"), "s3://models/several"
    split = {"Mesh.data": 1, "Mesh.fsdp": 2, "Training.tensorboard": False}
    ended = [finish(process) for process in several(text, url, 2, [split] * 2)]
    assert [process.returncode for process in ended] == [0, 0], ended[0].stderr[-2000:]
    alone = tmp_path / "alone"
    more = flags(text, {**SEVERAL, "Training.steps": 5})
    done = run_program("train.py", f"--run_dir={alone}", *more)
    assert done.returncode == 0, done.stderr
    copy = copy_of(server, "several", tmp_path / "copy")
    assert losses(copy) == pytest.approx(losses(alone)[:5], abs=1e-5)
    shard = next(n for n in server.find("models/several/checkpoints/4/state") if n.endswith("0"))
    server.pipe_file(shard, b"damaged")
    done = run_program("train.py", f"--run_dir={url}", *more)
    assert done.returncode == 0 and "continuing at step 2" in done.stdout, done.stderr
    assert "damaged checkpoint of step 4" in done.stderr
    copy = copy_of(server, "several", tmp_path / "continued")
    assert losses(copy) == pytest.approx(losses(alone), abs=1e-5)
