"""A run in a bucket, worked on in a local folder whose whole files are uploaded.

A checkpoint is there for others when its manifest is, which is uploaded after all of its files, and
after the metrics up to its step. Its arrays then leave the local folder. In a run of several
processes each has a folder of its own and uploads its shards of the arrays; the first uploads
everything else, and the manifest when all have said that they are done.
"""

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pldr_jax.bucket import Bucket
from pldr_jax.config import ConfigError, UnavailableError
from pldr_jax.runs.checksums import ITEMS, complete_steps, read_manifest, write_manifest
from pldr_jax.terminal import print_line

UPLOAD_SECONDS = 30.0
"""Between uploads of metrics, samples and TensorBoard files."""
GIVE_UP_SECONDS = 300.0
"""For which uploads may fail before the run ends."""
_POLL_SECONDS = 0.5
_CHECKPOINTS = "checkpoints"
_MANIFEST = re.compile(r"checkpoints/manifests/(\d+)\.json")
_SHARD = re.compile(r"state/(.*/[\d.]+|array_metadatas/.*process_\d+.*)")
"""Files that each process has for itself."""
_NOT_FETCHED = ("tensorboard/", "profile/", ".")


class Mirror:
    """The bucket of a run and the local folder.

    Args:
      bucket: the run.
      folder: the local one; emptied.
      process: of this process, and how many there are.
      token: of this attempt at the run, the same in all processes.
      check: raises ConfigError where another process writes to the bucket by now.

    Raises:
      ConfigError: the bucket cannot be read.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        process: tuple[int, int],
        token: str,
        check: Callable[[], None],
    ) -> None:
        self.url, self.folder = bucket.url, folder
        self._bucket, self._token, self._check = bucket, token, check
        self._index, self._count = process
        self._checkpoints = folder / _CHECKPOINTS
        self._steps: set[int] = set()  # uploaded
        self._sent: dict[str, tuple[int, int]] = {}
        self._error: str | None = None
        self._ending, self._lock = threading.Event(), threading.RLock()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._fetch()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def fetch_step(self, step: int) -> None:
        """Fetches what is missing of a checkpoint; ConfigError where that fails."""
        where, below = self._checkpoints / str(step), f"{_CHECKPOINTS}/{step}/"
        for name in self._bucket.objects():
            if name.startswith(below) and not (self.folder / name).exists():
                self._bucket.get(name, self.folder / name)
        for item in ITEMS:
            (where / item).mkdir(parents=True, exist_ok=True)

    def wait(self, step: int) -> None:
        """Returns when a checkpoint is uploaded; OSError where that fails."""
        while step not in self._steps:
            if self._error is not None:
                raise OSError(self._error)
            time.sleep(0.02)

    def retire(self) -> None:
        """Removes the checkpoints that are gone from the local folder, their manifests first."""
        with self._lock:
            here = set(complete_steps(self._checkpoints))
            if not here:  # someone has cleaned up the cache folder: nothing is to follow from that
                return
            gone = self._steps - here
            if gone and self._index == 0:
                self._remove(gone)
            self._steps -= gone

    def close(self) -> None:
        """Uploads what is left.

        Raises:
          UnavailableError: that fails; the local folder stays, under a name that no later run
            empties.
        """
        self._ending.set()
        self._thread.join()
        try:
            if self._error is not None:
                raise ConfigError(self._error)
            self._upload()
        except (ConfigError, OSError) as error:
            kept = self.folder.with_name(f"{self.folder.name}-{self._token[:8]}")
            self.folder.rename(kept)
            raise UnavailableError(f"{error}; what is not uploaded lies in {kept}") from None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _fetch(self) -> None:
        """Everything but the arrays of checkpoints; removes what was not uploaded whole."""
        names = list(self._bucket.objects())
        self._steps = {int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name))}
        kept = tuple(f"{_CHECKPOINTS}/{step}/" for step in self._steps)
        for name in names:
            of_checkpoint = name.startswith(f"{_CHECKPOINTS}/")
            is_kept = name.startswith(kept) or _MANIFEST.fullmatch(name)
            wanted = not name.startswith(_NOT_FETCHED) and "/state/" not in name
            if wanted and (is_kept or not of_checkpoint):
                self._bucket.get(name, self.folder / name)
        for step in self._steps:
            for item in ITEMS:
                (self._checkpoints / str(step) / item).mkdir(parents=True, exist_ok=True)
        self._sent = {name: self._state_of(name) for name in self._others()}
        if self._index == 0:
            stored = (name for name in names if name.startswith(f"{_CHECKPOINTS}/"))
            self._bucket.remove(
                n for n in stored if not n.startswith(kept) and not _MANIFEST.fullmatch(n)
            )

    def _work(self) -> None:
        failing, uploaded = None, time.monotonic()
        while not self._ending.wait(_POLL_SECONDS):
            all_files = time.monotonic() - uploaded > UPLOAD_SECONDS
            try:
                self._upload(all_files)
                uploaded, failing = time.monotonic() if all_files else uploaded, None
            except Exception as error:
                if failing is None:
                    failing = time.monotonic()
                    print_line(f"{error}; it is tried again", to_stderr=True)
                if time.monotonic() - failing > GIVE_UP_SECONDS or "taken over" in str(error):
                    self._error = str(error)
                    return
                self._ending.wait(5.0)

    def _upload(self, all_files: bool = True) -> None:
        """New checkpoints, and other files that have changed."""
        with self._lock:
            for step in complete_steps(self._checkpoints):
                if step not in self._steps:
                    self._upload_step(step)
            self.retire()
            if all_files:
                self._upload_others()

    def _upload_step(self, step: int) -> None:
        write_manifest(self._checkpoints, step)
        manifest = read_manifest(self._checkpoints, step) or {}
        where, remote = self._checkpoints / str(step), f"{_CHECKPOINTS}/{step}"
        files = [p.relative_to(where).as_posix() for p in where.rglob("*") if p.is_file()]
        mine = files if self._index == 0 else [name for name in files if _SHARD.fullmatch(name)]
        self._upload_others()
        for name in sorted(mine):
            self._bucket.put(where / name, f"{remote}/{name}")
        if self._count > 1:
            listed = {name: manifest[name] for name in mine if name in manifest}
            self._bucket.write(self._list_of(step, self._index), json.dumps(listed).encode())
        if self._index == 0:
            for process in range(1, self._count):
                manifest = self._wait_for_list(step, process) | manifest
            self._check()
            self._bucket.write(
                f"{_CHECKPOINTS}/manifests/{step}.json", json.dumps(manifest).encode()
            )
            self._bucket.remove(self._list_of(step, k) for k in range(self._count))
        for path in (where / "state").iterdir():  # restored from the bucket, should that be needed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._steps.add(step)

    def _wait_for_list(self, step: int, process: int) -> dict[str, list[int]]:
        """The files that another process has uploaded."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while (content := self._bucket.read(self._list_of(step, process))) is None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--run_dir={self.url}: process {process} has not uploaded its part of step "
                    f"{step}"
                )
            time.sleep(0.2)
        listed: dict[str, list[int]] = json.loads(content)
        return listed

    def _list_of(self, step: int, process: int) -> str:
        return f"{_CHECKPOINTS}/manifests/.{step}.{process}.{self._token}"

    def _remove(self, steps: set[int]) -> None:
        self._bucket.remove(f"{_CHECKPOINTS}/manifests/{step}.json" for step in steps)
        below = tuple(f"{_CHECKPOINTS}/{step}/" for step in steps)
        self._bucket.remove(name for name in self._bucket.objects() if name.startswith(below))

    def _others(self) -> list[str]:
        """Files beside checkpoints, without hidden and temporary ones."""
        names = (p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*"))
        return [
            name
            for name in sorted(names)
            if not name.startswith(_CHECKPOINTS)
            and not any(part.startswith(".") for part in name.split("/"))
            and (self.folder / name).is_file()
        ]

    def _state_of(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_mtime_ns, status.st_size

    def _upload_others(self) -> None:
        for name in self._others():
            with contextlib.suppress(FileNotFoundError):  # replaced at this moment
                state = self._state_of(name)
                if self._sent.get(name) == state:
                    continue
                copy = self.folder / ".upload"
                shutil.copyfile(self.folder / name, copy)  # the file may grow meanwhile
                self._bucket.put(copy, name)
                self._sent[name] = state
