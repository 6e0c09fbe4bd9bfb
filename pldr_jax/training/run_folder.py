"""A folder that appears whole or not at all, and a run folder made of weights alone."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from pldr_jax.config import CheckpointConfig, ConfigError
from pldr_jax.model.decoder import Params
from pldr_jax.training.checkpoint import Checkpointer

OUTPUT = "--output"


def check_output(output: str | Path, flag: str = OUTPUT, replaces: str | None = None) -> None:
    """ConfigError, which names the `flag`, if something is there already; a folder that holds the
    file `replaces` may be.
    """
    folder = Path(output)
    if replaces is not None and (folder / replaces).is_file():
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{flag}={output}: is not an empty folder; name another one")


@contextlib.contextmanager
def new_folder(
    output: str | Path, flag: str = OUTPUT, replaces: str | None = None
) -> Iterator[Path]:
    """A temporary folder, which becomes `output` if nothing is raised in it, and else vanishes.

    Args:
      replaces: a folder that holds a file of this name gives way to the new one; None refuses
        every folder that is not empty.

    Raises:
      ConfigError: `output` is there already, or cannot be written.
    """
    check_output(output, flag, replaces)
    # A relative name without a parent, "." and links have one only when resolved.
    folder = Path(output).resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{flag}={output}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def _put(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; one with files in it, which cannot be renamed over, steps aside
    and comes back if that fails.
    """
    if not (folder.is_dir() and any(folder.iterdir())):
        os.replace(new, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    os.replace(folder, aside)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def fill_run(
    folder: Path,
    step: int,
    params: Params,
    g_lm: jax.Array | None,
    config_dict: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Writes a checkpoint without optimiser state, and other files, into a folder.

    Args:
      step: of the checkpoint.
      g_lm: [L,1,N,H,J], None where it is learned or the identity.
      config_dict: the config that belongs to the parameters.
      files: contents of other files by their names.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    with Checkpointer(folder, CheckpointConfig()) as checkpointer:
        state = {"params": params, "g_lm": g_lm}
        checkpointer.save(step, state, {}, config_dict, {}, wait=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_run(
    output: str | Path,
    step: int,
    params: Params,
    g_lm: jax.Array | None,
    config_dict: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """A new run folder of weights alone, which `pldr_jax.load` opens: all of it or nothing.

    Raises:
      ConfigError: as `new_folder`.
      CheckpointError: as `fill_run`.
    """
    with new_folder(output) as folder:
        fill_run(folder, step, params, g_lm, config_dict, files)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
