"""The lock of a run in a bucket: an object that says who writes, and that its writer is alive."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from pldr_jax.bucket import Bucket
from pldr_jax.config import ConfigError
from pldr_jax.terminal import print_line

NAME = ".owner.json"
BEAT_SECONDS = 15.0
LOST_SECONDS = 60.0
"""After which an owner that has not been heard of is taken for dead."""
_OLD_SECONDS = 900.0
"""The same by the clocks of two machines, which may differ."""


class Owner:
    """This process as the one that writes to a run in a bucket.

    Args:
      bucket: the run.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket, self._ended = bucket, threading.Event()
        self.token = uuid.uuid4().hex
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def take(self) -> None:
        """Becomes the owner; waits for a minute where another machine may still be it.

        Raises:
          ConfigError: another process is, or the bucket cannot be used.
        """
        first = self._read()
        if first is not None and not _is_dead(first):
            place = f"process {first.get('pid')} on {first.get('host')}"
            if first.get("machine") != _machine():
                print_line(
                    f"{self._bucket.url}: waits for {LOST_SECONDS:.0f} s, to see whether {place}, "
                    "which wrote to it last, is still alive",
                    to_stderr=True,
                )
                deadline = time.monotonic() + LOST_SECONDS
                while (now := self._read()) == first and time.monotonic() < deadline:
                    time.sleep(1.0)
                first = now if now != first else None
            if first is not None:
                raise ConfigError(
                    f"--run_dir={self._bucket.url}: is in use by {place}; wait for its end, or "
                    "name another folder"
                )
        self._bucket.remove([NAME])
        if not self._bucket.write(NAME, self._content(), new=True):
            raise ConfigError(
                f"--run_dir={self._bucket.url}: another process has just begun to use it; name "
                "another folder"
            )
        self._thread.start()

    def check(self) -> None:
        """ConfigError where another process has become the owner."""
        now = self._read()
        if now is None or now.get("token") != self.token:
            other = "another process" if now is None else f"process {now['pid']} on {now['host']}"
            raise ConfigError(
                f"--run_dir={self._bucket.url}: was taken over by {other}, because this one was "
                f"not heard of for {LOST_SECONDS:.0f} s; what it had not uploaded is lost"
            )

    def release(self) -> None:
        """Lets others in."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(ConfigError):
            self.check()
            self._bucket.remove([NAME])

    def _read(self) -> dict[str, Any] | None:
        content = self._bucket.read(NAME)
        try:
            owner = None if content is None else json.loads(content)
        except ValueError:
            owner = None
        return owner if isinstance(owner, dict) else None

    def _content(self) -> bytes:
        facts = {"token": self.token, "host": socket.gethostname(), "pid": os.getpid()}
        return json.dumps({**facts, "machine": _machine(), "time": time.time()}).encode()

    def _keep_beating(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(ConfigError):  # said when the next checkpoint is uploaded
                self.check()
                self._bucket.write(NAME, self._content())


def _machine() -> str:
    """Tells this machine, and this boot of it, from others of its name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote this has certainly ended."""
    pid, seen = owner.get("pid"), owner.get("time")
    if not isinstance(pid, int) or not isinstance(seen, int | float):
        return True
    if owner.get("machine") == _machine():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - seen > _OLD_SECONDS
