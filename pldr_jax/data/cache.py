"""A cache folder whose entries are folders, each there completely or not at all.

An entry is written under a temporary name and renamed when complete, so a killed run leaves nothing
that would be read, and runs that start together do no harm to each other.
"""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

from pldr_jax.config import ConfigError

_ABANDONED_AFTER = 24 * 3600.0
"""Age in seconds at which a temporary folder is taken for that of a killed run."""


@contextlib.contextmanager
def new_entry(
    entry: pathlib.Path, is_good: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    """A temporary folder to fill, which becomes `entry` when the block ends without an exception.

    is_good tells a complete entry from a damaged one: a good one that another run has put there in
    the meantime stays, a damaged one is replaced. ConfigError if the cache cannot be written to.
    """
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(entry.parent)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=".writing-", dir=entry.parent))
    except OSError as error:
        raise ConfigError(
            f"Data.cache_dir: {str(entry.parent)!r} cannot be written to ({error.strerror}); name "
            "another folder, here or in $PLDR_CACHE"
        ) from None
    try:
        yield temporary
        _publish(temporary, entry, is_good)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(
    temporary: pathlib.Path, entry: pathlib.Path, is_good: Callable[[pathlib.Path], bool]
) -> None:
    for _ in range(10):
        if is_good(entry):
            return
        if entry.exists():  # damaged: moved aside in one step, so that no run sees half of it
            aside = pathlib.Path(tempfile.mkdtemp(prefix=".damaged-", dir=entry.parent))
            with contextlib.suppress(OSError):  # another run was faster
                entry.rename(aside / entry.name)
            shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # an entry has appeared since
            temporary.rename(entry)
            return


def _remove_abandoned(folder: pathlib.Path) -> None:
    for pattern in (".writing-*", ".damaged-*"):
        for temporary in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another run has removed it
                if time.time() - temporary.stat().st_mtime > _ABANDONED_AFTER:
                    shutil.rmtree(temporary, ignore_errors=True)
