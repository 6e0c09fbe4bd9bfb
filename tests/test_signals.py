"""Signals: the first asks to stop, a repeated one is the same, a later one acts as usual."""

import signal

import pytest

from pldr_jax.training import signals


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_repeated_signal_is_one_request_and_a_later_one_acts_as_usual(
    monkeypatch: pytest.MonkeyPatch, second: signal.Signals
) -> None:
    reached: list[int] = []
    before = {name: signal.signal(name, lambda number, _: reached.append(number))
              for name in (signal.SIGTERM, signal.SIGINT)}  # fmt: skip
    try:
        with signals.stop_on_signals() as stop:
            assert stop.signal_name is None
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(second)
            assert stop.signal_name == "SIGTERM" and not reached
            monkeypatch.setattr(signals, "REPEAT_SECONDS", 0.0)
            signal.raise_signal(second)
            assert reached == [second]
        signal.raise_signal(second)
        assert reached == [second, second]
    finally:
        for name, old in before.items():
            signal.signal(name, old)
