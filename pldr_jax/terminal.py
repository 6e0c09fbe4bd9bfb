"""What programs show to people: lines that cannot end a program, tables, and the one progress
display."""

import atexit
import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

# Control characters but tab and newline, bidirectional overrides, halves of surrogate pairs.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with characters that steer a terminal spelled out, such as `\x1b`."""
    return _INVISIBLE.sub(lambda match: ascii(match[0])[1:-1], text)


def one_line(text: str) -> str:
    r"""The same on a single line; a newline is spelled out as `\n`."""
    return visible(text).replace("\n", "\\n")


def print_line(text: str, to_stderr: bool = False) -> None:
    """Prints a message. A stream that is closed, broken or full, or whose encoding lacks a
    character, is no reason to end a program: what cannot be printed is dropped or spelled out.
    """
    _write(sys.stderr if to_stderr else sys.stdout, visible(text) + "\n")


def summary_table(rows: Mapping[str, str], title: str = "") -> str:
    """A table of two columns, as text of at most 100 columns."""
    table = Table(title=title or None, box=SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(file=io.StringIO(), width=100, highlight=False)
    console.print(table, markup=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def open_missing_streams() -> None:
    """Opens the null device where a program was started without stdin, stdout or stderr: else the
    next file that is opened would get their numbers, and what libraries print.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream, which may be missing or closed, is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def duration(seconds: float) -> str:
    """`3:10`, or `2:03:10` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclasses.dataclass(frozen=True)
class Display:
    """Where and how often progress is shown.

    Attributes:
      to_stderr: on stderr; else on stdout.
      enabled: False shows nothing, for the processes other than the first.
      terminal: whether there is a bar; None asks the stream.
      interval: seconds between plain lines.
      clock: in seconds; for tests.
    """

    to_stderr: bool = True
    enabled: bool = True
    terminal: bool | None = None
    interval: float = 10.0
    clock: Callable[[], float] = time.monotonic

    @property
    def stream(self) -> TextIO | None:
        """That of this moment: tests and notebooks replace it."""
        return sys.stderr if self.to_stderr else sys.stdout


class LiveBar:
    """A progress bar on a terminal, and elsewhere a plain line every few seconds: `UNIT 3/10` and
    a text. Programs derive from it to count and to word what they do.

    Args:
      unit: what is counted; "" shows no numbers but those of the text.
      total: None where it is not known.
      completed: what was done before.
    """

    _to_stderr = True
    _display: Display | None = None

    def __init__(
        self,
        unit: str = "",
        total: int | None = None,
        completed: int = 0,
        display: Display | None = None,
    ) -> None:
        self._display = display or Display()
        self._unit, self._total, self._completed = unit, total, completed
        self._printed = self._started = self._display.clock()
        self._shown = 0.0
        self._bar: Progress | None = None
        terminal = self._display.terminal
        if not self._display.enabled:
            return
        if is_terminal(self._display.stream) if terminal is None else terminal:
            numbers = "{task.completed}/{task.total}" if total is not None else "{task.completed}"
            self._bar = Progress(
                *([TextColumn(f"{unit} [bold]{numbers}[/]")] if unit else []),
                BarColumn(bar_width=30),
                TextColumn("{task.description}", markup=False),
                # Rich takes the place of sys.stderr meanwhile: the bar keeps the stream of now.
                console=Console(
                    file=cast(TextIO, _Safe(self._display.stream)),
                    force_terminal=True,
                    highlight=False,
                ),
            )
            self._task = self._bar.add_task("", total=total, completed=completed)

    @property
    def seconds(self) -> float:
        """Since the start."""
        assert self._display is not None
        return self._display.clock() - self._started

    def show(self, text: str, completed: int, total: int | None = None, now: bool = False) -> None:
        """Shows how far the work is; cheap enough for every step.

        Args:
          total: a new one, of the next piece of work.
          now: prints the plain line whether it is due or not.
        """
        assert self._display is not None
        self._completed, self._shown = completed, self.seconds
        self._total = self._total if total is None else total
        if not self._display.enabled:
            return
        if self._bar is not None:
            text = visible(text)
            self._bar.update(self._task, completed=completed, total=self._total, description=text)
        elif now or self._display.clock() - self._printed >= self._display.interval:
            self._printed = self._display.clock()
            of = "" if self._total is None else f"/{self._total}"
            numbers = f"{self._unit} {completed}{of}  " if self._unit else ""
            print_line(numbers + text, self._display.to_stderr)

    @contextlib.contextmanager
    def waiting(self, text: str, at_once: bool = False) -> Iterator[None]:
        """Says while the block runs what is waited for and for how long so far: of what shows no
        progress itself, such as a compilation.

        Args:
          at_once: says it at the start too, and not only when the first interval is over.
        """
        if self._display is None or not self._display.enabled:
            yield
            return
        over, begun = threading.Event(), self.seconds
        interval = 1.0 if self._bar is not None else self._display.interval

        def tell() -> None:
            while not over.wait(min(interval, threading.TIMEOUT_MAX)):
                # Else the block shows progress itself.
                if self.seconds - self._shown >= 0.9 * interval:
                    so_far = f"{text}: {self.seconds - begun:.0f} s so far"
                    self.show(so_far, self._completed, now=True)

        if at_once:
            self.show(text, self._completed, now=True)
        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._display is not None and not self._display.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(visible(text), markup=False, soft_wrap=True)
        else:
            print_line(text, self._to_stderr if self._display is None else self._display.to_stderr)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Safe:
    """A stream as a file whose writes never fail."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        _write(self._stream, text)
        return len(text)

    def flush(self) -> None:
        """`write` has."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError) as error:  # ValueError: it was closed
        if getattr(error, "errno", None) == errno.EPIPE:
            _discard(stream)  # nobody reads it any more
        else:
            atexit.register(_flush_or_discard, stream)


def flush_streams() -> None:
    """At the end of a program: what stdout and stderr do not take is dropped."""
    for stream in (sys.stdout, sys.stderr):
        _flush_or_discard(stream)


def _flush_or_discard(stream: TextIO) -> None:
    """At the end, where the interpreter would turn a full disk into an exit status."""
    try:
        stream.flush()
    except (OSError, ValueError):
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Sends a stream, and what it has not written yet, to the null device."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
