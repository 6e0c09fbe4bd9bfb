"""Programs as a shell starts them: streams that are closed, full or narrow, odd environments."""

import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY, run_here

from pldr_jax.cli.common import run

FREEZE = "-m pldr_jax.freeze --checkpoint=/nonexistent --output=/nonexistent/x"
SWEEP = "train.py --sweep=Training.sample_prompt=é,b --sweep_list --run_dir=/nonexistent/é"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("command", "status", "out", "err"),
    [
        (f"{SWEEP} >&- <&-", 0, "", ""),
        (f"{SWEEP} 2>&- | cat", 0, "unfinished", ""),
        (f"{SWEEP} > /dev/full", 0, "", ""),
        ("infer.py --checkpoint=/nonexistent --prompt=x --output=/dev/null >&- 2>&-", 2, "", ""),
        (f"{FREEZE} <&- >&-", 2, "", "no such folder"),
        ("train.py --help | head -1", 0, "usage: train.py", ""),
    ],
)  # fmt: skip
def test_a_closed_or_full_stream_ends_no_program(
    command: str, status: int, out: str, err: str
) -> None:
    result = shell(f"{sys.executable} {command}")
    assert (result.returncode, "Traceback" in result.stderr) == (status, False), result.stderr
    assert out in result.stdout and err in result.stderr
    assert result.stderr.count("\n") == bool(err)


def test_a_narrow_stdout_and_64_bit_arrays_end_no_program() -> None:
    result = shell(f"{sys.executable} {SWEEP}", PYTHONIOENCODING="ascii", JAX_ENABLE_X64="1")
    assert result.returncode == 0 and "sample_prompt=\\xe9" in result.stdout, result.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.gin"), 1, "x.gin: No such file"),
        (OSError(24, "Too many open files"), 1, "Too many open files"),
        (MemoryError(), 1, "too little memory"),
        (
            RuntimeError("Unable to initialize backend 'x': no\nmore"),
            1,
            "JAX_PLATFORMS=cpu: ",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n" * 50), 1, "has too little memory"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_the_machine_lacks_is_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def program(argv: list[str]) -> None:
        raise error

    code, _, shown = run_here(capsys, program)
    assert code == status and line in shown and shown.count("\n") == bool(line)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    def program(argv: list[str]) -> None:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        run(program, [])
