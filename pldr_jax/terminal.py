"""A live progress bar, where there is a terminal for one, and plain lines where there is none."""

import sys
from typing import Self

from rich.progress import Progress


class LiveBar:
    """What every progress display shares. A subclass sets `_bar`, and `_to_stderr` if its plain
    lines go there.
    """

    _bar: Progress | None
    _to_stderr = True

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr if self._to_stderr else sys.stdout, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
