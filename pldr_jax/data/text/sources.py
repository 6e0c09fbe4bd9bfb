"""Where text comes from: the files behind `Data.source`, cut into named documents.

Names are relative to the source, with forward slashes, so that the same text in another place has
the same names; the train/validation split depends on nothing else.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

from pldr_jax.config import ConfigError

LARGE_FILE = 256 * 1024
"""Bytes above which a file is cut into blocks, each a document of its own."""
BLOCK = 64 * 1024
"""Bytes in such a block, up to the next newline."""

_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of the source: its name relative to the source, and where it is."""

    name: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Document:
    """One text; `repaired` if bytes that are not UTF-8 were replaced by U+FFFD."""

    name: str
    text: str
    repaired: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of a source, their total size in bytes and a digest of their names and contents."""

    files: tuple[SourceFile, ...]
    n_bytes: int
    digest: str


def open_source(source: str) -> Source:
    """Finds and reads once the text files of `Data.source`; ConfigError if there are none.

    source: 'stdlib', a folder (searched recursively), a file, or a glob ('**' is recursive). Hidden
    files of a folder and files with a NUL among their first bytes (not text) are left out.
    """
    found = _stdlib_files() if source == "stdlib" else _user_files(source)
    files, n_bytes, digest = [], 0, hashlib.sha256()
    for file in sorted(found, key=lambda file: file.name):
        content = _read(file, source)
        if b"\0" in content[:8192]:
            continue
        files.append(file)
        n_bytes += len(content)
        name = file.name.encode("utf-8", "surrogateescape")
        digest.update(hashlib.sha256(name).digest() + hashlib.sha256(content).digest())
    if not files:
        raise ConfigError(
            f"Data.source = {source!r}: no text files found; name a folder, file or glob"
        )
    return Source(tuple(files), n_bytes, digest.hexdigest())


def documents(source: Source) -> Iterator[Document]:
    """The documents of a source in the order of its files, empty ones included.

    A large file, or the only one, is cut at newlines into documents `name#0`, `name#1`, ..., so
    that a part of it can be held out.
    """
    for file in source.files:
        content = _read(file, file.name)
        if len(source.files) == 1:
            blocks = _blocks(content, min(max(256, len(content) // 64), BLOCK))
        elif len(content) > LARGE_FILE:
            blocks = _blocks(content, BLOCK)
        else:
            blocks = [content]
        for k, block in enumerate(blocks):
            name = file.name if len(blocks) == 1 else f"{file.name}#{k}"
            try:
                yield Document(name, block.decode("utf-8"))
            except UnicodeDecodeError:
                yield Document(name, block.decode("utf-8", "replace"), repaired=True)


def held_out(names: Sequence[str], fraction: float) -> frozenset[str]:
    """The names on the validation side: those whose hash, as a number below 1, is below `fraction`.

    A document therefore stays on its side while others come and go. With few documents one is moved
    where needed so that neither side is empty; `names` holds at least two different ones.
    """
    by_hash = sorted((_unit_hash(name), name) for name in set(names))
    n_held_out = sum(value < fraction for value, _ in by_hash)
    n_held_out = min(max(n_held_out, 1), len(by_hash) - 1)
    return frozenset(name for _, name in by_hash[:n_held_out])


def _unit_hash(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _read(file: SourceFile, source: str) -> bytes:
    try:
        return file.path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"Data.source = {source!r}: {str(file.path)!r} cannot be read ({reason})"
        ) from None


def _walk(root: pathlib.Path, left_out: set[str], suffix: str = "") -> list[SourceFile]:
    """Regular files under `root`, without hidden ones and folders named in `left_out`."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and name[0] != "."]
        for name in names:
            path = pathlib.Path(folder, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                files.append(SourceFile(path.relative_to(root).as_posix(), path))
    return files


def _stdlib_files() -> list[SourceFile]:
    """Python sources of the running interpreter's standard library (the base one's in a venv)."""
    return _walk(pathlib.Path(sysconfig.get_path("stdlib")), _STDLIB_LEFT_OUT, ".py")


def _user_files(source: str) -> list[SourceFile]:
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return _walk(path, {"__pycache__"})
    if path.is_file():
        return [SourceFile(path.name, path)]
    plain = []  # the leading parts of the glob that hold no wildcard
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    root = pathlib.Path(*plain)
    matches = (pathlib.Path(match) for match in glob.glob(str(path), recursive=True))
    return [SourceFile(p.relative_to(root).as_posix(), p) for p in matches if p.is_file()]


def _blocks(content: bytes, size: int) -> list[bytes]:
    """Cuts `content` after the first newline at or beyond every `size` bytes.

    Where the next newline is more than `size` bytes further, the cut is between two characters.
    """
    blocks, start = [], 0
    while start < len(content):
        end = start + size
        newline = content.find(b"\n", end - 1, end + size)
        if newline >= 0:
            end = newline + 1
        else:
            while end < len(content) and content[end] & 0xC0 == 0x80:
                end += 1
        blocks.append(content[start:end])
        start = end
    return blocks
