"""The programs as a shell starts them: console scripts, `train.py`, `python -m`.

Notebooks and tests call `pldr_jax.cli.infer.main` and its like, which leave their process as it is.
"""

import importlib
import io
import multiprocessing
import os
import sys
import traceback
from typing import Any, NoReturn

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.terminal import flush_streams, open_missing_streams


def start(name: str) -> None:
    """Makes this process fit for a program, which may start it anew, then runs the program.

    Args:
      name: of its module in `pldr_jax.cli`.
    """
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character it lacks ends nothing
            stream.reconfigure(errors="backslashreplace")
    # Every dtype is named, and arrays of 64 bits would be other ones.
    os.environ.pop("JAX_ENABLE_X64", None)
    use_huge_pages()
    sys.unraisablehook = _unraisable
    try:
        importlib.import_module(f"pldr_jax.cli.{name}").main()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            _leave(end.code)
        raise
    except Exception:
        traceback.print_exc()
        _leave(1)
    finally:
        flush_streams()


def _unraisable(error: Any) -> None:
    """Says nothing of what is left of a failed save, which is reported by another way."""
    if not (isinstance(error.exc_value, RuntimeError) and "loop is closed" in str(error.exc_value)):
        sys.__unraisablehook__(error)


def _leave(status: int) -> NoReturn:
    """Ends the process at once: after an error, threads and other processes of the run may wait
    for minutes for what will not come.
    """
    flush_streams()
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(status)


def train() -> None:
    """`pldr-train`, `train.py`."""
    start("training.train")


def infer() -> None:
    """`pldr-infer`, `infer.py`."""
    start("infer")


def freeze() -> None:
    """`pldr-freeze`."""
    start("freeze")


def convert() -> None:
    """`pldr-convert`."""
    start("convert")


def data() -> None:
    """`pldr-data`."""
    start("data")


def evaluate() -> None:
    """`pldr-eval`."""
    start("evaluate")


def analyze() -> None:
    """`pldr-analyze`."""
    start("analyze")


def serve() -> None:
    """`pldr-serve`."""
    start("serve")


def verify() -> None:
    """`pldr-verify`."""
    start("verify")
