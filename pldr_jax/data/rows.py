"""Tokens to rows: the three packings, each a random-access array of rows.

The row is part of the model, because Q^T Q sums over it. With C = context_length and T = C - 1:

    concat    [C]     C tokens of the text, documents joined by end pieces and cut: row k holds
                      tokens k*C .. k*C + C, of which C - 1 are inputs and C - 1 are targets
    document  [3,T]   a document, or T inputs of one, then padding
    packed    [3,T]   up to `max_segments` of those side by side, then padding

The three planes of the last two are inputs, targets, and segment numbers: 1, 2, ... and 0 for
padding. In them every token of a document but the last is an input once, and every one but the
first a target once: where a long document is cut, its next piece begins with the last target.

Of conversations only the tokens of the answer are targets, and one that is longer than C tokens is
not cut in pieces: its first C tokens stay, and where the answer begins behind them, nothing does.
"""

import abc
import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pldr_jax.config import DataConfig

INPUTS, TARGETS, SEGMENTS = 0, 1, 2
"""The planes of a row."""

PAD_ID = -1
"""A target that is not counted. No token has it, so that any id can be that of the end piece."""


class TokenStore(Protocol):
    """Tokens of a split, documents one after another, each with its end piece."""

    @property
    def n_tokens(self) -> int:
        """End pieces included."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document [n_documents], end piece included."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop."""


class Rows(abc.ABC):
    """Random access to rows, int32.

    Attributes:
      row_shape: [C], or [3,T].
      max_segments: K, segments in a row at most.
      n_targets: targets in all rows together.
    """

    row_shape: tuple[int, ...]
    max_segments: int
    n_targets: int

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def write(self, k: int, row: np.ndarray) -> None:
        """Writes row k over zeros; IndexError if there is none."""

    def __getitem__(self, k: Any) -> np.ndarray:
        """Row k."""
        row = np.zeros(self.row_shape, np.int32)
        self.write(int(k), row)
        return row


def stack_rows(rows: Rows, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Rows of the given numbers, one array [B,C] or [B,3,T]."""
    batch_BC = np.zeros((len(numbers), *rows.row_shape), np.int32)
    for place, k in enumerate(numbers):
        rows.write(int(k), batch_BC[place])
    return batch_BC


def blank_rows(count: int, shape: Sequence[int]) -> np.ndarray:
    """Rows without a token, int32 [B,C] or [B,3,T], to fill up a batch with."""
    return np.full((count, *shape), 0 if len(shape) == 2 else PAD_ID, np.int32)


def make_rows(store: TokenStore, context_length: int, config: DataConfig) -> Rows:
    """Rows of `Data.packing`."""
    if config.packing == "concat":
        return TokenRows(store, context_length)
    return SegmentRows(store, context_length, config.segments_per_row)


def row_shape(packing: str, context_length: int) -> tuple[int, ...]:
    """[C] of "concat", [3,T] of the others."""
    return (context_length,) if packing == "concat" else (3, context_length - 1)


def filled_share(rows: Rows) -> float:
    """Share of the places for targets that have one."""
    places = len(rows) * (rows.row_shape[-1] - (len(rows.row_shape) == 1))
    return rows.n_targets / max(places, 1)


class _JoinedRows(Rows):
    """The rows of several texts, one after another."""

    def __init__(self, texts: Sequence[Rows]) -> None:
        self._texts, self._ends = texts, list(itertools.accumulate(map(len, texts)))
        self.row_shape, self.max_segments = texts[0].row_shape, texts[0].max_segments
        self.n_targets = sum(rows.n_targets for rows in texts)

    def __len__(self) -> int:
        return self._ends[-1]

    def write(self, k: int, row: np.ndarray) -> None:
        text = bisect.bisect_right(self._ends, k)
        self._texts[text].write(k - (self._ends[text - 1] if text else 0), row)


def join_rows(texts: Sequence[Rows]) -> Rows:
    """The rows of several texts as those of one."""
    return texts[0] if len(texts) == 1 else _JoinedRows(texts)


class TokenRows(Rows):
    """`concat`: row k is tokens k*C .. k*C + C of the text; the last incomplete row is dropped.

    Documents are not kept apart: a row may hold the end of one and the start of the next. Pickles
    as its store.
    """

    max_segments = 1

    def __init__(self, store: TokenStore, context_length: int) -> None:
        self._store, self._context_length = store, context_length
        self.row_shape = row_shape("concat", context_length)
        self._n_rows = store.n_tokens // context_length
        self.n_targets = self._n_rows * (context_length - 1)

    def __len__(self) -> int:
        return self._n_rows

    def write(self, k: int, row: np.ndarray) -> None:
        """Writes row k, int32 [C]."""
        if not 0 <= k < self._n_rows:
            raise IndexError(f"row {k} of {self._n_rows}")
        start = k * self._context_length
        row[:] = self._store.read(start, start + self._context_length)

    def __reduce__(self) -> tuple[type["TokenRows"], tuple[TokenStore, int]]:
        return TokenRows, (self._store, self._context_length)


class SegmentRows(Rows):
    """`packed`, and with one segment a row `document`: int32 [3,T].

    A piece of T inputs fills a row. What is left of every document is packed by `pack_segments`,
    which needs only to know how many remainders there are of each length; which documents share a
    row is then counted off, so that the index takes 24 bytes a document, and no row is ever stored.
    Pickles as its store.

    Attributes:
      n_cut, n_dropped: conversations of which the first C tokens stay, and nothing.
    """

    def __init__(self, store: TokenStore, context_length: int, max_segments: int) -> None:
        self._store, self._length, self.max_segments = store, context_length - 1, max_segments
        self.row_shape = row_shape("packed", context_length)
        lengths = np.asarray(store.lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        inputs = np.maximum(lengths - 1, 0)
        self.n_cut = self.n_dropped = 0
        self._targets: Callable[[int, int], np.ndarray] | None = getattr(store, "targets", None)
        if self._targets is not None:
            self._cut(self._targets, starts, inputs)
        self.n_targets = int(inputs.sum())
        self._whole_ends = np.cumsum(inputs // self._length)
        self._n_whole = int(self._whole_ends[-1]) if len(lengths) else 0
        remainders = inputs % self._length
        counts = np.bincount(remainders, minlength=self._length)
        self._first_of = (np.cumsum(counts) - counts).tolist()
        self._patterns = pack_segments(counts, self._length, max_segments)
        self._pattern_ends = list(itertools.accumulate(pattern.count for pattern in self._patterns))
        self._n_rows = self._n_whole + (self._pattern_ends[-1] if self._patterns else 0)
        tails = (starts + inputs - remainders)[np.argsort(remainders, kind="stable")]
        # Single numbers of an array are read twice as fast through a memoryview.
        self._starts, self._tails = starts.data, tails.data

    def _cut(
        self, targets: Callable[[int, int], np.ndarray], starts: np.ndarray, inputs: np.ndarray
    ) -> None:
        """Shortens the conversations that are too long for a row, in `inputs`."""
        for k in np.flatnonzero(inputs > self._length):
            first = int(starts[k])
            kept = (targets(first + 1, first + 1 + self._length) != PAD_ID).any()
            self.n_cut, self.n_dropped = self.n_cut + bool(kept), self.n_dropped + (not kept)
            inputs[k] = self._length if kept else 0

    def __len__(self) -> int:
        return self._n_rows

    def write(self, k: int, row: np.ndarray) -> None:
        """Writes row k over zeros int32 [3,T]."""
        if not 0 <= k < self._n_rows:
            raise IndexError(f"row {k} of {self._n_rows}")
        inputs, targets, segments = row[INPUTS], row[TARGETS], row[SEGMENTS]
        number = end = 0
        for start, length in self._pieces(k):
            tokens = self._store.read(start, start + length + 1)
            number, begin, end = number + 1, end, end + length
            inputs[begin:end] = tokens[:-1]
            read_targets = self._targets
            targets[begin:end] = (
                tokens[1:] if read_targets is None else read_targets(start + 1, start + length + 1)
            )
            segments[begin:end] = number

    def _pieces(self, k: int) -> list[tuple[int, int]]:
        """(first token, inputs) of the segments of row k."""
        if k < self._n_whole:
            document = int(self._whole_ends.searchsorted(k, "right"))
            before = int(self._whole_ends[document - 1]) if document else 0
            return [(self._starts[document] + (k - before) * self._length, self._length)]
        k -= self._n_whole
        which = bisect.bisect_right(self._pattern_ends, k)
        pattern = self._patterns[which]
        place = k - (self._pattern_ends[which] - pattern.count)
        return [
            (self._tails[self._first_of[length] + taken + place], length)
            for length, taken in zip(pattern.lengths, pattern.taken, strict=True)
        ]

    def __reduce__(self) -> tuple[type["SegmentRows"], tuple[TokenStore, int, int]]:
        return SegmentRows, (self._store, self._length + 1, self.max_segments)


@dataclasses.dataclass(frozen=True)
class RowPattern:
    """`count` rows that hold segments of the same lengths.

    Attributes:
      lengths: of the segments.
      taken: how many remainders of that length other rows have before; row j of the pattern takes
        number `taken + j`.
    """

    lengths: tuple[int, ...]
    taken: tuple[int, ...]
    count: int


def pack_segments(counts: np.ndarray, length: int, max_segments: int) -> list[RowPattern]:
    """Packs counts[n] segments of n tokens into rows of `length`, `max_segments` in each at most.

    The longest that is left opens a row. Each further place takes the longest that leaves enough
    for the shortest in every place after it, and where there is none, the longest that fits: long
    ones meet short ones, so that both tokens and places are used. Rows of the same lengths are
    made together, so that the time depends on the number of lengths, not of documents.
    """
    left = {int(n): int(counts[n]) for n in np.flatnonzero(counts) if n}
    lengths = sorted(left)
    closed: list[tuple[tuple[int, ...], int]] = []
    while lengths:
        used = {lengths[-1]: 1}
        row, space = [lengths[-1]], length - lengths[-1]
        for later in range(max_segments - 2, -1, -1):
            k = bisect.bisect_right(lengths, space - later * lengths[0])
            k = (k or bisect.bisect_right(lengths, space)) - 1
            while k >= 0 and left[lengths[k]] == used.get(lengths[k], 0):
                k -= 1
            if k < 0:
                break
            n = lengths[k]
            row.append(n)
            used[n] = used.get(n, 0) + 1
            space -= n
        count = min(left[n] // times for n, times in used.items())
        closed.append((tuple(row), count))
        for n, times in used.items():
            left[n] -= times * count
            if not left[n]:
                lengths.remove(n)
    taken = np.zeros(length, np.int64)
    result = []
    for shape, count in closed:
        before = []
        for n in shape:
            before.append(int(taken[n]))
            taken[n] += count
        result.append(RowPattern(shape, tuple(before), count))
    return result
