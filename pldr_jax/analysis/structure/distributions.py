"""Distributions of tensor entries, as histograms that are filled row by row."""

import math

import numpy as np

LOG_LOW, LOG_HIGH, LOG_BINS = -12.0, 12.0, 192
"""Magnitudes are counted in bins of an eighth of a decade between these powers of ten; the first
bin also takes what is smaller, the last one what is larger.
"""

LINEAR_BINS = 80
BULK = (0.005, 0.995)
"""The linear histogram spans these quantiles of the first row, and `MARGIN` of that on both
sides."""
MARGIN = 0.25


class EntryHistograms:
    """Histograms of the entries of a tensor [L,N,H,J] over rows, by layer.

    The bins are fixed by the first row, so that they do not depend on how rows arrive in batches,
    and memory does not grow with rows. Tails are heavy: what the linear bins leave out is counted,
    and the logarithmic ones hold everything.

    Attributes:
      linear_edges: [L, bins + 1], of each layer.
      linear_counts: [L, bins].
      log_edges: [bins + 1], powers of ten of a magnitude, the same for every tensor.
      positive_counts, negative_counts: [L, bins], by magnitude and sign.
      zero_count: [L], entries that are exactly 0; `not_finite` [L], those that are no numbers.
    """

    def __init__(self) -> None:
        self.log_edges = np.linspace(LOG_LOW, LOG_HIGH, LOG_BINS + 1)
        self.linear_edges = np.zeros((0, LINEAR_BINS + 1))
        self._count = 0
        self._low, self._high = np.zeros((2, 0))

    def add(self, x_LNHJ: np.ndarray) -> None:
        """Adds one row."""
        x = np.asarray(x_LNHJ, np.float64).reshape(len(x_LNHJ), -1)
        if not self._count:
            self._begin(x)
        finite = np.isfinite(x)
        self.not_finite += (~finite).sum(1)
        x = np.where(finite, x, 0.0)
        self.zero_count += (x == 0).sum(1) - (~finite).sum(1)
        self._count += x.shape[1]
        self._sum += x.sum(1)
        self._squares += np.square(x).sum(1)
        self._low, self._high = np.minimum(self._low, x.min(1)), np.maximum(self._high, x.max(1))
        for layer, values in enumerate(x):
            edges = self.linear_edges[layer]
            self.linear_counts[layer] += np.histogram(values, LINEAR_BINS, (edges[0], edges[-1]))[0]
            for counts, part in (
                (self.positive_counts, values[values > 0]),
                (self.negative_counts, -values[values < 0]),
            ):
                scaled = (np.log10(part) - LOG_LOW) * (LOG_BINS / (LOG_HIGH - LOG_LOW))
                bins = np.clip(np.floor(scaled), 0, LOG_BINS - 1).astype(np.int64)
                counts[layer] += np.bincount(bins, minlength=LOG_BINS)

    def _begin(self, x_LE: np.ndarray) -> None:
        layers = len(x_LE)
        self.linear_edges = np.stack([_linear_edges(values) for values in x_LE])
        self.linear_counts = np.zeros((layers, LINEAR_BINS), np.int64)
        self.positive_counts = np.zeros((layers, LOG_BINS), np.int64)
        self.negative_counts = np.zeros((layers, LOG_BINS), np.int64)
        self.zero_count, self.not_finite = np.zeros((2, layers), np.int64)
        self._sum, self._squares = np.zeros((2, layers))
        self._low, self._high = np.full(layers, math.inf), np.full(layers, -math.inf)

    @property
    def log_counts(self) -> np.ndarray:
        """[L, bins], of both signs."""
        return self.positive_counts + self.negative_counts

    @property
    def outside_linear(self) -> np.ndarray:
        """Share [L] of the entries that the linear bins leave out."""
        return 1.0 - self.linear_counts.sum(1) / self._count

    def results(self) -> dict[str, np.ndarray]:
        """By layer [L]: `mean`, `std`, `min`, `max`, and the shares `negative`, `zero` and
        `not_finite`.
        """
        mean = self._sum / self._count
        variance = np.maximum(self._squares / self._count - np.square(mean), 0.0)
        return {
            "mean": mean,
            "std": np.sqrt(variance),
            "min": self._low,
            "max": self._high,
            "negative": self.negative_counts.sum(1) / self._count,
            "zero": self.zero_count / self._count,
            "not_finite": self.not_finite / self._count,
        }

    def densities(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability densities: per unit in the linear bins [L, bins], and per decade of magnitude
        in the logarithmic ones [L, bins].
        """
        linear = self.linear_counts / np.diff(self.linear_edges, axis=1) / self._count
        return linear, self.log_counts / np.diff(self.log_edges) / self._count


def _linear_edges(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, BULK) if len(finite) else (0.0, 0.0)
    width = (high - low) or abs(low) or 1.0
    return np.linspace(low - MARGIN * width, high + MARGIN * width, LINEAR_BINS + 1)
