"""Where a run is worked on: its folder, or for a run in a bucket a local one that is mirrored."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import jax

from pldr_jax.bucket import Bucket, bucket_url
from pldr_jax.config import ConfigError, UnavailableError
from pldr_jax.files import cache_folder
from pldr_jax.hosts import from_first
from pldr_jax.runs.remote.mirror import Mirror
from pldr_jax.runs.remote.owner import Owner
from pldr_jax.terminal import print_line

FLAG = "--run_dir"


@dataclasses.dataclass(frozen=True)
class RunPlace:
    """A run that is open for writing.

    Attributes:
      name: as the user named it.
      folder: the local one.
      mirror: of a run in a bucket; else None.
    """

    name: str
    folder: Path
    mirror: Mirror | None = None


@contextlib.contextmanager
def open_run(run_dir: str | Path | RunPlace) -> Iterator[RunPlace]:
    """The place of a run; all processes of the run call this. At the end a run in a bucket is
    uploaded whole, whatever ended it.

    Raises:
      ConfigError: another process writes to it, or the bucket cannot be read or written.
    """
    if isinstance(run_dir, RunPlace):
        yield run_dir
        return
    url = bucket_url(run_dir)
    if url is None:
        yield RunPlace(str(run_dir), Path(run_dir))
        return
    index, count = jax.process_index(), jax.process_count()
    bucket, problem = Bucket(url, FLAG), ""
    owner = Owner(bucket)
    if index == 0:
        try:
            owner.take()
        except ConfigError as error:  # of the same kind in all processes, which end alike
            problem = f"{isinstance(error, UnavailableError):d}{error}"
    if problem := from_first(problem):
        raise (UnavailableError if problem[0] == "1" else ConfigError)(problem[1:])
    try:
        work = cache_folder(None) / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
        token = from_first(owner.token)
        mirror = Mirror(bucket, work / str(index), (index, count), token, owner.check)
        try:
            yield RunPlace(url, mirror.folder, mirror)
        except BaseException:
            try:
                mirror.close()
            except ConfigError as error:
                print_line(str(error), to_stderr=True)  # it must not hide what ended the run
            raise
        mirror.close()
    finally:
        if index == 0:
            owner.release()
