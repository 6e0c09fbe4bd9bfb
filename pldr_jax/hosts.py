"""Several processes as one program: joining them, and agreeing among them.

On Cloud TPU pods, under Slurm and under Open MPI JAX finds the others by itself; elsewhere flags or
environment variables say where they are.
"""

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from pldr_jax.config import ConfigError, UnavailableError
from pldr_jax.files import one_line
from pldr_jax.terminal import flush_streams, print_line

ENVIRONMENT = {
    "coordinator": "PLDR_COORDINATOR",
    "processes": "PLDR_PROCESSES",
    "process_index": "PLDR_PROCESS_INDEX",
}
WAIT_SECONDS = 300
"""For all processes of a run to start."""
REMIND_SECONDS = 30.0
"""Between lines that say that a process waits."""
SILENT_SECONDS = 30
"""After which a process that says nothing is lost."""

LOST = (
    "error: another process of the run is lost; see what it says, then start all of them again: "
    "the run goes on from its last checkpoint"
)
_FILTER = """
import re, sys
known = re.compile(rb"[IWE][0-9]{4} .*(coordination_service|preemption_sync_manager)|.Gloo. Rank ")
more = re.compile(rb"Additional GRPC|:UNKNOWN:|The tasks have|RPC: |[0-9]*$")
lost, dropped = sys.argv[1].encode(), False
for line in sys.stdin.buffer:
    if b"Terminating process because the JAX distributed service" in line or lost in line:
        sys.stderr.write(lost.decode() + chr(10))
        sys.stdin.buffer.read()
        break
    dropped = bool(known.match(line) or dropped and more.match(line))
    if not dropped:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
"""
_FILTERS: list[subprocess.Popen[bytes]] = []
_LOST = re.compile(
    "gloo|nccl|unavailable|deadline_exceeded|connection (closed|reset)|unhealthy", re.I
)
"""What the failures of other processes look like here."""


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
      ConfigError: only some of the three are given; an UnavailableError where the others cannot be
        reached.
    """
    given = {
        "coordinator": coordinator or environment.get("PLDR_COORDINATOR"),
        "processes": _number("processes", processes, environment),
        "process_index": _number("process_index", process_index, environment),
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if launched(environment):
            _initialize({}, "the launcher's processes")
        return
    if missing:
        raise ConfigError(
            f"--{missing[0]}: must be given with the other two of --coordinator, --processes and "
            f"--process_index (or as {ENVIRONMENT[missing[0]]})"
        )
    count, index, address = given["processes"], given["process_index"], str(given["coordinator"])
    assert isinstance(count, int) and isinstance(index, int)
    if not 0 <= index < count:
        raise ConfigError(f"--process_index={index}: must be from 0 to {count - 1}")
    port = re.fullmatch(r".+:([0-9]{1,5})", address)
    if port is None or not 0 < int(port[1]) < 2**16:
        host = address.partition(":")[0] or "localhost"
        raise ConfigError(f"--coordinator={address}: must be HOST:PORT, as in {host}:1234")
    if count == 1:
        return
    _initialize(
        {"coordinator_address": address, "num_processes": count, "process_id": index},
        f"--coordinator={address}: process {index} of {count}",
    )


def _initialize(places: dict[str, Any], who: str) -> None:
    """Joins the others, and says so while it waits for them.

    Raises:
      UnavailableError: they cannot be joined.
    """
    _shorten_fatal_errors()
    with _reminding(who):
        try:
            jax.distributed.initialize(
                **places,
                initialization_timeout=WAIT_SECONDS,
                heartbeat_timeout_seconds=SILENT_SECONDS,
            )
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise UnavailableError(
                f"{who} cannot join the others ({one_line(error)}); start all of them, with the "
                "same address"
            ) from None


def _shorten_fatal_errors() -> None:
    """Sends stderr through a process that makes one line of the page of C++ frames with which XLA
    ends a process whose partner is lost.
    """
    if _FILTERS:
        return
    end, write = os.pipe()
    _FILTERS.append(
        subprocess.Popen(
            [sys.executable, "-S", "-c", _FILTER, LOST], stdin=end, start_new_session=True
        )
    )
    os.dup2(write, 2)
    os.close(end)
    os.close(write)


def _end() -> NoReturn:
    """Ends this process at once: everything else would wait for the one that is lost."""
    print_line(LOST, to_stderr=True)
    flush_streams()
    os._exit(1)


@contextlib.contextmanager
def ending_with_the_others() -> Iterator[None]:
    """Ends this process in one line where an operation fails because another process is lost."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and _LOST.search(str(error)):
            _end()
        raise


@contextlib.contextmanager
def _reminding(who: str) -> Iterator[None]:
    """Says at intervals that a process waits for others, and who is there."""
    joined = threading.Event()

    def remind() -> None:
        while not joined.wait(REMIND_SECONDS):
            line = f"{who} waits for the others, for {WAIT_SECONDS} s at most{_who_is_there()}"
            print_line(line, to_stderr=True)

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    try:
        yield
    finally:
        joined.set()
        thread.join()


def _who_is_there() -> str:
    """What this process knows of the others: the first one, who has connected to it; another one,
    whether the first one answers. "" where nothing is known.
    """
    try:
        from jax._src.distributed import global_state as state
    except ImportError:  # no public name has it
        return ""
    host, _, port = (state.coordinator_address or "").rpartition(":")
    if not port.isdigit():
        return ""
    if state.process_id:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            return f"; {host}:{port}, process 0, does not answer ({error.strerror or error})"
        return f"; process 0, at {host}:{port}, answers: another process is missing"
    peers = Counter(host for host in connected_hosts(int(port), Path("/proc/net")))
    listed = ", ".join(f"{count} on {host}" for host, count in sorted(peers.items()))
    return f"; of {state.num_processes} processes {peers.total()} are here: {listed}"


def connected_hosts(port: int, tables: Path) -> list[str]:
    """Addresses that have a connection to a port of this machine, one for each connection.

    Args:
      tables: the folder where Linux lists connections; elsewhere nothing is known.
    """
    hosts = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (tables / name).read_text().splitlines()[1:]:
                _, local, remote, status, *_ = line.split()
                if status == "01" and int(local.rpartition(":")[2], 16) == port:
                    words = bytes.fromhex(remote.partition(":")[0])
                    address = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                    found = ipaddress.ip_address(address)
                    hosts.append(str(getattr(found, "ipv4_mapped", None) or found))
    return hosts


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes.

    A program in a Slurm allocation, but not started by srun, has the allocation's number of tasks
    in its environment and is alone.

    Raises:
      ConfigError: a launcher's variable holds something else than it says.
    """
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        if _count(tasks, environment) > 1:
            return True
    if _count("OMPI_COMM_WORLD_SIZE", environment) > 1:
        return True
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def _count(name: str, environment: Mapping[str, str]) -> int:
    text = environment.get(name, "1")
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(
            f"{name} = {text!r}: must be a whole number; unset it, or name the processes with "
            "--coordinator, --processes and --process_index"
        )
    return int(text)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them call this at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(text: str) -> str:
    """What process 0 passed, in all processes; all of them call this. At most 2,000 bytes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    encoded = text.encode()[:2000].ljust(2000, b"\0")
    first = multihost_utils.broadcast_one_to_all(np.frombuffer(encoded, np.uint8))
    return bytes(np.asarray(first)).rstrip(b"\0").decode(errors="replace")


def code_facts() -> dict[str, str]:
    """What `agree` compares of the programs themselves."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return {"the code of pldr_jax": digest.hexdigest(), "the version of JAX": jax.__version__}


def agree(facts: Mapping[str, Any]) -> None:
    """Compares facts that must be the same in all processes; all of them call this.

    Args:
      facts: by the names that a message is to use; values that `json` can hold.

    Raises:
      ConfigError: says which processes differ, and in what.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = [
        np.frombuffer(hashlib.sha256(json.dumps(value).encode()).digest(), np.uint8)
        for value in facts.values()
    ]
    digests_PF = np.asarray(multihost_utils.process_allgather(np.stack(mine)))
    differs_PF = (digests_PF != digests_PF[:1]).any(-1)
    if not differs_PF.any():
        return
    others = np.flatnonzero(differs_PF.any(1)).tolist()
    names = [name for name, differs in zip(facts, differs_PF.any(0), strict=True) if differs]
    raise ConfigError(
        f"{', '.join(names)}: not the same in process{'es' * (len(others) > 1)} "
        f"{', '.join(map(str, others))} as in process 0; start all with the same command, code and "
        "text"
    )


def _number(name: str, value: int | None, environment: Mapping[str, str]) -> int | None:
    text = environment.get(ENVIRONMENT[name])
    if value is not None or text is None:
        return value
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{ENVIRONMENT[name]} = {text!r}: must be a whole number") from None
