"""Token files to batches, with Grain: rows of context_length tokens, shuffled, shared by process.

The position in the stream is one number, the index of the next global batch. That batch holds the
same rows for any number of processes, so a run can be resumed on another number of them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.data.corpus import TokenFile


class TokenRows:
    """Random access to a token file as rows of C = context_length tokens.

    Row k is tokens[k*C : (k+1)*C]; the last incomplete row is dropped. A row of C tokens gives
    C - 1 inputs and targets. Documents are not kept apart: a row may hold the end of one and the
    start of the next. Pickles as the file's path.
    """

    def __init__(self, token_file: TokenFile, context_length: int) -> None:
        self._token_file, self._context_length = token_file, context_length
        self._tokens = token_file.tokens

    def __len__(self) -> int:
        return self._token_file.n_tokens // self._context_length

    def __getitem__(self, k: Any) -> np.ndarray:
        """Row k, int32 [C]."""
        if not 0 <= k < len(self):
            raise IndexError(f"row {k} of {len(self)}")
        start = int(k) * self._context_length
        return self._tokens[start : start + self._context_length].astype(np.int32)

    def __reduce__(self) -> tuple[type["TokenRows"], tuple[TokenFile, int]]:
        return TokenRows, (self._token_file, self._context_length)


class TrainIterator(Iterator[np.ndarray]):
    """Endless batches int32 [b,C] of one process, b = batch_size / process_count.

    Call `close` at the end: it stops the threads that read ahead. Also a context manager.
    """

    def __init__(self, dataset: grain.IterDataset) -> None:
        self._iterator: Any = iter(dataset)

    def __next__(self) -> np.ndarray:
        return np.asarray(next(self._iterator))

    @property
    def state(self) -> dict[str, int]:
        """{"next_index": k}: k global batches were taken. Fit for JSON; equal in all processes.

        Valid for the same text, context length, batch size and seed, on any number of processes.
        """
        return {"next_index": int(self._iterator.get_state()["next_index"])}

    @state.setter
    def state(self, state: dict[str, int]) -> None:
        next_index = state.get("next_index")
        if not isinstance(next_index, int) or next_index < 0:
            raise ValueError(f"state {state!r} of the training data: needs 'next_index', 0 or more")
        self._iterator.set_state({"next_index": next_index})

    def close(self) -> None:
        """Stops reading ahead; may be called twice."""
        self._iterator.close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_iterator(
    token_file: TokenFile,
    context_length: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    num_threads: int = 2,
    prefetch_batches: int = 16,
) -> TrainIterator:
    """This process's part of every global batch of `batch_size` rows, shuffled anew each epoch.

    Over the processes, the first len(rows) rows of the stream are all rows once, and so on; a batch
    may span two epochs. ConfigError if the text is shorter than one batch, or if the processes
    cannot have equal parts of it.
    """
    rows = TokenRows(token_file, context_length)
    if len(rows) < batch_size:
        raise ConfigError(
            f"Data.batch_size = {batch_size}: the training text of Data.source has only "
            f"{len(rows)} rows of {context_length} tokens; give more text, or lower it or "
            "Model.context_length"
        )
    if batch_size % process_count:
        raise ConfigError(
            f"Data.batch_size = {batch_size}: must be a multiple of the {process_count} processes"
        )
    shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    # Sharing comes after the shuffle: before it, a process would only ever see its own rows.
    own = shuffled[process_index::process_count]
    batches = own.batch(batch_size // process_count, drop_remainder=True)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    return TrainIterator(batches.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class ValidationRows:
    """Held-out rows: `rows_RC` to evaluate and `calibration_RC` to fit on, without common rows."""

    rows_RC: np.ndarray
    calibration_RC: np.ndarray


def validation_rows(
    token_file: TokenFile,
    context_length: int,
    rows: int,
    calibration_rows: int = 16,
    seed: int = 0,
) -> ValidationRows:
    """Rows int32 [R,C] spread over the held-out text, the same for the same arguments.

    rows: how many to evaluate; 0 takes all but the calibration rows, and where the text has fewer,
    all of these are taken too. calibration_rows: at most a quarter of the text, at least one row
    unless 0; the choice does not depend on `rows`, and more rows begin with the fewer.
    ConfigError if the text is too short for one row of each.
    """
    source = TokenRows(token_file, context_length)
    n_calibration = min(calibration_rows, max(1, len(source) // 4))
    if len(source) <= n_calibration:
        raise ConfigError(
            f"Data.source: the held-out text has only {len(source)} rows of {context_length} "
            "tokens; give more text, raise Data.validation_fraction or lower Model.context_length"
        )
    order = np.random.default_rng(seed).permutation(len(source))
    evaluated = order[n_calibration : n_calibration + rows] if rows else order[n_calibration:]
    return ValidationRows(
        rows_RC=_stack(source, evaluated), calibration_RC=_stack(source, order[:n_calibration])
    )


def _stack(rows: TokenRows, order: np.ndarray) -> np.ndarray:
    empty = np.zeros((0, len(rows[0])), np.int32)
    return np.stack([rows[k] for k in order]) if len(order) else empty
