"""The report of `benchmarks/gpu.py`: rows that are on disk as soon as they are measured."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

Row = dict[str, Any]


def timed(call: Callable[[], Any], least: int = 10, limit: float = 2.0) -> float:
    """Median seconds of a call that is waited for: of `least` calls, or fewer where those would
    take longer than `limit` seconds, but 3. Two calls before them are not timed.
    """
    for _ in range(2):
        jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < 3 or (len(times) < least and sum(times) < limit):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed_together(call: Callable[[], Any], calls: int = 10) -> float:
    """Seconds a call where `calls` are dispatched and only the last is waited for; the median of
    five times.
    """

    def together() -> None:
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)

    return timed(together, least=5) / calls


def shortened(value: Any) -> Any:
    """A number in four digits."""
    if isinstance(value, float):
        return int(round(value)) if abs(value) >= 1000 else float(f"{value:.4g}")
    return value


class Report:
    """Sections of rows, and the time that is left.

    Attributes:
      sections: name -> rows.
      rates: of the device, in operations and bytes a second; filled by the first section.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.sections = folder, dict[str, list[Row]]()
        self.rates: dict[str, float] = {}
        self.facts: Row = {}
        self._start, self._seconds = time.perf_counter(), 60 * minutes

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self._seconds - (time.perf_counter() - self._start)

    def case(self, section: str, row: Mapping[str, Any], measure: Callable[[], Row]) -> None:
        """Adds to a section the row that `measure` gives, begun with `row`; an error is its text.
        It is skipped where hardly any time is left.
        """
        begun = time.perf_counter()
        if self.left() < 3:
            self.add(section, {**row, "skipped": "no time"})
            return
        try:
            result = measure()
        except Exception as error:  # a case that fails is a row, not the end
            lines = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {lines[0][:300]}"}
        gc.collect()
        self.add(section, {**row, **result, "case_s": round(time.perf_counter() - begun, 1)})

    def add(self, section: str, row: Row) -> None:
        """Adds a row, prints it and writes the files."""
        row = {name: shortened(value) for name, value in row.items()}
        self.sections.setdefault(section, []).append(row)
        words = " ".join(f"{name}={value}" for name, value in row.items())
        print(f"[{self.left():5.0f}s left] {section}: {words}", flush=True)
        self.write()

    def write(self) -> None:
        """Writes gpu.json and gpu.md."""
        whole = {"facts": self.facts, "rates": self.rates, "sections": self.sections}
        self._replace("gpu.json", json.dumps(whole, indent=1) + "\n")
        facts = "\n".join(f"{name}: {value}" for name, value in self.facts.items())
        tables = (f"## {name}\n\n{table(rows)}\n" for name, rows in self.sections.items())
        self._replace("gpu.md", "\n".join((facts, "", *tables)))

    def _replace(self, name: str, text: str) -> None:
        """Writes a file that is never half there, whenever this process is killed."""
        new = self.folder / f".{name}"
        new.write_text(text)
        new.replace(self.folder / name)


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table whose columns are all of theirs."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
