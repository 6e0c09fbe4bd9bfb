"""What property-based tests share: how many cases, and what must hold for each.

`PLDR_FUZZ=5000 pytest tests/test_fuzz.py` tries more cases than the suite does.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from pldr_jax.config import ConfigError

CASES = int(os.environ.get("PLDR_FUZZ", "60"))

fuzzed = settings(
    max_examples=CASES,
    derandomize=CASES == 60,  # the suite tries the same cases each time
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""Decorator of a property-based test."""


def result_or_one_line(call: Callable[[], Any]) -> Any:
    """What `call` returns, or its error, which must be for the user: one line of bounded length."""
    try:
        return call()
    except ConfigError as error:
        check_line(str(error))
        return error


def check_line(text: str) -> None:
    assert text and "\n" not in text and len(text) < 2000, text[:3000]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
