"""The programs as a shell starts them: console scripts, `train.py`, `python -m`.

Notebooks and tests call `pldr_jax.cli.train.main` and its like, which leave their process as it is.
"""

import importlib
import io
import os
import sys

from pldr_jax.cli.huge_pages import use_huge_pages
from pldr_jax.terminal import flush_streams, open_missing_streams


def start(name: str) -> None:
    """Makes this process fit for a program, which may start it anew, then runs the program.

    Args:
      name: of its file in `pldr_jax/cli/`.
    """
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character it lacks ends nothing
            stream.reconfigure(errors="backslashreplace")
    # Every dtype is named, and arrays of 64 bits would be other ones.
    os.environ.pop("JAX_ENABLE_X64", None)
    use_huge_pages()
    try:
        importlib.import_module(f"pldr_jax.cli.{name}").main()
    finally:
        flush_streams()


def train() -> None:
    """`pldr-train`, `train.py`."""
    start("train")


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
