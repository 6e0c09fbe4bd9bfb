"""What programs show: no stream, however broken, ends a program, and nothing steers a terminal."""

import io
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from pldr_jax.terminal import Display, LiveBar, print_line, visible

LINES = """
import sys
from pldr_jax.terminal import Display, LiveBar, open_missing_streams, print_line
open_missing_streams()
with open({file!r}, "w") as file:
    for k in range(3000):
        print_line(f"line {{k}} of a long run", to_stderr=k % 2 == 0)
    with LiveBar("step", 10, display=Display(terminal={terminal})) as bar:
        bar.show("a text", 5)
        bar.print("a line")
    file.write("done")
"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "shell",
    [
        "{} >&-",
        "{} 2>&-",
        "{} <&- >&- 2>&-",
        "{} >/dev/full",
        "{} >/dev/full 2>/dev/full",
        "{} 2>&1 | head -n 1",
        "{} 2>&1 | true",
    ],
)
def test_a_broken_stream_ends_nothing(tmp_path: Any, shell: str, terminal: bool) -> None:
    done = tmp_path / "done"
    script = tmp_path / "lines.py"
    script.write_text(LINES.format(file=str(done), terminal=terminal))
    command = shell.format(f"{sys.executable} {script}")
    end = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120
    )
    assert end.returncode == 0, end
    assert done.read_text() == "done"  # and nothing else: no stream took the number of the file
    assert "Traceback" not in end.stdout + end.stderr


def test_an_encoding_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    print_line("naïve → \udcff")
    assert raw.getvalue() == b"na\\xefve \\u2192 \\udcff\n"


@pytest.mark.parametrize(
    "text,shown",
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\rb\x9b2J", r"a\rb\x9b2J"),
        ("user\u202egnp.exe", r"user\u202egnp.exe"),
        ("two\nlines and é → \U0001f600", "two\nlines and é → \U0001f600"),
    ],
)
def test_what_steers_a_terminal_is_spelled_out(
    text: str, shown: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert visible(text) == shown
    print_line(text)
    print_line(text, to_stderr=True)
    assert capsys.readouterr() == (shown + "\n", shown + "\n")
    monkeypatch.setenv("COLUMNS", "200")
    with LiveBar("step", 10, display=Display(terminal=True)) as bar:
        bar.print(text)
        bar.show(text, 1)
    screen = capsys.readouterr().err
    assert shown in screen and "\x1b[31mred" not in screen and "\x07" not in screen


def test_plain_lines_come_at_intervals(capsys: Any) -> None:
    now = [0.0]
    display = Display(terminal=False, clock=lambda: now[0])
    with LiveBar("row", 40, 10, display) as bar:
        for k in range(11, 41):
            now[0] += 1.0
            bar.show("a text", k, now=k == 40)
    shown = ["row 20/40  a text", "row 30/40  a text", "row 40/40  a text"]
    assert capsys.readouterr().err.splitlines() == shown
    with LiveBar(display=display) as bar:
        now[0] += 20.0
        bar.show("a text alone", 1)
    assert capsys.readouterr().err == "a text alone\n"


def test_what_shows_no_progress_is_known_to_go_on(capsys: Any) -> None:
    """In a log and on a terminal; nothing more is said where the block shows progress itself."""
    threads = threading.active_count()
    with LiveBar("step", 9, 3, Display(terminal=False, interval=0.05)) as bar:
        with bar.waiting("compiling the step", at_once=True):
            time.sleep(0.3)
        bar.show("loss 1", 4, now=True)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "step 3/9  compiling the step"
        assert len(lines) >= 3 and lines[-1] == "step 4/9  loss 1"
        assert all(
            re.fullmatch(r"step 3/9  compiling the step: \d+ s so far", x) for x in lines[1:-1]
        )
        with bar.waiting("nothing that takes long"):
            pass
        with pytest.raises(ValueError), bar.waiting("what fails"):
            raise ValueError
        assert capsys.readouterr().err == "" and threading.active_count() == threads
        with bar.waiting("computing"):
            for k in range(40):
                bar.show("moving", k)
                time.sleep(0.005)
        assert "computing" not in capsys.readouterr().err
    with LiveBar(display=Display(enabled=False)) as bar, bar.waiting("a", at_once=True):
        assert threading.active_count() == threads
