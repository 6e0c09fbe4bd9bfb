"""Checkpoints: a training state, the position in the data and the configuration, in a step folder.

This is the only file that knows Orbax. A step folder gets its final name when all of it is written:
a run killed at any moment leaves complete checkpoints, and at most a temporary folder that nobody
reads and that the next run's first save removes. When a save is complete, checksums of its files
are written next to it (`pldr_jax/runs/checksums.py`); they are checked when it is read.
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import CheckpointConfig
from pldr_jax.config.load import config_from_dict
from pldr_jax.files import one_line
from pldr_jax.hosts import ending_with_the_others
from pldr_jax.model.counts.shapes import param_shardings
from pldr_jax.runs.checksums import (
    BEST_METRIC,
    CheckpointError,
    Log,
    check_fits,
    complete_steps,
    newest_whole,
    readable_metrics,
    remove_orphans,
    write_manifest,
)
from pldr_jax.runs.remote.mirror import Mirror
from pldr_jax.terminal import print_line

_CAUSES = re.compile(
    "No space left on device|Disk quota exceeded|File too large|Permission denied|"
    "Read-only file system"
)
"""In what is else a page of paths."""

__all__ = ["BEST_METRIC", "CheckpointError", "Checkpointer", "Restored", "Weights", "read_weights"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """All of a checkpoint, to continue training from."""

    step: int
    state: Any
    data_state: dict[str, Any]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weights:
    """The part of a checkpoint that inference needs."""

    step: int
    config_dict: dict[str, Any]
    params: Any
    g_lm: jax.Array | None


def _to_stderr(line: str) -> None:
    print_line(line, to_stderr=True)


class Checkpointer:
    """Writes and reads the checkpoints of one run, under `run_dir/checkpoints`.

    In a run of several processes, all of them call every method. `log` takes one line of text. With
    a `mirror` the run is in a bucket, and each process has a `run_dir` of its own.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        log: Log = _to_stderr,
        mirror: Mirror | None = None,
    ) -> None:
        self.name = str(run_dir) if mirror is None else mirror.url
        self.folder = Path(run_dir) / "checkpoints"
        self._config, self._log, self._mirror = config, log, mirror
        self._manager: ocp.CheckpointManager | None = None  # from the first save on
        self._saving: int | None = None
        self._restored: int | None = None  # what is newer than this is of another history

    def save(
        self,
        step: int,
        state: Any,
        data_state: Mapping[str, Any],
        config_dict: Mapping[str, Any],
        metrics: Mapping[str, float],
        wait: bool = False,
    ) -> bool:
        """Starts to save, and returns when `state` may be changed or donated; False: `step` exists.

        The first save after `restore` removes what is newer than the restored step.

        Args:
          step: its number; larger than those saved before.
          state: tree of arrays, with `params` and `g_lm` for `read_weights`.
          data_state: position in the data, for JSON.
          config_dict: the configuration, for JSON.
          metrics: of this state; only `eval/loss` is used, and it may be missing.
          wait: return only when the checkpoint is complete.

        Raises:
          CheckpointError: this save, or the one before it, failed.
        """
        self.wait()
        with _quiet(), self._reporting(step):
            if self._writes:
                _check_writable(self.folder)
            manager = self._manager or self._open()
            if step in self.all_steps():
                return False
            loss = metrics.get(BEST_METRIC, math.nan)
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(dict(config_dict)),
            )
            best = {BEST_METRIC: float(loss)} if math.isfinite(loss) else None
            manager.save(step, args=items, metrics=best, force=True)
        self._saving = step
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when the last save is complete.

        Raises:
          CheckpointError: it failed.
        """
        step, self._saving = self._saving, None
        if self._manager is None or step is None:
            return
        with _quiet(), self._reporting(step):
            self._manager.wait_until_finished()
            if step not in self.all_steps():
                raise OSError("the step folder did not appear")
            if self._mirror is not None:
                self._mirror.wait(step)
            elif jax.process_index() == 0:
                write_manifest(self.folder, step)
                remove_orphans(self.folder)

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """The newest checkpoint that is whole, or that of `step`; a damaged one is logged.

        Args:
          abstract_state: the state as ShapeDtypeStructs with the shardings it is to have.
          step: this one and no other.

        Raises:
          CheckpointError: there is none, all are damaged, or it is of another configuration.
        """
        self.close()

        def read(folder: Path) -> tuple[Any, Any, Any]:
            data_state, config = _read_json(folder / "data"), _read_json(folder / "config")
            check_fits(_stored_arrays(folder / "state"), abstract_state)
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                args = ocp.args.StandardRestore(abstract_state)
                return reader.restore(folder / "state", args=args), data_state, config

        with _quiet():
            fetch = None if self._mirror is None else self._mirror.fetch_step
            self._restored, parts = newest_whole(self.folder, step, read, self._log, fetch)
        return Restored(self._restored, *parts)

    def read_config(self) -> dict[str, Any] | None:
        """The configuration stored with the newest checkpoint that has a readable one."""
        with _quiet():
            for step in reversed(self.all_steps()):
                with contextlib.suppress(Exception):
                    return _read_json(self.folder / str(step) / "config")
        return None

    def all_steps(self) -> list[int]:
        """Steps of the complete checkpoints, in rising order."""
        return complete_steps(self.folder)

    def latest_step(self) -> int | None:
        """The newest step, damaged or not; None where there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def close(self) -> None:
        """Waits for the last save, and frees what saving needs; a later save starts anew.

        Raises:
          CheckpointError: the last save failed.
        """
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                with _quiet(), contextlib.suppress(Exception):  # `wait` has reported it
                    manager.close()
                logging.getLogger("absl").removeFilter(_not_of_orbax)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            cause = _CAUSES.search(str(failed))
            if cause is None or cause[0] not in str(error):  # a full disk is one line
                self._log(str(failed))  # it must not hide the error that ends the run

    @contextlib.contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        """Turns what goes wrong while saving into a `CheckpointError`."""
        try:
            with ending_with_the_others():
                yield
        except Exception as error:
            known = _CAUSES.search(str(error))
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} could not be saved "
                f"({known[0] if known else one_line(error)}); see to the free space, "
                "the permissions of the folder and the limit of open files (ulimit -n)"
            ) from error

    def _open(self) -> ocp.CheckpointManager:
        """The Orbax manager, on a folder that it can read; its threads are silent until `close`."""
        logging.getLogger("absl").addFilter(_not_of_orbax)
        restored, self._restored = self._restored, None
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for step in self.all_steps():
                if restored is not None and step > restored:
                    self._log(
                        f"{self.folder}: checkpoint of step {step} is removed,"
                        f" this run continues from step {restored}"
                    )
                    shutil.rmtree(self.folder / str(step))
                elif not readable_metrics(self.folder / str(step)):
                    shutil.rmtree(self.folder / str(step) / "metrics")  # Orbax cannot pass over it
            remove_orphans(self.folder)
        if self._mirror is not None:
            self._mirror.retire()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("pldr_jax.checkpoint.open")
        policies = ocp.checkpoint_managers
        keep: list[Any] = [policies.LatestN(self._config.keep_last)]
        if self._config.keep_every is not None:
            keep.append(policies.EveryNSteps(self._config.keep_every))
        if self._config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep),
            best_fn=_loss,  # without it, metrics are not stored and the best is lost at a restart
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        handlers: Any = None
        if self._mirror is not None and jax.process_count() > 1:
            alone = ocp.options.MultiprocessingOptions(primary_host=None)
            options.multiprocessing_options = alone
            # Each process would wait for the folders of the first one.
            options.async_options = ocp.options.AsyncOptions(
                create_directories_asynchronously=False
            )
            # In this format the folder of all is the union of those of each.
            state = ocp.StandardCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
            texts = (ocp.JsonCheckpointHandler(multiprocessing_options=alone) for _ in range(2))
            handlers = dict(zip(("state", "data", "config"), (state, *texts), strict=True))
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(), options=options, item_handlers=handlers
        )
        return self._manager

    @property
    def _writes(self) -> bool:
        """Whether this process makes and removes folders."""
        return self._mirror is not None or jax.process_index() == 0


def read_weights(
    run_dir: str | Path,
    step: int | None = None,
    log: Log = _to_stderr,
    mesh: Mesh | None = None,
) -> Weights:
    """Parameters, G_LM and configuration of a run's newest whole checkpoint, or of that of `step`.

    The arrays come to the default device, however many devices wrote them; to those of a `mesh`
    each in its parts, and none is ever whole on one of them. The folder is not changed, so a run
    that is still training can be read.

    Raises:
      CheckpointError: there is no such folder or checkpoint, or all are damaged.
    """
    if not Path(run_dir).is_dir():
        raise CheckpointError(f"{run_dir}: no such folder; give the --run_dir of a training run")
    device = next(iter(jnp.zeros(()).devices()))
    whole = jax.sharding.SingleDeviceSharding(device)

    def read(folder: Path) -> tuple[Any, Any, Any]:
        tree, config = _stored_arrays(folder / "state"), _read_json(folder / "config")
        stored = {"params": tree["params"], "g_lm": tree["g_lm"]}
        places: Any = jax.tree.map(lambda leaf: whole, stored)
        if mesh is not None:
            run = config_from_dict(config, "")
            places = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), stored)
            if not run.lora.rank:  # adapters are small
                places["params"] = param_shardings(run.model, mesh)
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            stored,
            places,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(
                item=abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,  # optimiser state is not read
            )
            state = reader.restore(folder / "state", args=args)
            return config, state["params"], state["g_lm"]

    with _quiet():
        found, parts = newest_whole(Path(run_dir) / "checkpoints", step, read, log)
    return Weights(found, *parts)


def _check_writable(folder: Path) -> None:
    """OSError where no folder can be made in it: Orbax would notice in a thread that others wait
    for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=folder))


def _stored_arrays(folder: Path) -> Any:
    """A description of each saved array, in dicts and lists."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.metadata(folder).item_metadata.tree


def _loss(metrics: Mapping[str, float]) -> float:
    return metrics[BEST_METRIC]


def _read_json(folder: Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.JsonRestore())


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter: the threads that save tell of a failure that `Checkpointer.wait` reports too."""
    return "orbax" not in record.pathname


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing what is reported in one line here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
