"""Paths that users name, files and folders that are there whole or not at all, and locks.

The only place that renames temporary files: what a killed process leaves is never read.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from pldr_jax.bucket import Bucket, bucket_url
from pldr_jax.config import ConfigError, expand_home

LOCK = ".lock"
TOKENIZER = "tokenizer.model"
"""The SentencePiece model in a run folder, a checkpoint or a folder of shards."""
TOKENIZER_CONFIG = "tokenizer_config.json"
"""What transformers knows of a tokenizer; in a run folder and beside shards, its chat template."""

DIGEST = ".sha256"
"""Ends the name of the file that holds another one's SHA-256, as `sha256sum` writes it."""

OUTPUT = "--output"


def user_path(path: str | Path, field: str) -> Path:
    """A path that a user gave for `field`, with `~` for the home folder.

    Raises:
      ConfigError: no file can have this name, there is no home folder for its `~`, or it names a
        bucket, which has no path; see `pldr_jax/copies.py`.
    """
    if bucket_url(path):
        raise ConfigError(f"{field} = {str(path)!r}: has to be a local path; copy it there")
    try:
        return Path(expand_home(str(path)))
    except ValueError as error:
        raise ConfigError(f"{field} = {str(path)!r}: {error}") from None


def cache_folder(cache_dir: str | None) -> Path:
    """`Data.cache_dir`, else $PLDR_CACHE, else pldr_jax in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      ConfigError: nothing names a folder, and there is no home folder.
    """
    if chosen := cache_dir or os.environ.get("PLDR_CACHE"):
        return user_path(chosen, "Data.cache_dir")
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pldr_jax"
    return user_path("~/.cache/pldr_jax", "Data.cache_dir")


def read_regular_file(path: Path) -> bytes:
    """The content of a file; of a pipe or a device, which may never end, nothing is read.

    Raises:
      OSError: it cannot be read, or is no regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file")
    return path.read_bytes()


def with_digest(name: str, content: bytes) -> dict[str, bytes]:
    """A file and its digest, by their names."""
    digest = hashlib.sha256(content).hexdigest()
    return {name: content, name + DIGEST: f"{digest}  {name}\n".encode()}


def is_as_written(path: Path, content: bytes) -> bool:
    """Whether a file's content has the digest beside it; True where there is none.

    Raises:
      OSError: the digest cannot be read.
    """
    beside = path.with_name(path.name + DIGEST)
    if not beside.exists():
        return True
    return read_regular_file(beside) == with_digest(path.name, content)[beside.name]


def file_in(folder: Path, name: object, where: str) -> Path:
    """The file of a plain name in a folder, for names that were read from a file.

    Args:
      where: the file, or the field, that names it; for errors.

    Raises:
      ConfigError: the name leads elsewhere, or the file is a link to elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"{where}: names {name!r}, which is not a plain file name")
    file = folder / name
    if file.is_symlink() and file.resolve().parent != folder.resolve():
        raise ConfigError(f"{where}: {file} is a link to elsewhere; put the file itself there")
    return file


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` if nothing is raised, and else vanishes.

    It keeps the suffix of `path`, which some writers take for the format, and no two processes
    share one.

    Raises:
      OSError: the file cannot be written; it names `path`.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a write to an open file knows no name
            error.filename, error.filename2 = str(target), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file all at once or not at all.

    Raises:
      OSError: the file cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def append_whole(file: BinaryIO, content: bytes) -> None:
    """Appends to a file that was opened without a buffer, all of `content` or nothing.

    Raises:
      OSError: it cannot be written.
    """
    size, written = os.fstat(file.fileno()).st_size, 0
    try:
        while written < len(content):
            written += file.write(content[written:])
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(size)
        error.filename = file.name
        raise


def check_output(output: str | Path, flag: str = OUTPUT, replaces: str | None = None) -> None:
    """Refuses an output that is there already; a folder that holds the file `replaces` may be.

    Raises:
      ConfigError: names the `flag`.
    """
    folder = Path(output)
    if url := bucket_url(output):
        names = Bucket(url, flag).objects()
        if names and replaces not in names:
            raise ConfigError(f"{flag}={url}: is there already; name another one")
        return
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
      output: a local path, or a folder of a bucket, whose objects appear when all are written.
      replaces: a folder that holds a file of this name gives way to the new one; None refuses
        every folder that is not empty.

    Raises:
      ConfigError: `output` is there already, or cannot be written.
    """
    check_output(output, flag, replaces)
    if url := bucket_url(output):
        with tempfile.TemporaryDirectory(prefix="pldr_jax-") as local:
            yield Path(local)
            _upload(Path(local), Bucket(url, flag), replaces)
        return
    # A relative name without a parent, "." and links have one only when resolved.
    folder = Path(output).resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{flag}={output}: cannot be written to ({error.strerror}); name another folder"
        ) from None


def _upload(folder: Path, bucket: Bucket, last: str | None) -> None:
    """All files, that of the name `last` at the end; what else the bucket's folder held goes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    former = set(bucket.objects())
    bucket.remove(name for name in former if name == last)
    for name in sorted(names, key=lambda name: (name == last, name)):
        bucket.put(names[name], name)
    bucket.remove(former - set(names))


def move_into_place(new: Path, folder: Path) -> None:
    """Renames the folder `new` to `folder`, on the same disk. A folder with files in it, which
    cannot be renamed over, is moved away first, and moved back if that fails.
    """
    if not (folder.is_dir() and any(folder.iterdir())):
        os.replace(new, folder)
        return
    former = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    os.replace(folder, former)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(former, folder)
        raise
    shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def locked(
    folder: Path, flag: str = "--run_dir", enabled: bool = True, wait: bool = False
) -> Iterator[None]:
    """Holds a folder until the end, or the death, of this process.

    The kernel knows whether a process holds the lock file; one that a killed process left is free.

    Args:
      folder: made if it is not there, and removed again if nothing was put into it.
      flag: that names the folder, for errors.
      enabled: False does nothing, for the processes other than the first.
      wait: waits for a process that holds it, instead of an error.

    Raises:
      ConfigError: another process holds it, or it cannot be written to.
    """
    if not enabled:
        yield
        return
    try:
        file = _locked_file(folder, flag, wait)
    except OSError as error:
        raise ConfigError(
            f"{flag}={folder}: cannot be written to ({error.strerror}); name another folder"
        ) from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
            folder.rmdir()  # only where it is empty
        file.close()


def _locked_file(folder: Path, flag: str, wait: bool) -> TextIO:
    """The lock file, held."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / LOCK).open("a+")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"{flag}={folder}: is in use by process {holder}; wait for its end, or name "
                "another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
        # The run that held it may have removed the file that was opened here.
        with contextlib.suppress(FileNotFoundError):
            if not os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                raise FileNotFoundError
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            return file
        file.close()


def hold(file: IO[Any]) -> bool:
    """Holds an open file until it is closed; False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
            raise
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def one_line(error: Exception) -> str:
    """The first line of what an error says, not too long."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."
