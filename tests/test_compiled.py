"""Compiled programs that are kept: what is damaged is compiled anew."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pldr_jax.runs.compiled import CheckedCache

PROGRAM = """
import sys
import jax
from pldr_jax.runs.compiled import keep_programs
jax.config.update("jax_platforms", "cpu")
keep_programs(sys.argv[1], 0.0)
print(float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((4, 4)))))
"""


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle:])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flip,
    "cut": lambda content: content[:-9],
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_removed(tmp_path: Path, kind: str) -> None:
    cache = CheckedCache(tmp_path / "xla")
    assert cache.get("key") is None
    cache.put("key", b"a program" * 99)
    assert cache.get("key") == b"a program" * 99
    (file,) = (tmp_path / "xla").iterdir()
    file.write_bytes(DAMAGE[kind](file.read_bytes()))
    assert cache.get("key") is None and not file.exists()
    cache.put("key", b"another")
    assert cache.get("key") == b"another"


def test_what_cannot_be_written_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    cache = CheckedCache(tmp_path / "file")
    cache.put("key", b"a program")
    assert cache.get("key") is None


def test_a_program_of_damaged_entries_runs(tmp_path: Path) -> None:
    """XLA would end it by a signal."""

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert run().stdout == "64.0\n"
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert written
    for file, content in written.items():
        file.write_bytes(flip(content))
    again = run()
    assert (again.returncode, again.stdout, again.stderr) == (0, "64.0\n", "")
    for file, content in written.items():
        assert file.read_bytes() != flip(content)
