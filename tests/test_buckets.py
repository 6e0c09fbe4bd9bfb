"""Checkpoints in a bucket: a real S3 server on loopback, where moto and s3fs are installed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from test_engine import CONFIG, params_of

import pldr_jax
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.files import bucket_url
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.runs.folder import fill_run

INFER = Path(__file__).parents[1] / "infer.py"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a bucket with a run of two steps at `run`."""
    reason = "needs pip install 'pldr_jax[buckets-test]'"
    server = pytest.importorskip("moto.server", reason=reason)
    s3fs = pytest.importorskip("s3fs", reason=reason)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("PLDR_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder, config = tmp_path_factory.mktemp("run"), ExperimentConfig(model=CONFIG)
    for step, factor in ((1, 1.0), (2, 2.0)):
        params = jax.tree.map(lambda x, factor=factor: factor * x, params_of(CONFIG))
        fill_run(folder, step, params, None, config_to_dict(config), {"config.gin": b""})
    files = s3fs.S3FileSystem()
    files.mkdir("models")
    files.put(f"{folder}/", "models/run/", recursive=True)
    yield "s3://models"
    patch.undo()
    running.stop()


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
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    command = [sys.executable, str(INFER), f"--checkpoint={bucket}/run"]
    command += [f"--prompt_file={tmp_path}/prompts.jsonl", f"--output={tmp_path}/out.jsonl"]
    done = subprocess.run(
        [*command, "--max_new_tokens=4"], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert '"tokens"' in (tmp_path / "out.jsonl").read_text()


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


def test_bucket_urls() -> None:
    assert bucket_url("s3://a/b/") == bucket_url(Path("s3://a/b")) == "s3://a/b"
    assert bucket_url("runs/s3") is bucket_url("gs:") is bucket_url("file://x") is None
