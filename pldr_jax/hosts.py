"""Several processes as one program: joining them, and agreeing among them.

On Cloud TPU pods, under Slurm and under Open MPI JAX finds the others by itself; elsewhere flags or
environment variables say where they are.
"""

import os
from collections.abc import Mapping

import jax
import numpy as np

from pldr_jax.config import ConfigError

ENVIRONMENT = {
    "coordinator": "PLDR_COORDINATOR",
    "processes": "PLDR_PROCESSES",
    "process_index": "PLDR_PROCESS_INDEX",
}


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process_index: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Joins the processes of a run; call it before anything touches a device.

    Args:
      coordinator: `HOST:PORT` of process 0, that every process can reach.
      processes: how many there are.
      process_index: of this one, from 0.
      environment: has `PLDR_COORDINATOR`, `PLDR_PROCESSES` and `PLDR_PROCESS_INDEX` for what is not
        given, or what a launcher left there. With neither, this is a run of one process.

    Raises:
      ConfigError: only some of the three are given, or the others cannot be reached.
    """
    given = {
        "coordinator": coordinator or environment.get("PLDR_COORDINATOR"),
        "processes": _number("processes", processes, environment),
        "process_index": _number("process_index", process_index, environment),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if launched(environment):
            jax.distributed.initialize()
        return
    if missing:
        raise ConfigError(
            f"--{missing[0]}: must be given with the other two of --coordinator, --processes and "
            f"--process_index (or as {ENVIRONMENT[missing[0]]})"
        )
    count, index = given["processes"], given["process_index"]
    assert isinstance(count, int) and isinstance(index, int)
    if not 0 <= index < count:
        raise ConfigError(f"--process_index={index}: must be from 0 to {count - 1}")
    if count == 1:
        return
    try:
        jax.distributed.initialize(str(given["coordinator"]), count, index)
    except RuntimeError as error:
        raise ConfigError(
            f"--coordinator={given['coordinator']}: process {index} of {count} cannot join "
            f"({str(error).splitlines()[0]})"
        ) from None


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _number(name: str, value: int | None, environment: Mapping[str, str]) -> int | None:
    text = environment.get(ENVIRONMENT[name])
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{ENVIRONMENT[name]} = {text!r}: must be a whole number") from None
