"""SIGTERM and SIGINT as a wish to stop at the next step."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from types import FrameType

REPEAT_SECONDS = 1.0
"""A second signal so soon is the first one again: a scheduler tells every process of a job, and a
sweep its run.
"""


@dataclasses.dataclass
class StopRequest:
    """Set by a signal; the loop saves and leaves at the next step."""

    signal_name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request to stop; a later second one acts as
    usual.
    """
    request = StopRequest()
    handled = (signal.SIGTERM, signal.SIGINT)
    first = 0.0

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal first
        if request.signal_name is None:
            request.signal_name, first = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - first >= REPEAT_SECONDS:
            for name, old in previous.items():
                signal.signal(name, old)
            signal.raise_signal(number)

    previous = {name: signal.signal(name, handle) for name in handled}
    try:
        yield request
    finally:
        for name, old in previous.items():
            signal.signal(name, old)
