"""A stated order of the rows of a text."""

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path


def read_order(path: str, n_rows: int, batch_size: int) -> np.ndarray:
    """Row numbers int64 of `Data.order`, each of 0 .. n_rows - 1 at most once.

    Raises:
      ConfigError: anything else; the message names the first place that is wrong.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError(f"Data.order = {path!r}: {what}")

    try:
        numbers = np.load(readable_path(path, "Data.order"), allow_pickle=False)
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror or 'no npy file'})") from None
    except (ValueError, EOFError):
        raise wrong("is no npy file; write it with numpy.save") from None
    if not isinstance(numbers, np.ndarray) or numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise wrong("must be one axis of integers, the numbers of rows")
    if len(numbers) < batch_size:
        raise wrong(f"has {len(numbers)} rows, fewer than Data.batch_size = {batch_size}")
    outside = (numbers < 0) | (numbers >= n_rows)
    if outside.any():
        place = int(outside.argmax())
        raise wrong(f"place {place} has {numbers[place]}; the text has rows 0 to {n_rows - 1}")
    numbers = numbers.astype(np.int64)
    firsts = np.unique(numbers, return_index=True)[1]
    if len(firsts) < len(numbers):
        again = np.ones(len(numbers), bool)
        again[firsts] = False
        place = int(again.argmax())
        raise wrong(f"place {place} has row {numbers[place]} again; Data.epochs repeats all of it")
    return numbers
