"""Progress of a preparation on stderr: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from pldr_jax.terminal import LiveBar


class BuildProgress(LiveBar):
    """Counts bytes of input, documents and tokens, and shows them with speed and time left.

    Args:
      total: bytes of input; 0 where not known.
      finished: bytes that earlier, interrupted work has done.
      terminal: whether there is a bar; None asks stderr.
      interval: seconds between plain lines.
      clock: for tests.
    """

    def __init__(
        self,
        total: int,
        finished: int = 0,
        terminal: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n_bytes = self.n_documents = self.n_tokens = 0
        self._total, self._before = total, finished
        self._interval, self._clock = interval, clock
        self._started = self._printed = clock()
        self._bar: RichProgress | None = None
        if sys.stderr.isatty() if terminal is None else terminal:
            self._bar = RichProgress(
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stderr, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task(self.text(), total=total or None, completed=finished)

    def add(self, n_bytes: int, n_documents: int, n_tokens: int) -> None:
        """Counts what one process has just done."""
        self.n_bytes += n_bytes
        self.n_documents += n_documents
        self.n_tokens += n_tokens
        if self._bar is not None:
            done = self._before + self.n_bytes
            self._bar.update(self._task, completed=done, description=self.text())
        elif self._clock() - self._printed >= self._interval:
            self._printed = self._clock()
            print(self.text(), file=sys.stderr, flush=True)

    def text(self) -> str:
        """`12.0 of 40.0 MB  1,000 documents  3,000,000 tokens  1,000,000 tokens/s  0:28 left`."""
        seconds = max(self._clock() - self._started, 1e-9)
        done = self._before + self.n_bytes
        of = f" of {self._total / 1e6:,.1f}" if self._total else ""
        line = f"{done / 1e6:,.1f}{of} MB  {self.n_documents:,} documents  {self.n_tokens:,} tokens"
        line += f"  {self.n_tokens / seconds:,.0f} tokens/s"
        if self._total and self.n_bytes:
            left = max(self._total - done, 0) * seconds / self.n_bytes
            line += f"  {int(left) // 60}:{int(left) % 60:02d} left"
        return line

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._started
