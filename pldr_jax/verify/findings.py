"""What a check has found, and the table of all of them."""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Finding:
    """One figure against its limit.

    Attributes:
      part: of the model or of the package.
      what: that was compared.
      value: how far it is off.
      limit: the most that is right.
    """

    part: str
    what: str
    value: float
    limit: float

    @property
    def right(self) -> bool:
        """NaN is not."""
        return self.value <= self.limit


def difference(actual: Any, expected: Any) -> float:
    """Largest difference, in units of the largest expected magnitude; NaN where the shapes are
    others.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return math.nan
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300))


def table(findings: Sequence[Finding]) -> str:
    """All findings, a line each."""
    grid = Table(box=SIMPLE_HEAD)
    for name in ("part", "what", "off by", "allowed", ""):
        grid.add_column(name, justify="right" if name in ("off by", "allowed") else "left")
    for one in findings:
        verdict = "right" if one.right else "WRONG"
        grid.add_row(one.part, one.what, f"{one.value:.1e}", f"{one.limit:.0e}", verdict)
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(grid, markup=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())
