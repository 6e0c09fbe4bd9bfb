"""Progress of a report on stderr: a bar on a terminal, otherwise plain lines."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from pldr_jax.terminal import LiveBar


class ReportProgress(LiveBar):
    """Counts the rows of one measurement after another.

    Args:
      total: measurements in all.
      terminal: whether there is a bar; None asks stderr.
      interval: seconds between plain lines.
      clock: for tests.
    """

    def __init__(
        self,
        total: int,
        terminal: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._number, self._name = total, 0, ""
        self._rows = self._done = 0
        self._interval, self._clock = interval, clock
        self._printed = clock()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} rows"),
                TimeRemainingColumn(),
                console=Console(file=sys.stderr, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task("", total=1)

    def start(self, name: str, rows: int) -> None:
        """The next measurement begins, over so many rows."""
        self._number += 1
        self._name, self._rows, self._done = name, rows, 0
        text = f"[{self._number}/{self._total}] {name}"
        if self._bar is not None:
            self._bar.reset(self._task, total=rows, description=text)
        else:
            self._printed = self._clock()
            self.print(f"{text}: {rows} rows")

    def advance(self, rows: int) -> None:
        """So many more rows are done."""
        self._done += rows
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._clock() - self._printed >= self._interval:
            self._printed = self._clock()
            self.print(f"[{self._number}/{self._total}] {self._name}: {self._done}/{self._rows}")
