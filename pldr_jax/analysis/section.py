"""What every section of a report is: a measurement that can say, tabulate and draw itself."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np

from pldr_jax.api import LanguageModel

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
    """A figure as PNG.

    Attributes:
      name: of its file, without the ending; unique in a report.
      caption: one or two sentences on what it shows.
      png: the bytes of the file.
    """

    name: str
    caption: str
    png: bytes


@dataclasses.dataclass(frozen=True)
class RenderedSection:
    """A section as the report files hold it: `Section` with its words, tables and figures made."""

    key: str
    title: str
    words: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Picture, ...] = ()
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section(abc.ABC):
    """A finished measurement.

    Attributes:
      key: names it in `report.json` and `--sections`.
      title: its heading.
      numbers: for `report.json`: dicts, lists, strings, and finite or non-finite numbers.
      tensors: for the NPZ file, by name.
    """

    key: ClassVar[str]
    title: ClassVar[str]
    numbers: dict[str, Any]
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @abc.abstractmethod
    def words(self) -> tuple[str, ...]:
        """Paragraphs of plain text, the verdict first."""

    def tables(self) -> tuple[Table, ...]:
        """In the order in which they are shown."""
        return ()

    def figures(self) -> tuple[Picture, ...]:
        """In the order in which they are shown."""
        return ()

    def rendered(self) -> RenderedSection:
        """Everything made that a report shows."""
        return RenderedSection(
            self.key,
            self.title,
            self.words(),
            self.tables(),
            self.figures(),
            self.numbers,
            self.tensors,
        )


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a report asks of all its sections.

    Attributes:
      batch_size: rows of one forward pass; no result depends on it beyond rounding.
      float64: also compute the deductive outputs in float64.
      other_g: G_LM to try in place of the model's, by name: tensors [L,N,H,J], or models.
      advance: called with the number of rows that are done.
    """

    batch_size: int = 8
    float64: bool = False
    other_g: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    advance: Callable[[int], None] = lambda rows: None


DEFAULTS = Settings()


class ModelSection(Section):
    """A section about one model, which `pldr-analyze` can measure."""

    @classmethod
    @abc.abstractmethod
    def measure(
        cls, model: LanguageModel, rows_RC: np.ndarray, settings: Settings = DEFAULTS
    ) -> Self:
        """Measures a model on held-out rows, int32, without padding.

        Raises:
          ConfigError: one line, for rows that the model or the measurement cannot take.
        """
