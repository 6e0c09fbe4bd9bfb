"""What one measurement gives: words, tables and pictures for a reader, numbers and tensors for a
program. `report.py` knows nothing else of the measurements.
"""

import dataclasses
from typing import Any

import numpy as np

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
      title: a short line above it.
      columns: headings.
      rows: one cell a column; None is an empty cell.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG.

    Attributes:
      name: of its file, without the ending; unique in a report.
      caption: one or two sentences on what it shows.
      png: the bytes of the file.
    """

    name: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """A measurement.

    Attributes:
      name: its key in `report.json`.
      title: its heading.
      words: paragraphs, the verdict first; plain text.
      tables, pictures: in the order in which they are shown.
      numbers: for `report.json`: dicts, lists, strings, and finite or non-finite numbers.
      tensors: for the NPZ file, by name.
    """

    name: str
    title: str
    words: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
