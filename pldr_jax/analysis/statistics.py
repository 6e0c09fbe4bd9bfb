"""Statistics over rows that need no memory for the rows."""

import numpy as np


class RunningStatistics:
    """Mean, spread and range over rows of a value of any shape, in float64 (Welford's updates, so
    that a spread far below the mean is exact).

    Attributes:
      rows: added so far.
      mean, min, max: of each entry of the value.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.mean = self._squares = np.zeros(())
        self.min, self.max = np.full((), np.inf), np.full((), -np.inf)

    def add(self, x_R: np.ndarray) -> None:
        """Adds rows: values along the first axis."""
        for x in np.asarray(x_R, np.float64):
            self.rows += 1
            with np.errstate(invalid="ignore"):  # log |det| of a singular matrix is -inf
                delta = x - self.mean
                self.mean = self.mean + delta / self.rows
                self._squares = self._squares + delta * (x - self.mean)
            self.min, self.max = np.minimum(self.min, x), np.maximum(self.max, x)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the rows."""
        return np.sqrt(self._squares / max(self.rows, 1))

    @property
    def standard_error(self) -> float | None:
        """Of the mean of a number, rows being independent; None for a single row."""
        return float(self.std / np.sqrt(self.rows - 1)) if self.rows > 1 else None
