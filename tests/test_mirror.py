"""The mirror of a run in a bucket, on an object store in memory."""

import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers import assert_same_bits
from test_engine import CONFIG, params_of

from pldr_jax.bucket import Bucket
from pldr_jax.cli.common import run
from pldr_jax.config import ConfigError, ExperimentConfig, UnavailableError
from pldr_jax.config.load import config_to_dict
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.checksums import ITEMS, newest_whole
from pldr_jax.runs.folder import fill_run
from pldr_jax.runs.remote import place
from pldr_jax.runs.remote.mirror import Mirror


class Noted(Bucket):
    """Remembers what was written, in order."""

    written: list[str] = []

    def put(self, path: Path, name: str) -> None:
        super().put(path, name)
        self.written.append(name)

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        self.written.append(name)
        return super().write(name, content, new)


def test_a_manifest_makes_a_checkpoint(tmp_path: Path) -> None:
    """It is written last, after metrics and files; arrays then leave the local folder. What was
    uploaded half is removed, and what someone removes locally is not.
    """
    run = Noted("memory://models/run", "--run_dir")
    run.write("checkpoints/9/state/half", b"")
    config = config_to_dict(ExperimentConfig(model=CONFIG))

    def mirror_at(name: str) -> Mirror:
        return Mirror(run, tmp_path / name, (0, 1), "", lambda: None)

    one = mirror_at("one")
    (one.folder / "metrics.jsonl").write_text('{"step": 1}')
    fill_run(one.folder, 1, params_of(CONFIG), None, config, {})
    one.wait(1)
    assert run.written[-1] == "checkpoints/manifests/1.json" and run.written[1] == "metrics.jsonl"
    assert not list((one.folder / "checkpoints/1/state").iterdir())
    assert not [name for name in run.objects() if name.startswith("checkpoints/9")]
    other = mirror_at("other")
    assert not list((other.folder / "checkpoints/1/state").iterdir())
    other.fetch_step(1)
    found = read_weights(other.folder)
    assert_same_bits(jax.device_get(found.params), jax.device_get(params_of(CONFIG)))
    shutil.rmtree(one.folder)
    one.retire()
    one.close()
    assert "checkpoints/manifests/1.json" in run.objects()
    fill_run(other.folder, 2, params_of(CONFIG), None, config, {})
    shutil.rmtree(other.folder / "checkpoints/1")
    other.close()
    left = {name.split("/")[1] for name in run.objects() if name.startswith("checkpoints/")}
    assert left == {"2", "manifests"} and not other.folder.exists()


class Full(Bucket):
    """Takes nothing."""

    def put(self, path: Path, name: str) -> None:
        raise ConfigError(f"{self.url}: cannot be written (403)")


def test_what_cannot_be_uploaded_is_kept_from_the_next_run(tmp_path: Path) -> None:
    full = Full("memory://models/full", "--run_dir")

    def mirror() -> Mirror:
        return Mirror(full, tmp_path / "run", (0, 1), "0123456789", lambda: None)

    failing = mirror()
    (failing.folder / "metrics.jsonl").write_text('{"step": 1}')
    with pytest.raises(UnavailableError, match=r"\(403\); what is not uploaded lies in"):
        failing.close()
    mirror()
    assert (tmp_path / "run-01234567" / "metrics.jsonl").read_text() == '{"step": 1}'


@pytest.mark.parametrize(
    ("error", "status"), [(TimeoutError("no answer"), 1), (PermissionError("403"), 2)]
)
def test_status_1_says_that_the_same_command_may_succeed_later(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The script of a pod starts a run again that a silent bucket has ended, and no other one; in
    every process, whichever of them has asked the bucket.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    bucket = Bucket("memory://models/silent", "--run_dir")
    monkeypatch.setattr(bucket._files, "cat_file", refuse)
    monkeypatch.setattr(place, "Bucket", lambda *_: bucket)

    def train(_: list[str]) -> None:
        with place.open_run("s3://models/silent"):
            pass

    with pytest.raises(SystemExit) as ended:
        run(train, [])
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert told.startswith("error: --run_dir=memory://models/silent: cannot be read (")
    assert told.count("\n") == 1


def test_a_silent_store_is_no_damaged_checkpoint(tmp_path: Path) -> None:
    """An older step in its place would be trained on, and the newest one removed."""
    for step in (1, 2):
        for item in ITEMS:
            (tmp_path / str(step) / item).mkdir(parents=True)

    def newest(error: Exception) -> int:
        def fetch(step: int) -> None:
            if step == 2:
                raise error

        return newest_whole(tmp_path, None, lambda folder: (), lambda line: None, fetch)[0]

    assert newest(ConfigError("an object is missing")) == 1
    with pytest.raises(UnavailableError):
        newest(UnavailableError("no answer"))
