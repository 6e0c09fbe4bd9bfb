"""Checkpoints: what is saved comes back bit for bit, or an older one, or one line says why not."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from pldr_jax.config import CheckpointConfig
from pldr_jax.files import whole_file
from pldr_jax.hosts import LOST
from pldr_jax.runs.checkpoint import Checkpointer, CheckpointError, Restored, read_weights

# Orbax leaves coroutines behind when a read or a write fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(flax.struct.PyTreeNode):
    """The shape of a training state."""

    step: jax.Array
    params: Any
    opt_state: Any
    g_lm: jax.Array | None


def make_state(step: int, g_lm: bool = True, size: int = 64) -> State:
    """A state that differs in every leaf from that of another step."""
    key = jax.random.key(step)
    params = {
        "a": {"kernel": jax.random.normal(key, (size, 16))},
        "b": jax.random.normal(key, (7,), jnp.bfloat16),
    }
    opt_state = (jax.tree.map(lambda x: 2 * x, params), {"count": jnp.int32(step)}, None, ())
    return State(
        jnp.int32(step),
        params,
        opt_state,
        jax.random.normal(key, (2, 1, 2, 4, 4)) if g_lm else None,
    )


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(actual: Any, expected: Any) -> None:
    structures: list[Any] = [jax.tree.structure(actual), jax.tree.structure(expected)]
    assert structures[0] == structures[1]
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(run_dir: Path, steps: dict[int, float | None], **config: Any) -> list[int]:
    """Saves each step with its `eval/loss`; returns the steps that are kept."""
    with Checkpointer(run_dir, CheckpointConfig(**config)) as checkpointer:
        for step, loss in steps.items():
            metrics = {} if loss is None else {"eval/loss": loss}
            checkpointer.save(step, make_state(step), {"next_index": step}, {"n": step}, metrics)
    return checkpointer.all_steps()


def restore(run_dir: Path, log: list[str] | None = None, **kwargs: Any) -> Restored:
    lines = [] if log is None else log
    with Checkpointer(run_dir, CheckpointConfig(), log=lines.append) as checkpointer:
        return checkpointer.restore(abstract(make_state(0)), **kwargs)


@pytest.mark.parametrize("g_lm", [True, False])
def test_round_trip(tmp_path: Path, g_lm: bool) -> None:
    state = make_state(3, g_lm)
    config = {"Model": {"num_layers": 3, "ffn_dim": None, "rope_theta": 1e4}}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.save(3, state, {"next_index": 48}, config, {})
        checkpointer.wait()
        assert not checkpointer.save(3, make_state(4), {}, {}, {})  # the step exists
        assert checkpointer.all_steps() == [3] and checkpointer.latest_step() == 3
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.read_config() == config
        restored = checkpointer.restore(abstract(state))
    assert (restored.step, restored.data_state, restored.config) == (3, {"next_index": 48}, config)
    assert isinstance(restored.state, State)
    assert_same(restored.state, state)


def test_the_state_may_be_donated_after_save(tmp_path: Path) -> None:
    state = make_state(1, size=20_000)
    expected = jax.tree.map(np.array, state)
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, {}, {}, {})
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
        checkpointer.wait()
        assert_same(checkpointer.restore(abstract(state)).state, expected)


def test_restores_onto_other_shardings(tmp_path: Path) -> None:
    save(tmp_path, {1: None})
    state = make_state(1)
    mesh = jax.make_mesh((1,), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(target).state
    assert_same(restored, state)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep_last": 2, "keep_best": False}, [50, 60]),
        ({"keep_last": 1, "keep_every": 20, "keep_best": False}, [20, 40, 60]),
        ({"keep_last": 1, "keep_best": True}, [20, 60]),
    ],
)
def test_what_is_kept(tmp_path: Path, config: dict[str, Any], kept: list[int]) -> None:
    losses = {10: float("nan"), 20: 1.0, 30: 1.5, 40: None, 50: 3.0, 60: float("inf")}
    assert save(tmp_path, losses, **config) == kept
    manifests = {int(path.stem) for path in (tmp_path / "checkpoints" / "manifests").iterdir()}
    assert manifests == set(kept)


def test_the_best_is_kept_after_restarts(tmp_path: Path) -> None:
    save(tmp_path, {10: 1.0, 20: 2.0}, keep_last=1)
    save(tmp_path, {30: 3.0}, keep_last=1)
    assert save(tmp_path, {40: 4.0, 50: 5.0}, keep_last=1) == [10, 50]


def test_a_failed_save_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By `wait` or the next save, in one line; the threads that save print nothing themselves."""
    save(tmp_path, {1: None})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    big = make_state(2, size=50_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))  # as a full disk
        checkpointer.save(2, big, {}, {}, {})
        while any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate()):
            time.sleep(0.01)
        assert not caplog.records
        with pytest.raises(CheckpointError, match="step 2 could not be saved") as error:
            checkpointer.save(3, make_state(3), {}, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(error.value)
    assert checkpointer.all_steps() == [1]
    checkpointer.save(3, big.replace(step=jnp.int32(3)), {}, {}, {}, wait=True)
    checkpointer.close()
    assert checkpointer.all_steps() == [1, 3]


def test_a_save_that_fails_with_a_lost_process_ends_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A lost partner is named as such, and not as a folder that cannot be written."""

    def lose(*_: object, **__: object) -> None:
        raise OSError("Gloo AllReduce failed: Read error [127.0.0.1]:1: Connection reset by peer")

    def end(status: int) -> None:
        raise SystemExit(status)

    with pytest.raises(SystemExit):
        with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
            checkpointer.save(1, make_state(1), {}, {}, {})
            monkeypatch.setattr(checkpointer._manager, "wait_until_finished", lose)
            monkeypatch.setattr(jax, "process_count", lambda: 2)
            monkeypatch.setattr(os, "_exit", end)
            checkpointer.wait()
    assert capfd.readouterr().err == f"{LOST}\n"


def test_close_reports_a_failed_save_unless_the_run_failed_already(tmp_path: Path) -> None:
    for error in (None, KeyError("first")):
        log: list[str] = []
        with pytest.raises(CheckpointError if error is None else KeyError):
            with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
                checkpointer.save(1, make_state(1), {}, {}, {})
                while not checkpointer.all_steps():
                    time.sleep(0.01)
                shutil.rmtree(tmp_path / "checkpoints" / "1")
                if error is not None:
                    raise error
        assert len(log) == (error is not None)


def test_a_full_disk_is_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a save and the file written beside it both fail."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log: list[str] = []
    with pytest.raises(OSError) as error:
        with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
            checkpointer.save(1, make_state(1), {}, {}, {})
            monkeypatch.setattr(checkpointer._manager, "wait_until_finished", fail)
            with whole_file(tmp_path / "curves.png"):
                fail()
    assert error.value.filename == str(tmp_path / "curves.png") and not log


def test_read_weights(tmp_path: Path) -> None:
    state = make_state(5, size=20_000)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(5, state, {}, {"Model": {"num_layers": 2}}, {})
    before = bytes_read()
    weights = read_weights(tmp_path)
    params_bytes = state.params["a"]["kernel"].nbytes
    assert params_bytes * 0.5 < bytes_read() - before < params_bytes * 1.5  # all would be 2
    assert (weights.step, weights.config_dict) == (5, {"Model": {"num_layers": 2}})
    assert_same((weights.params, weights.g_lm), (state.params, state.g_lm))


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_read_weights_without_g_lm(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(5, make_state(5, g_lm=False), {}, {}, {})
    assert read_weights(tmp_path).g_lm is None


def test_read_weights_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give the --run_dir"):
        read_weights(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no complete checkpoint; train"):
        read_weights(tmp_path)
    assert not any(tmp_path.iterdir())


MANY_DEVICES = """
import jax, sys
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from pldr_jax.config import CheckpointConfig
from pldr_jax.runs.checkpoint import Checkpointer
from test_checkpoint import make_state
mesh = jax.make_mesh((4,), ("fsdp",))
def place(x):
    spec = jax.sharding.PartitionSpec(*["fsdp"] * (x.ndim > 0 and x.shape[0] % 4 == 0))
    return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
with Checkpointer(sys.argv[1], CheckpointConfig()) as checkpointer:
    checkpointer.save(1, jax.tree.map(place, make_state(1)), {}, {}, {})
"""


def test_read_weights_of_another_number_of_devices(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", MANY_DEVICES, str(tmp_path)], check=True, env=environment()
    )
    weights, state = read_weights(tmp_path), make_state(1)
    assert_same((weights.params, weights.g_lm), (state.params, state.g_lm))
    assert_same(restore(tmp_path).state, state)


TRAIN = """
import jax, sys
jax.config.update("jax_platforms", "cpu")
from pldr_jax.config import CheckpointConfig
from pldr_jax.runs.checkpoint import Checkpointer
from test_checkpoint import abstract, make_large
checkpointer = Checkpointer(sys.argv[1], CheckpointConfig())
update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
state = make_large(0)
if checkpointer.all_steps():
    state = checkpointer.restore(abstract(state)).state
while True:
    state = update(state)
    step = int(state.step)
    checkpointer.save(step, state, {"next_index": step}, {}, {"eval/loss": 1.0 / step})
    print(step, flush=True)
"""


def make_large(step: int) -> State:
    """16 MB in which every number tells the step."""
    array = jnp.full((1000, 1000), step, jnp.float32)
    return State(jnp.int32(step), {"w": array, "v": array + 0}, (array + 0, array + 0), None)


def environment() -> dict[str, str]:
    tests = Path(__file__).parent
    return {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(0)
    restored_step = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert child.stdout is not None and child.stderr is not None
        first = child.stdout.readline()
        assert first, child.stderr.read()
        time.sleep(chance.uniform(0.0, 1.0))
        child.send_signal(signal.SIGKILL)
        started = [int(line) for line in (first + child.stdout.read()).split()]
        child.wait()
        assert started[0] == restored_step + 1
        if len(started) == 1 and not (tmp_path / "checkpoints" / str(started[0])).is_dir():
            continue  # killed in the first save of this round
        log: list[str] = []
        with Checkpointer(tmp_path, CheckpointConfig(), log=log.append) as checkpointer:
            restored = checkpointer.restore(abstract(make_large(0)))
        restored_step = restored.step
        assert all("unchecked" in line for line in log), log  # killed before the checksums
        assert restored_step >= started[-1] - 1
        assert restored.data_state == {"next_index": restored_step}
        assert_same(restored.state, make_large(restored_step))
    assert restored_step > 0
