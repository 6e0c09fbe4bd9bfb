"""Progress of a run, and of a sweep: a bar on a terminal, otherwise a plain line now and then."""

import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from pldr_jax.terminal import LiveBar

_WINDOW = 20
"""Updates over which the speed is measured, so that the compilation drops out of it."""


class Progress(LiveBar):
    """Shows how far a run is and how long it will take.

    Args:
      total_steps: steps of the whole run.
      start_step: steps that were done before.
      tokens_per_step: over all devices.
      enabled: False shows nothing, for the processes other than the first.
      interval: seconds between plain lines.
      terminal: whether there is a bar; None asks stdout.
      clock: for tests.
    """

    _to_stderr = False

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        tokens_per_step: int,
        enabled: bool = True,
        interval: float = 10.0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._tokens = total_steps, tokens_per_step
        self._enabled, self._interval, self._clock = enabled, interval, clock
        self._started = self._printed = clock()
        self._times = deque([(start_step, self._started)], maxlen=_WINDOW)
        self._bar: RichProgress | None = None
        terminal = sys.stdout.isatty() if terminal is None else terminal
        if enabled and terminal:
            self._bar = RichProgress(
                TextColumn("step [bold]{task.completed:.0f}[/]/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(file=sys.stdout, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(self, step: int, loss: float, learning_rate: float) -> None:
        """Shows the state after `step` steps; cheap enough for every step."""
        now = self._clock()
        self._times.append((step, now))
        if not self._enabled:
            return
        if self._bar is not None:
            text = f"{self._text(loss, learning_rate)}  elapsed {duration(now - self._started)}"
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._printed >= self._interval or step >= self._total:
            self._printed = now
            text = self._text(loss, learning_rate)
            print(f"step {step}/{self._total}  {text}", flush=True)

    def print(self, text: str) -> None:
        """Prints `text`, above the bar where there is one."""
        if self._enabled:
            super().print(text)

    def _text(self, loss: float, learning_rate: float) -> str:
        (first_step, first), (step, now) = self._times[0], self._times[-1]
        speed = (step - first_step) / (now - first) if now > first and step > first_step else None
        tokens = "-" if speed is None else f"{speed * self._tokens:,.0f}"
        left = "-" if speed is None else duration(max(self._total - step, 0) / speed)
        return f"loss {loss:.3f}  lr {learning_rate:.1e}  tokens/s {tokens}  left {left}"


def duration(seconds: float) -> str:
    """`3:10`, or `2:03:10` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SweepProgress(LiveBar):
    """Shows how far a sweep is, and the newest step of the run at work.

    Args:
      total: runs.
      terminal: whether there is a bar; None asks stdout.
    """

    _to_stderr = False

    def __init__(self, total: int, terminal: bool | None = None) -> None:
        self._total, self._prefix = total, ""
        self._bar: RichProgress | None = None
        if sys.stdout.isatty() if terminal is None else terminal:
            self._bar = RichProgress(
                TextColumn("run [bold]{task.completed:.0f}[/]/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=Console(file=sys.stdout, force_terminal=True, highlight=False),
            )
            self._task = self._bar.add_task("", total=total)

    def start(self, number: int, name: str, text: str) -> None:
        """Run `number`, from 0, begins."""
        self._prefix = f"[{number + 1}/{self._total}] {name}"
        self.print(f"{self._prefix}: {text}")

    def show(self, line: str) -> None:
        """A line that the run at work has printed; those of steps are shown."""
        if not line.startswith("step ") or ":" in line.split("  ")[0]:
            return
        if self._bar is not None:
            self._bar.update(self._task, description=line)
        else:
            print(f"{self._prefix}: {line}", flush=True)

    def finish(self, number: int, name: str, text: str) -> None:
        """Run `number` is over."""
        self.print(f"[{number + 1}/{self._total}] {name}: {text}")
        if self._bar is not None:
            self._bar.update(self._task, completed=number + 1, description="")
