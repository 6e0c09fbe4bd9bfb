"""Checkpoints in a bucket: a real S3 server on loopback, where moto and s3fs are installed."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from buckets import s3_server
from test_engine import CONFIG, params_of

import pldr_jax
from pldr_jax.bucket import Bucket, bucket_url
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.copies import growing_file
from pldr_jax.data.text.inputs import find_inputs
from pldr_jax.files import new_folder
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.runs.folder import fill_run
from pldr_jax.runs.remote import owner

INFER = Path(__file__).parents[1] / "infer.py"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket with a run of two steps at `run`."""
    folder, config = tmp_path_factory.mktemp("run"), ExperimentConfig(model=CONFIG)
    for step, factor in ((1, 1.0), (2, 2.0)):
        params = jax.tree.map(lambda x, factor=factor: factor * x, params_of(CONFIG))
        fill_run(folder, step, params, None, config_to_dict(config), {"config.gin": b""})
    with s3_server(tmp_path_factory.mktemp("cache")) as files:
        files.put(f"{folder}/", "models/run/", recursive=True)
        yield "s3://models"


@pytest.mark.parametrize("step", [None, 1])
def test_a_checkpoint_in_a_bucket_is_the_local_one(bucket: str, step: int | None) -> None:
    """Bit for bit, of any step; only that step is copied, and only once."""
    opened = open_checkpoint(f"{bucket}/run", step, "--checkpoint")
    assert opened.step == (step or 2)
    for one, two in zip(
        jax.tree.leaves(opened.params), jax.tree.leaves(params_of(CONFIG)), strict=True
    ):
        assert np.array_equal(one, (step or 2) * np.asarray(two))
    copied = {path.name for path in (opened.folder / "checkpoints").iterdir()}
    assert copied == {str(opened.step), "manifests"}
    before = opened.folder.stat().st_mtime_ns
    assert open_checkpoint(Path(f"{bucket}/run/"), step).folder.stat().st_mtime_ns == before
    assert not list(opened.folder.parent.glob(".*"))


def test_infer_takes_it(bucket: str, tmp_path: Path) -> None:
    Bucket(bucket, "").write("prompts.jsonl", b'{"tokens": [1, 2, 3]}\n')
    command = [sys.executable, str(INFER), f"--checkpoint={bucket}/run", "--max_new_tokens=4"]
    command += [f"--prompt_file={bucket}/prompts.jsonl", f"--output={bucket}/out.jsonl"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert b'"tokens"' in Bucket(bucket, "").read("out.jsonl")


@pytest.mark.parametrize("name", ["absent", "run/absent"])
def test_what_is_not_there_is_one_line(bucket: str, name: str) -> None:
    with pytest.raises(
        ConfigError, match="^--checkpoint=s3://models/.*absent: cannot be read"
    ) as e:
        open_checkpoint(f"{bucket}/{name}", flag="--checkpoint")
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_checkpoint("s3://no-such-bucket/run")


@pytest.mark.parametrize(("url", "extra"), [("s3://a/b", "s3"), ("gs://a/b", "gcs")])
def test_a_missing_extra_is_named(url: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    for module, scheme in (("s3fs", "s3"), ("gcsfs", "gs")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'pldr_jax[{extra}]'")):
        pldr_jax.load(url)


def test_google_cloud_storage_compares_what_it_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client does so only where it is asked to; that of S3 always does."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("fsspec.url_to_fs", lambda url, **how: (asked.update({url: how}), "a/b"))
    for url in ("gs://a/b", "s3://a/b"):
        Bucket(url, "")
    assert asked["gs://a/b"]["consistency"] == "md5" and "consistency" not in asked["s3://a/b"]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("", ["a.jsonl", "a.txt", "below/b.txt"]),
        ("/a.txt", ["a.txt"]),
        ("/*.txt", ["a.txt"]),
        ("/**/*.txt", ["a.txt", "below/b.txt"]),
    ],
)
def test_text_in_a_bucket(bucket: str, named: str, found: list[str]) -> None:
    """A folder, a file and globs lead to copies with the same names, in the same order."""
    for name in ("a.txt", "a.jsonl", "below/b.txt"):
        Bucket(f"{bucket}/text", "").write(name, name.encode())
    pieces = find_inputs([f"{bucket}/text{named}"])
    names = [re.sub(r".*/buckets/\w+/(text/)?", "", piece.path) for piece in pieces]
    assert names == found
    with pytest.raises(ConfigError, match="no such"):
        find_inputs([f"{bucket}/text/*.parquet"])


def test_a_report_in_a_bucket_replaces_the_one_before(bucket: str) -> None:
    report, names = f"{bucket}/report", Bucket(f"{bucket}/report", "")
    for content in ("1", "2"):
        with new_folder(report, "--out", "report.json") as folder:
            (folder / "report.json").write_text(content)
            (folder / content).write_text("")
    assert set(names.objects()) == {"report.json", "2"} and names.read("report.json") == b"2"
    with pytest.raises(ConfigError, match="is there already"), new_folder(report, "--out"):
        pass


def test_results_are_uploaded_whatever_ends_the_job(bucket: str) -> None:
    url = f"{bucket}/results.jsonl"
    with pytest.raises(KeyboardInterrupt), growing_file(url, "--output") as path:
        Path(path).write_text("one\n")
        raise KeyboardInterrupt
    with growing_file(url, "--output") as path:
        assert Path(path).read_text() == "one\n"


def test_one_process_owns_a_run(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine it is known whether it lives; of another one its heart is listened to."""
    run = Bucket(f"{bucket}/owned", "--run_dir")
    first = owner.Owner(run)
    first.take()
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
        owner.Owner(run).take()
    facts = json.loads(run.read(owner.NAME)) | {"token": "", "pid": 2**22 + 1}
    run.write(owner.NAME, json.dumps(facts).encode())  # it died
    with pytest.raises(ConfigError, match="was taken over by process"):
        first.check()
    second = owner.Owner(run)
    second.take()
    first.release()  # it leaves what is another's
    second.check()
    second.release()
    monkeypatch.setattr(owner, "LOST_SECONDS", 1.5)
    for beats in (True, False):
        elsewhere = json.dumps(facts | {"machine": "other"}).encode()
        run.write(owner.NAME, elsewhere)
        beat = json.dumps(facts | {"machine": "other", "time": time.time()}).encode()
        timer = threading.Timer(0.5, run.write, (owner.NAME, beat))
        if beats:
            timer.start()
            with pytest.raises(ConfigError, match="is in use by"):
                owner.Owner(run).take()
        else:
            third = owner.Owner(run)
            third.take()
            third.release()
    assert owner.NAME not in run.objects()


def test_bucket_urls() -> None:
    assert bucket_url("s3://a/b/") == bucket_url(Path("s3://a/b")) == "s3://a/b"
    assert bucket_url("runs/s3") is bucket_url("gs:") is bucket_url("file://x") is None
