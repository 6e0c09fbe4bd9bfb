"""Small files that people write: read whole, and only if they can be what they should be."""

import os
import stat

from pldr_jax.config.fields import ConfigError

LARGEST = 2**24
"""Bytes of a text that a person writes, at most."""


def read_small_file(path: str | os.PathLike[str], where: str = "", largest: int = LARGEST) -> bytes:
    """The bytes of a regular file. A device, a pipe or a huge file is never waited for.

    Args:
      where: begins the message, for example with the place that names the file.
      largest: bytes that it may have.

    Raises:
      ConfigError: one line; nothing of the file's contents is in it.
    """
    name = os.fspath(path)
    shown = name.replace("\n", "\\n")
    try:
        kind = os.stat(name)
        if stat.S_ISDIR(kind.st_mode):
            raise ConfigError(f"{where}{shown}: cannot be read: it is a folder")
        if not stat.S_ISREG(kind.st_mode):
            raise ConfigError(f"{where}{shown}: cannot be read: it is no regular file")
        if kind.st_size > largest:
            raise ConfigError(
                f"{where}{shown}: is too large, {kind.st_size:,} bytes; the limit is {largest:,}"
            )
        with open(name, "rb") as file:
            return file.read(largest + 1)
    except FileNotFoundError:
        message = f"{where}no such file {shown}" if where else f"{shown}: no such file"
        raise ConfigError(message) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise ConfigError(f"{where}{shown}: cannot be read: {reason}") from None
