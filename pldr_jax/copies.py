"""Local copies of what lies in a bucket: folders, files and globs, and files that grow there."""

import contextlib
import fnmatch
import glob
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pldr_jax.bucket import VERSION, Bucket, bucket_url
from pldr_jax.config import ConfigError
from pldr_jax.files import cache_folder, locked, new_folder, user_path

UPLOAD_SECONDS = 30.0
"""Between uploads of files that grow."""


def fetch_folder(url: str, flag: str, choose: Callable[[Iterable[str]], Iterable[str]]) -> Path:
    """A copy of a folder of a bucket, in the cache folder: all of it, or none.

    A folder whose objects have not changed is copied once.

    Args:
      url: as `bucket_url` gives it.
      flag: that named it, for errors.
      choose: the names to copy, relative to the folder. That of an object at the URL itself is "",
        and its copy is a file.

    Raises:
      ConfigError: there is no such folder, it cannot be read, or an extra is missing.
    """
    bucket, base = Bucket(url, flag), url.rpartition("/")[2]
    infos = bucket.objects()
    names = sorted(choose(infos))
    if not names:
        raise ConfigError(f"{flag}={url}: cannot be read (no such folder)")
    facts = [[url], *([n, *(str(infos[n].get(k)) for k in VERSION)] for n in names)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    copies = cache_folder(None) / "buckets"
    with locked(copies / f".{key}", flag, wait=True):
        if not (copies / key).is_dir():
            with new_folder(copies / key, flag) as folder:
                for name in names:
                    bucket.get(name, folder / base / name)
    return copies / key / base


def readable_path(path: str | Path, field: str, beside: Sequence[str] = ()) -> Path:
    """`user_path`, for what is read only: a file, folder or glob of a bucket is copied first.

    Args:
      path: as a user gave it for `field`.
      beside: names of other files in its folder, which are copied too.

    Raises:
      ConfigError: as `user_path` and `fetch_folder`.
    """
    url = bucket_url(path)
    if url is None:
        return user_path(path, field)
    folder, _, name = url.rpartition("/")
    if beside:
        return fetch_folder(folder, field, {name, *beside}.intersection) / name
    parts = url.split("/")
    first = next((k for k, part in enumerate(parts) if k > 2 and glob.has_magic(part)), len(parts))
    pattern = "/".join(parts[first:])
    # `*` also matches slashes here, so that enough is copied; the glob of the copies is exact.
    wanted = pattern.replace("**/", "*") or "*"
    base = "/".join(parts[:first])
    return fetch_folder(base, field, lambda names: fnmatch.filter(names, wanted)) / pattern


@contextlib.contextmanager
def growing_file(path: str | None, flag: str) -> Iterator[str | None]:
    """The path of a file to append to: itself, or of a bucket's object a local copy, which is
    uploaded at intervals and at the end, whatever ends it.

    Raises:
      ConfigError: the bucket cannot be read or written, or another process of this machine is at
        work on the object.
    """
    url = None if path is None else bucket_url(path)
    if url is None:
        yield path
        return
    folder, _, name = url.rpartition("/")
    bucket, ended = Bucket(folder, flag), threading.Event()
    work = cache_folder(None) / "outputs" / hashlib.sha256(url.encode()).hexdigest()[:16]
    copy = work / name

    def keep_uploading() -> None:
        while not ended.wait(UPLOAD_SECONDS):
            with contextlib.suppress(ConfigError, OSError):  # the last upload reports it
                bucket.write(name, copy.read_bytes())

    with locked(work, flag):
        copy.unlink(missing_ok=True)
        if (content := bucket.read(name)) is not None:
            copy.write_bytes(content)
        thread = threading.Thread(target=keep_uploading, daemon=True)
        thread.start()
        try:
            yield str(copy)
        finally:
            ended.set()
            thread.join()
            if copy.exists():
                bucket.write(name, copy.read_bytes())
                copy.unlink()
