"""A run folder made of weights alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pldr_jax.config import CheckpointConfig
from pldr_jax.files import new_folder
from pldr_jax.model.decoder import Params
from pldr_jax.runs.checkpoint import Checkpointer


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
