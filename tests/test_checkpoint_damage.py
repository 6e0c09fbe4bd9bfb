"""Checkpoints that are damaged, incomplete, unreadable or unchecked, and strays beside them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from test_checkpoint import abstract, assert_same, make_state, restore, save

from pldr_jax.config import CheckpointConfig
from pldr_jax.runs.checkpoint import Checkpointer, CheckpointError, read_weights


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder: Path) -> None:
    """Cuts every file of arrays: which array lies in which file differs from save to save."""
    for path in (folder / "state").rglob("d/*"):
        os.truncate(path, min(100, path.stat().st_size))


def flip(folder: Path) -> None:
    path = largest_file(folder / "state")
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 8):
        content[i] ^= 255
    path.write_bytes(content)


def empty_config(folder: Path) -> None:
    os.truncate(folder / "config" / "metadata", 0)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    "truncated": (truncate, True, "bytes instead of"),
    "truncated, no manifest": (truncate, False, ""),
    "flipped": (flip, True, "has changed since it was written"),
    "no state": (lambda f: shutil.rmtree(f / "state"), True, "state is missing"),
    "no data, no manifest": (lambda f: shutil.rmtree(f / "data"), False, "data is missing"),
    "empty config, no manifest": (empty_config, False, ""),
    "no files": (empty, True, "state is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, kind: str) -> None:
    harm, manifest, reason = DAMAGE[kind]
    save(tmp_path, {1: None, 2: None})
    folder = tmp_path / "checkpoints" / "2"
    harm(folder)
    if not manifest:
        (tmp_path / "checkpoints" / "manifests" / "2.json").unlink()
    log: list[str] = []
    restored = restore(tmp_path, log)
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    assert len(log) == 1 and "step 2" in log[0] and reason in log[0] and "\n" not in log[0]
    weights = read_weights(tmp_path, log=log.append)
    assert weights.step == 1 and log[1] == log[0]
    with pytest.raises(CheckpointError, match="step 2"):
        restore(tmp_path, step=2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 1, 2"):
        restore(tmp_path, step=7)


def test_a_fallback_run_replaces_the_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, {1: 1.0, 2: 2.0})
    truncate(tmp_path / "checkpoints" / "2")
    log: list[str] = []
    with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
        assert checkpointer.restore(abstract(make_state(0))).step == 1
        assert checkpointer.save(2, make_state(22), {}, {}, {})
    assert "continues from step 1" in log[1]
    restored = restore(tmp_path)
    assert restored.step == 2
    assert_same(restored.state, make_state(22))


def test_all_damaged(tmp_path: Path) -> None:
    save(tmp_path, {1: None, 2: None})
    for step in "12":
        flip(tmp_path / "checkpoints" / step)
    for read in (restore, read_weights):
        with pytest.raises(CheckpointError, match="no checkpoint can be read") as error:
            read(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": jnp.zeros((), jnp.int16)}, "step is int32[] in it and int16[] in this run"),
        ({"params": {"a": {"kernel": jnp.zeros((32, 16))}}}, "kernel is float32[64, 16] in it and"),
        ({"g_lm": None}, "g_lm is float32[2, 1, 2, 4, 4] in it and absent in this run"),
        ({"opt_state": jnp.zeros(3)}, "opt_state is absent in it and float32[3] in this run"),
    ],
)
def test_another_configuration_is_no_damage(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(tmp_path, {1: None, 2: None})
    log: list[str] = []
    target = abstract(make_state(0).replace(**change))
    with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
        with pytest.raises(CheckpointError, match="undamaged but cannot be used") as error:
            checkpointer.restore(target)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert not log and checkpointer.all_steps() == [1, 2]


def test_unreadable_metrics_do_not_stop_a_run(tmp_path: Path) -> None:
    save(tmp_path, {1: 1.0, 2: 2.0})
    os.truncate(tmp_path / "checkpoints" / "1" / "metrics" / "metrics", 3)
    assert save(tmp_path, {3: 3.0}) == [2, 3]
    assert restore(tmp_path, step=2).step == 2


def test_what_a_killed_save_leaves_disturbs_nobody(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    folder = tmp_path / "checkpoints"
    for step in "27":
        shutil.copytree(folder / "1", folder / f"{step}.orbax-checkpoint-tmp")
    (folder / "manifests" / ".2.77.tmp.json").write_text("{")
    (folder / "manifests" / "9.json").write_text("{}")
    log: list[str] = []
    assert restore(tmp_path, log).step == 1
    assert read_weights(tmp_path, log=log.append).step == 1
    assert not log and (folder / "2.orbax-checkpoint-tmp").exists()  # a reader changes nothing
    assert save(tmp_path, {2: None}) == [1, 2]
    assert {path.name for path in folder.iterdir()} == {"1", "2", "manifests"}
    assert {path.name for path in (folder / "manifests").iterdir()} == {"1.json", "2.json"}


STRAYS = {
    "a file": lambda f: (f / "notes.txt").write_text("mine"),
    "a folder": lambda f: (f / "old").mkdir(),
    "a file that is called as a step": lambda f: (f / "7").write_text("mine"),
    "a folder with zeros": lambda f: (f / "007").mkdir(),
    "other digits": lambda f: (f / "\u0667").mkdir(),
    "a broken link": lambda f: (f / "8").symlink_to("nowhere"),
    "a file among the manifests": lambda f: (f / "manifests" / "notes.txt").write_text("mine"),
    "a folder among the manifests": lambda f: (f / "manifests" / "9.json").mkdir(),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_strays_disturb_nobody(tmp_path: Path, kind: str) -> None:
    save(tmp_path, {1: None})
    folder = tmp_path / "checkpoints"
    STRAYS[kind](folder)
    before = {path.relative_to(folder) for path in folder.rglob("*")}
    assert restore(tmp_path).step == 1 and read_weights(tmp_path).step == 1
    assert save(tmp_path, {2: 1.0, 3: 2.0}, keep_last=3) == [1, 2, 3]
    assert before <= {path.relative_to(folder) for path in folder.rglob("*")}
    assert restore(tmp_path).step == 3


MANIFESTS = [
    "",
    "[]",
    "{",
    "null",
    '{"state": 3}',
    '{"../../x": [1, 2]}',
    '{"a": ["1", 2]}',
    "[" * 9999,
]


@pytest.mark.parametrize("content", [None, *MANIFESTS])
def test_what_is_not_checked_is_said_to_be_unchecked(tmp_path: Path, content: str | None) -> None:
    save(tmp_path, {1: None})
    manifest = tmp_path / "checkpoints" / "manifests" / "1.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    log: list[str] = []
    assert restore(tmp_path, log).step == 1
    assert read_weights(tmp_path, log=log.append).step == 1
    assert len(log) == 2 and "unchecked" in log[0] and str(manifest) in log[0], log


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {1: None, 2: None})
    hidden = tmp_path / "checkpoints" / "2" / "state"
    real = Path.open

    def guarded(self: Path, *arguments: Any, **options: Any) -> Any:
        if hidden in self.parents:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    log: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", guarded)
        assert restore(tmp_path, log).step == 1
    assert len(log) == 1 and "cannot be read (Permission denied)" in log[0]

    def refused(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\)$"):
        read_weights(tmp_path)
