"""Rows to batches, with Grain: shuffled over all of the text, mixed, shared by process.

The position in the stream is one number, the rows that were taken. The next batch begins there,
whatever its size and for any number of processes, so a run can be resumed with others of both.
"""

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl.flags import FLAGS
from grain.experimental import index_shuffle

from pldr_jax.config import CALIBRATION_ROWS, ConfigError
from pldr_jax.data.order import read_order
from pldr_jax.data.rows import Rows, filled_share, join_rows, stack_rows

_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)
_GO_ON_ANEW = (
    "take that again, or begin another run with these weights: --init_from and another --run_dir"
)


class TrainIterator(Iterator[np.ndarray]):
    """Batches int32 [b,C] or [b,3,T] of one process, b = batch_size / parts.

    Call `close` at the end: it stops what reads ahead. Also a context manager.

    Args:
      stream: the numbers of the rows, in their order.
      rows: what they are numbers of.
      process: which part of each batch this process takes, of how many.
      workers: processes that make batches ahead; 0 is threads of this one.
      identity: text and seed, as `state` holds them; a position is valid for these alone.
      filled_share: share of the places of rows that have a target.
    """

    def __init__(
        self,
        stream: grain.MapDataset,
        rows: Rows,
        batch_size: int,
        process: tuple[int, int],
        workers: int,
        identity: dict[str, Any],
        filled_share: float,
    ) -> None:
        self._stream, self._rows, self._batch_size = stream, rows, batch_size
        self._process, self._workers, self._identity = process, workers, identity
        self.filled_share = filled_share
        self._next_row, self._closed = 0, False
        self._iterator: Any = None  # from the first batch on

    def __next__(self) -> np.ndarray:
        if self._iterator is None:
            self._iterator = self._open()
        batch = np.array(next(self._iterator))  # a copy: workers hand over shared memory
        self._next_row += self._batch_size
        return batch

    @property
    def n_batches(self) -> int:
        """As many batches of this size as rows were taken."""
        return self._next_row // self._batch_size

    @property
    def n_rows(self) -> int:
        """Of the text, or of all texts together."""
        return len(self._rows)

    @property
    def batches_left(self) -> int:
        """Before the passes over the text are used up; a huge number where they have no end."""
        return (len(self._stream) - self._next_row) // self._batch_size

    def _open(self) -> Any:
        if self._closed:
            raise ValueError("the training data is closed")
        part, parts = self._process
        stop = self._next_row + self.batches_left * self._batch_size
        # Sharing comes after the shuffle: before it, a process would only ever see its own rows.
        numbers = self._stream[self._next_row + part : stop : parts]
        # Grain carries numbers of rows, and a batch is made at once: to take every row through its
        # stages costs more than to make it.
        make = functools.partial(stack_rows, self._rows)
        batches = numbers.batch(self._batch_size // parts, drop_remainder=True, batch_fn=make)
        # Its own position is of no use to another number of workers or processes: begin there.
        stream = batches.to_iter_dataset(_READ_AHEAD)
        if self._workers:
            FLAGS.mark_as_parsed()  # Grain asks them when it starts processes
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(stream)

    @property
    def state(self) -> dict[str, Any]:
        """{"next_row": k, "text": ..., "seed": ...}: k rows were taken by all processes together.

        Fit for JSON; equal in all processes. Valid for the same text, packing and context length,
        with any batch size and any number of processes and workers.
        """
        return {"next_row": self._next_row, **self._identity}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if "next_row" not in state and "next_index" in state:
            raise ConfigError(
                "--run_dir: its checkpoint is of a version that held out other documents; begin "
                "another run with these weights: --init_from and another --run_dir"
            )
        next_row = state.get("next_row")
        if not isinstance(next_row, int) or next_row < 0:
            raise ValueError(f"state {state!r} of the training data: needs 'next_row', 0 or more")
        if state.get("text") != self._identity["text"]:
            raise ConfigError(
                "Data.source, Data.mixture, Data.validation_fraction: not the text, the held-out "
                f"documents or the weights that the checkpoint was trained with; {_GO_ON_ANEW}"
            )
        if state.get("seed") != self._identity["seed"]:
            raise ConfigError(
                f"Data.seed = {self._identity['seed']}: the run has {state.get('seed')}, and in "
                f"another order rows would be lost and others repeated; {_GO_ON_ANEW}"
            )
        if state.get("order") != self._identity.get("order"):
            raise ConfigError(
                "Data.order: not the order that the checkpoint was trained in, so that rows would "
                f"be lost and others repeated; {_GO_ON_ANEW}"
            )
        self._stop()
        self._next_row = next_row

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
    process: tuple[int, int] = (0, 1),
    *,
    weights: Sequence[float] = (1.0,),
    epochs: int | None = None,
    digest: str = "",
    workers: int = 0,
    order: str | None = None,
) -> TrainIterator:
    """This process's part of every global batch of `batch_size` rows, shuffled anew each epoch.

    Over the processes, the first len(rows) rows of the stream of one text are all its rows once,
    and so on; a batch may span two epochs. Of several texts each has its share of the rows by its
    weight, as evenly spread as can be, and its own shuffles.

    Args:
      rows: of each text.
      process: which part of a batch, of how many; processes that hold the same rows of it take the
        same part (`partition.process_part`).
      weights: their shares.
      epochs: passes over a text, after which the stream ends; None is no end.
      digest: of the texts, kept in the state to know them again.
      workers: processes that make batches ahead; 0 is threads of this one.
      order: file of row numbers, which takes the place of shuffle and weights; of several texts,
        the rows of the second follow those of the first, and so on. One pass unless `epochs` says
        more.

    Raises:
      ConfigError: a text is shorter than one batch, the processes cannot have equal parts, or the
        order is none of these rows.
    """
    for one in rows:
        if len(one) < batch_size:
            raise ConfigError(
                f"Data.batch_size = {batch_size}: the training text of Data.source has only "
                f"{len(one)} rows of {one.row_shape[-1] + len(one.row_shape) // 2} tokens; give "
                "more text, or lower it or Model.context_length"
            )
    if batch_size % process[1]:
        raise ConfigError(
            f"Data.batch_size = {batch_size}: must be a multiple of the {process[1]} processes"
        )
    identity = {"text": digest, "seed": seed}
    if order is not None:
        numbers = read_order(order, sum(map(len, rows)), batch_size)
        identity["order"] = hashlib.sha256(numbers.tobytes()).hexdigest()
        stream: grain.MapDataset = _Ordered(numbers, epochs or 1)
    else:
        ends = itertools.accumulate(len(one) for one in rows)
        shuffled = [
            _Shuffled(end - len(one), end, seed + k, epochs)
            for k, (one, end) in enumerate(zip(rows, ends, strict=True))
        ]
        stream = shuffled[0] if len(rows) == 1 else grain.MapDataset.mix(shuffled, list(weights))
    filled = sum(weight * filled_share(one) for weight, one in zip(weights, rows, strict=True))
    return TrainIterator(stream, join_rows(rows), batch_size, process, workers, identity, filled)


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


class _Ordered(grain.MapDataset):
    """The given numbers, `epochs` times."""

    def __init__(self, numbers: np.ndarray, epochs: int) -> None:
        super().__init__()
        self._numbers, self._epochs = numbers, epochs

    def __len__(self) -> int:
        return self._epochs * len(self._numbers)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return self.slice(k)
        return int(self._numbers[k % len(self._numbers)])


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows, int32 [B,C] or [B,3,T]: `rows_BC` to evaluate and `calibration_BC` to fit on,
    without common rows.
    """

    rows_BC: np.ndarray
    calibration_BC: np.ndarray


def validation_rows(
    rows_of_texts: Sequence[Rows],
    count: int,
    calibration_rows: int = CALIBRATION_ROWS,
    seed: int = 0,
    weights: Sequence[float] = (1.0,),
) -> ValidationRows:
    """Rows spread over the held-out text, the same for the same arguments.

    Args:
      count: how many to evaluate, of several texts by their weights, at least one of each; 0 takes
        all but the calibration rows, and where a text has fewer, all of these are taken too.
      calibration_rows: of the first text, at most a quarter of it, at least one row unless 0; the
        choice does not depend on `count`, and more rows begin with the fewer.

    Raises:
      ConfigError: a text is too short for one row of each.
    """
    evaluated, calibration = [], []
    for k, (rows, weight) in enumerate(zip(rows_of_texts, weights, strict=True)):
        wanted = calibration_rows if k == 0 else 0
        n_calibration = min(wanted, max(1, len(rows) // 4))
        if len(rows) <= n_calibration:
            raise ConfigError(
                f"Data.source: the held-out text has only {len(rows)} rows of "
                f"{rows.row_shape[-1] + len(rows.row_shape) // 2} tokens; give more text, raise "
                "Data.validation_fraction or lower Model.context_length"
            )
        order = np.random.default_rng(seed).permutation(len(rows))
        share = count if len(rows_of_texts) == 1 else max(1, round(count * weight))
        end = n_calibration + share if count else len(rows)
        evaluated.append(stack_rows(rows, order[n_calibration:end]))
        calibration.append(stack_rows(rows, order[:n_calibration]))
    return ValidationRows(np.concatenate(evaluated), np.concatenate(calibration))
