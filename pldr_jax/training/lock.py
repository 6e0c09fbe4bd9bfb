"""A run folder is written by one run at a time."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from pldr_jax.config import ConfigError

LOCK = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path, enabled: bool = True) -> Iterator[None]:
    """Holds the folder until the end, or the death, of this process.

    It is the kernel that knows whether anybody holds the file; one that a killed run left is free.

    Args:
      run_dir: made if it is not there, and removed again if nothing was put into it.
      enabled: False does nothing, for the processes other than the first.

    Raises:
      ConfigError: another process holds it, or it cannot be written to.
    """
    if not enabled:
        yield
        return
    try:
        file = _opened(run_dir)
    except OSError as error:
        raise ConfigError(
            f"--run_dir={run_dir}: cannot be written to ({error.strerror}); name another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (run_dir / LOCK).unlink()
            run_dir.rmdir()  # only where it is empty
        file.close()


def _opened(run_dir: Path) -> TextIO:
    """The lock file, held."""
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"--run_dir={run_dir}: is in use by process {holder}; wait for its end, or name "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
        # The run that held it may have removed the file that was opened here.
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(file.fileno()), (run_dir / LOCK).stat()):
                raise FileNotFoundError
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()
