"""Progress of a run, and of a sweep, on stdout."""

import dataclasses
from collections import deque

from pldr_jax.terminal import Display, LiveBar, duration

_WINDOW = 20
"""Updates over which the speed is measured, so that the compilation drops out of it."""
_STDOUT = Display(to_stderr=False)


class Progress(LiveBar):
    """Shows how far a run is and how long it will take.

    Args:
      total_steps: steps of the whole run.
      start_step: steps that were done before.
      tokens_per_step: over all devices.
      display: where it is shown; stdout in any case.
    """

    def __init__(
        self, total_steps: int, start_step: int, tokens_per_step: int, display: Display = _STDOUT
    ) -> None:
        display = dataclasses.replace(display, to_stderr=False)
        super().__init__("step", total_steps, start_step, display)
        self._steps, self._tokens = total_steps, tokens_per_step
        self._times = deque([(start_step, 0.0)], maxlen=_WINDOW)

    def update(self, step: int, loss: float, learning_rate: float) -> None:
        """Shows the state after `step` steps."""
        self._times.append((step, self.seconds))
        (first_step, first), (_, now) = self._times[0], self._times[-1]
        speed = (step - first_step) / (now - first) if now > first and step > first_step else None
        tokens = "-" if speed is None else f"{speed * self._tokens:,.0f}"
        left = "-" if speed is None else duration(max(self._steps - step, 0) / speed)
        text = f"loss {loss:.3f}  lr {learning_rate:.1e}  tokens/s {tokens}  left {left}"
        if self._bar is not None:
            text += f"  elapsed {duration(now)}"
        self.show(text, step, now=step >= self._steps)


class SweepProgress(LiveBar):
    """Shows how far a sweep is, and the newest step of the run at work.

    Args:
      total: runs.
      display: where it is shown; stdout in any case.
    """

    def __init__(self, total: int, display: Display = _STDOUT) -> None:
        super().__init__("run", total, 0, dataclasses.replace(display, to_stderr=False))
        self._runs, self._at_work = total, ""

    def start(self, number: int, name: str, text: str) -> None:
        """Run `number`, from 0, begins."""
        self._at_work = f"[{number + 1}/{self._runs}] {name}"
        self.print(f"{self._at_work}: {text}")

    def echo(self, line: str) -> None:
        """A line that the run at work has printed; those of steps are shown."""
        if not line.startswith("step ") or ":" in line.split("  ")[0]:
            return
        if self._bar is not None:
            self.show(line, self._completed)
        else:
            self.print(f"{self._at_work}: {line}")

    def finish(self, number: int, name: str, text: str) -> None:
        """Run `number` is over."""
        self.print(f"[{number + 1}/{self._runs}] {name}: {text}")
        if self._bar is not None:
            self.show("", number + 1)
