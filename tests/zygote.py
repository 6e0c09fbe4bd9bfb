"""Processes that train, cheap to start: forked from one that has imported all that training needs.

Half of the CPU time of a short `train.py` is imports. A zygote has them behind it, and nothing
else: one thread, no device, no array. What it forks is a process of its own, with its own devices,
locks and files, and dies of SIGKILL like any other.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


class Forked:
    """One run of `train.py` in a process that the zygote forked."""

    def __init__(self, pid: int, answers: Any, output: Path) -> None:
        self.pid, self.returncode, self._answers, self._output = pid, None, answers, output

    def poll(self) -> int | None:
        """The exit status, or None while the process runs."""
        return self.wait(0.0)

    def wait(self, seconds: float = 600.0) -> int | None:
        """The exit status, or None if the process runs on after so many seconds."""
        if self.returncode is None and select.select([self._answers], [], [], seconds)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed, errors included."""
        return self._output.read_text()


class Zygote:
    """Starts runs one after another; leaving it kills the one that still runs.

    Args:
      output: the file that the output of the last run is in.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._last: Forked | None = None

    def __enter__(self) -> "Zygote":
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=REPOSITORY,
            # The threads of OpenBLAS would be there before the fork.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            self._last.send_signal(signal.SIGKILL)
            self._last.wait()
        self._process.communicate(timeout=60)

    def start(self, *arguments: object) -> Forked:
        """`train.py` with these arguments, when the run before it has ended."""
        assert self._last is None or self._last.wait() is not None
        order = json.dumps([str(self._output), *map(str, arguments)]) + "\n"
        self._process.stdin.write(order.encode())
        pid = self._process.stdout.readline()
        assert pid, "the zygote has ended; its reason is on stderr"
        self._last = Forked(int(pid), self._process.stdout, self._output)
        return self._last


def main() -> None:
    """The zygote: a line on stdin is a run; its process id and then its exit status come back."""
    import jax
    import matplotlib.pyplot  # noqa: F401
    from jax._src.xla_bridge import backends_are_initialized

    import pldr_jax.training.loop  # noqa: F401
    from pldr_jax.cli.training import train as program

    keep = program.keep_compiled_programs

    def keep_all(cache_dir: str | None) -> None:
        keep(cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    program.keep_compiled_programs = keep_all
    for line in iter(sys.stdin.readline, ""):
        output, *arguments = json.loads(line)
        assert _threads() == 1, "threads do not survive a fork"
        assert not backends_are_initialized()
        pid = os.fork()
        if pid == 0:
            _become(Path(output))
            program.run(program.train_main, arguments)
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _threads() -> int:
    """Those of C++ as well, where the kernel tells."""
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) if tasks.exists() else threading.active_count()


def _become(output: Path) -> None:
    """Files of its own for a process that was forked."""
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(written, 1)
    os.dup2(written, 2)


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # as for train.py
    main()
