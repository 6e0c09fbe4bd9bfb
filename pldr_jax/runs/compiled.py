"""XLA's compiled programs, kept on disk for the next start, with checksums: a damaged one would end
the process.
"""

import contextlib
import hashlib
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from pldr_jax.files import write_whole

_FILE_CACHE = compilation_cache.get_file_cache  # where it is elsewhere, this fails at once


class CheckedCache(CacheInterface):
    """Programs as files of a folder, each behind the SHA-256 of its content.

    A damaged file is removed, and the program compiled anew. What cannot be written is not kept.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder)

    def get(self, key: str) -> bytes | None:
        """The program of a key; None where there is none that is whole."""
        file = self._path / f"{key}-program"
        try:
            content = file.read_bytes()
        except OSError:
            return None
        digest, program = content[:32], content[32:]
        if hashlib.sha256(program).digest() == digest:
            return program
        with contextlib.suppress(OSError):
            file.unlink()
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps the program of a key."""
        with contextlib.suppress(OSError):
            self._path.mkdir(parents=True, exist_ok=True)
            write_whole(self._path / f"{key}-program", hashlib.sha256(value).digest() + value)


def keep_programs(folder: str | Path, seconds: float = 0.5) -> None:
    """Keeps programs that took at least so many seconds to compile in a folder."""
    compilation_cache.get_file_cache = lambda path: (CheckedCache(path), path)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
