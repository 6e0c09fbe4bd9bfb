"""Rows to batches, with Grain: shuffled over all of the text, mixed, shared by process.

The position in the stream is one number, the index of the next global batch. That batch holds the
same rows for any number of processes, so a run can be resumed on another number of them.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl.flags import FLAGS
from grain.experimental import index_shuffle

from pldr_jax.config import ConfigError
from pldr_jax.data.rows import Rows, joined, stack


class TrainIterator(Iterator[np.ndarray]):
    """Batches int32 [b,C] or [b,3,T] of one process, b = batch_size / parts.

    Call `close` at the end: it stops what reads ahead. Also a context manager.

    Attributes:
      n_batches: how many there are before the passes over the text are used up; None is no end.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        options: grain.ReadOptions,
        workers: int = 0,
        n_batches: int | None = None,
        digest: str | None = None,
    ) -> None:
        self._batches, self._options, self._workers = batches, options, workers
        self.n_batches, self._digest = n_batches, digest
        self._next_index, self._closed = 0, False
        self._iterator: Any = None  # from the first batch on

    def __next__(self) -> np.ndarray:
        if self._iterator is None:
            self._iterator = self._open()
        batch = np.array(next(self._iterator))  # a copy: workers hand over shared memory
        self._next_index += 1
        return batch

    def _open(self) -> Any:
        if self._closed:
            raise ValueError("the training data is closed")
        # Its own position is of no use to another number of workers or processes: begin there.
        stream = self._batches[self._next_index :].to_iter_dataset(self._options)
        if self._workers:
            FLAGS.mark_as_parsed()  # Grain asks them when it starts processes
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(stream)

    @property
    def state(self) -> dict[str, Any]:
        """{"next_index": k}: k global batches were taken. Fit for JSON; equal in all processes.

        Valid for the same text, packing, context length, batch size and seed, on any number of
        processes and workers. Of prepared text it also holds the digest, as "text".
        """
        state: dict[str, Any] = {"next_index": self._next_index}
        return state if self._digest is None else {**state, "text": self._digest}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        next_index = state.get("next_index")
        if not isinstance(next_index, int) or next_index < 0:
            raise ValueError(f"state {state!r} of the training data: needs 'next_index', 0 or more")
        if state.get("text") != self._digest:
            raise ConfigError(
                "Data.source, Data.mixture: not the text, or not the weights, that the checkpoint "
                "was trained on; take those, or another --run_dir"
            )
        self._stop()
        self._next_index = next_index

    def close(self) -> None:
        """Stops reading ahead; may be called twice."""
        self._stop()
        self._closed = True

    def _stop(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_iterator(
    rows: Sequence[Rows],
    batch_size: int,
    seed: int,
    part: int = 0,
    parts: int = 1,
    *,
    weights: Sequence[float] = (1.0,),
    epochs: int | None = None,
    digest: str | None = None,
    workers: int = 0,
    num_threads: int = 2,
    prefetch_batches: int = 16,
) -> TrainIterator:
    """This process's part of every global batch of `batch_size` rows, shuffled anew each epoch.

    Over the processes, the first len(rows) rows of the stream of one text are all its rows once,
    and so on; a batch may span two epochs. Of several texts each has its share of the rows by its
    weight, as evenly spread as can be, and its own shuffles.

    Args:
      rows: of each text.
      part, parts: which part of a batch, of how many; processes that hold the same rows of it take
        the same part (`partition.process_part`).
      weights: their shares.
      epochs: passes over a text, after which the stream ends; None is no end.
      digest: kept in the state, to know the text again.
      workers: processes that make batches ahead; 0 is threads of this one.

    Raises:
      ConfigError: a text is shorter than one batch, or the processes cannot have equal parts.
    """
    for one in rows:
        if len(one) < batch_size:
            raise ConfigError(
                f"Data.batch_size = {batch_size}: the training text of Data.source has only "
                f"{len(one)} rows of {one.row_shape[-1] + len(one.row_shape) // 2} tokens; give "
                "more text, or lower it or Model.context_length"
            )
    if batch_size % parts:
        raise ConfigError(
            f"Data.batch_size = {batch_size}: must be a multiple of the {parts} processes"
        )
    # Grain carries numbers of rows, and a batch is made at once: to take every row through its
    # stages costs more than to make it.
    ends = itertools.accumulate(len(one) for one in rows)
    shuffled = [
        _Shuffled(end - len(one), end, seed + k, epochs)
        for k, (one, end) in enumerate(zip(rows, ends, strict=True))
    ]
    stream = shuffled[0] if len(rows) == 1 else grain.MapDataset.mix(shuffled, list(weights))
    # Sharing comes after the shuffle: before it, a process would only ever see its own rows.
    own = stream if parts == 1 else stream[part::parts]
    make = functools.partial(stack, joined(rows))
    batches = own.batch(batch_size // parts, drop_remainder=True, batch_fn=make)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    n_batches = None if epochs is None else len(stream) // batch_size
    return TrainIterator(batches, options, workers, n_batches, digest)


class _Shuffled(grain.MapDataset):
    """Numbers start..stop, shuffled anew each epoch; `epochs` of None is no end.

    The same as `grain.MapDataset.range(start, stop).seed(seed).shuffle().repeat(epochs)`, seed
    and all, which takes more than twice the time.
    """

    def __init__(self, start: int, stop: int, seed: int, epochs: int | None) -> None:
        super().__init__()
        self._start, self._count = start, stop - start
        self._length = sys.maxsize if epochs is None else epochs * self._count
        self._seed = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint32)[0])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return self.slice(k)
        epoch, place = divmod(k, self._count)
        seed = (self._seed + epoch) % 2**32
        return self._start + index_shuffle(place, self._count - 1, seed, 4)


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows: `rows_RC` to evaluate and `calibration_RC` to fit on, without common rows."""

    rows_RC: np.ndarray
    calibration_RC: np.ndarray


def validation_rows(
    parts: Sequence[Rows],
    count: int,
    calibration_rows: int = 16,
    seed: int = 0,
    weights: Sequence[float] = (1.0,),
) -> ValidationRows:
    """Rows int32 [R,C] or [R,3,T] spread over the held-out text, the same for the same arguments.

    count: how many to evaluate, of several texts by their weights, at least one of each; 0 takes
    all but the calibration rows, and where a text has fewer, all of these are taken too.
    calibration_rows: of the first text, at most a quarter of it, at least one row unless 0; the
    choice does not depend on `count`, and more rows begin with the fewer.
    ConfigError if a text is too short for one row of each.
    """
    evaluated, calibration = [], []
    for k, (rows, weight) in enumerate(zip(parts, weights, strict=True)):
        wanted = calibration_rows if k == 0 else 0
        n_calibration = min(wanted, max(1, len(rows) // 4))
        if len(rows) <= n_calibration:
            raise ConfigError(
                f"Data.source: the held-out text has only {len(rows)} rows of "
                f"{rows.row_shape[-1] + len(rows.row_shape) // 2} tokens; give more text, raise "
                "Data.validation_fraction or lower Model.context_length"
            )
        order = np.random.default_rng(seed).permutation(len(rows))
        share = count if len(parts) == 1 else max(1, round(count * weight))
        end = n_calibration + share if count else len(rows)
        evaluated.append(stack(rows, order[n_calibration:end]))
        calibration.append(stack(rows, order[:n_calibration]))
    return ValidationRows(np.concatenate(evaluated), np.concatenate(calibration))
