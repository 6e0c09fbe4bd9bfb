"""SIGTERM and SIGINT as a wish to stop at the next step."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType


@dataclasses.dataclass
class StopRequest:
    """Set by a signal; the loop saves and leaves at the next step."""

    signal_name: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request to stop; a second one acts as usual."""
    request = StopRequest()
    handled = (signal.SIGTERM, signal.SIGINT)

    def handle(number: int, _: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for name, old in previous.items():
            signal.signal(name, old)

    previous = {name: signal.signal(name, handle) for name in handled}
    try:
        yield request
    finally:
        for name, old in previous.items():
            signal.signal(name, old)
