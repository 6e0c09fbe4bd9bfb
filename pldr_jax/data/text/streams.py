"""The bytes of text files as UTF-8, whatever they are compressed with."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from pldr_jax.data.text.inputs import WIDE_MARKS, compression, needs

FORMAT_ERRORS = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What the standard library raises of a compressed file that is cut or broken."""

_LARGEST_WINDOW = 1 << 31
"""What `zstd --long=31` needs to be read, which the package refuses unless asked to."""


@contextlib.contextmanager
def open_utf8(path: str) -> Iterator[BinaryIO]:
    """The bytes of a text file, decompressed; UTF-16 and UTF-32 with a byte-order mark become
    UTF-8.
    """
    ending = compression(path)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(openers.get(ending, open)(path, "rb"))
        if ending == ".zst":
            reader = _Zstd(file, needs("zstandard", path))
            file = stack.enter_context(io.BufferedReader(reader, 1 << 20))
        start = file.peek(4)[:4]
        if start.startswith(WIDE_MARKS):
            is_long = start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
            wide = io.TextIOWrapper(file, "utf-32" if is_long else "utf-16", newline="")
            file = stack.enter_context(io.BufferedReader(_Utf8(wide), 1 << 20))
        yield file


class _Utf8(io.RawIOBase):
    """The UTF-8 bytes of a text stream."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._ready = text, b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; UnicodeDecodeError where the text is not what its mark says."""
        self._ready = self._ready or self._text.read(1 << 16).encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a file; the package's own reader ends a cut file as if
    it were whole.
    """

    def __init__(self, packed: BinaryIO, zstandard: Any) -> None:
        self._packed = packed
        self._new = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj
        self._frame: Any = None
        self._ready = self._left = b""

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; EOFError if the file ends within a frame."""
        while not self._ready:
            content = self._left or self._packed.read(1 << 17)
            if not content:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new()
            self._ready, self._left = self._frame.decompress(content), b""
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
