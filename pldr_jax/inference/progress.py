"""Progress of a batch job on stderr: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from pldr_jax.terminal import LiveBar


class JobProgress(LiveBar):
    """Counts prompts, tokens and failures, and shows them.

    Args:
      total: prompts; None where it is not known.
      finished: prompts that an earlier, stopped job has done.
      enabled: False shows nothing on the way.
      terminal: whether there is a bar; None asks stderr.
      interval: seconds between plain lines.
      clock: for tests.
    """

    def __init__(
        self,
        total: int | None,
        finished: int = 0,
        enabled: bool = True,
        terminal: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prompts = self.tokens = self.failures = 0
        self._total, self._before, self._enabled = total, finished, enabled
        self._interval, self._clock = interval, clock
        self._started = self._printed = clock()
        self._bar: RichProgress | None = None
        if enabled and (sys.stderr.isatty() if terminal is None else terminal):
            self._bar = RichProgress(
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stderr, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task(self._text(), total=total, completed=finished)

    def add_tokens(self, count: int) -> None:
        """Counts new tokens."""
        self.tokens += count
        self._show()

    def finish(self, failed: bool) -> None:
        """Counts a prompt that ended."""
        self.prompts += 1
        self.failures += failed
        self._show()

    def summary(self) -> str:
        """One line on what was done."""
        prompts = f"{self.prompts} prompt{'' if self.prompts == 1 else 's'}"
        failures = f"{self.failures} failure{'' if self.failures == 1 else 's'}"
        return f"{prompts}, {self.tokens} new tokens, {self._speed()} tokens/s, {failures}"

    def _show(self) -> None:
        if self._bar is not None:
            finished = self._before + self.prompts
            self._bar.update(self._task, completed=finished, description=self._text())
        elif self._enabled and self._clock() - self._printed >= self._interval:
            self._printed = self._clock()
            print(self._text(), file=sys.stderr, flush=True)

    def _text(self) -> str:
        total = "" if self._total is None else f"/{self._total}"
        return (
            f"{self._before + self.prompts}{total} prompts  tokens {self.tokens}  "
            f"tokens/s {self._speed()}"
        )

    def _speed(self) -> str:
        seconds = self._clock() - self._started
        return f"{self.tokens / seconds:,.1f}" if seconds > 0 else "-"
