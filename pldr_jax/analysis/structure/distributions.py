"""Distributions of tensor entries, as histograms over rows."""

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
    """Histograms of the finite entries of a tensor [L,N,H,J] over rows, by layer.

    The first row sets the bins, so that they do not depend on how rows arrive in batches, and
    memory does not grow with rows. Tails are heavy: the linear bins hold the middle, the
    logarithmic ones every entry but zeros.

    Attributes:
      linear_edges: [L, bins + 1], of each layer.
      linear_counts: [L, bins].
      log_edges: [bins + 1], powers of ten of a magnitude, the same for every tensor.
      positive_counts, negative_counts: [L, bins], by magnitude and sign.
      zero_count, not_finite: [L], entries that are exactly 0, and NaN or infinite ones, which
        count nowhere else.
    """

    def __init__(self) -> None:
        self.log_edges = np.linspace(LOG_LOW, LOG_HIGH, LOG_BINS + 1)
        self.linear_edges = np.zeros((0, LINEAR_BINS + 1))

    def add(self, x_LNHJ: np.ndarray) -> None:
        """Adds one row."""
        x_LE = np.asarray(x_LNHJ, np.float64).reshape(len(x_LNHJ), -1)
        if not len(self.linear_edges):
            self._begin(x_LE)
        for layer, entries in enumerate(x_LE):
            values = entries[np.isfinite(entries)]
            self.not_finite[layer] += entries.size - values.size
            self.finite[layer] += values.size
            self.zero_count[layer] += (values == 0).sum()
            self._sum[layer] += values.sum()
            self._squares[layer] += np.square(values).sum()
            self._low[layer] = min(self._low[layer], values.min(initial=math.inf))
            self._high[layer] = max(self._high[layer], values.max(initial=-math.inf))
            edges = self.linear_edges[layer]
            self.linear_counts[layer] += np.histogram(values, LINEAR_BINS, (edges[0], edges[-1]))[0]
            self.positive_counts[layer] += _by_decade(values[values > 0])
            self.negative_counts[layer] += _by_decade(-values[values < 0])

    def _begin(self, x_LE: np.ndarray) -> None:
        layers = len(x_LE)
        self.linear_edges = np.stack([_linear_edges(values) for values in x_LE])
        self.linear_counts = np.zeros((layers, LINEAR_BINS), np.int64)
        self.positive_counts = np.zeros((layers, LOG_BINS), np.int64)
        self.negative_counts = np.zeros((layers, LOG_BINS), np.int64)
        self.zero_count, self.not_finite, self.finite = np.zeros((3, layers), np.int64)
        self._sum, self._squares = np.zeros((2, layers))
        self._low, self._high = np.full(layers, math.inf), np.full(layers, -math.inf)

    @property
    def log_counts(self) -> np.ndarray:
        """[L, bins], of both signs."""
        return self.positive_counts + self.negative_counts

    def results(self) -> dict[str, np.ndarray]:
        """By layer [L]: `mean`, `std`, `min`, `max` and the shares `negative` and `zero` of the
        finite entries, NaN where there are none; and the share `not_finite` of all.
        """
        finite = np.where(self.finite, self.finite, np.nan)
        mean = self._sum / finite
        variance = np.maximum(self._squares / finite - np.square(mean), 0.0)
        return {
            "mean": mean,
            "std": np.sqrt(variance),
            "min": np.where(self.finite, self._low, np.nan),
            "max": np.where(self.finite, self._high, np.nan),
            "negative": self.negative_counts.sum(1) / finite,
            "zero": self.zero_count / finite,
            "not_finite": self.not_finite / (self.finite + self.not_finite),
        }

    def densities(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability densities of the finite entries: per unit in the linear bins [L, bins], and
        per decade of magnitude in the logarithmic ones [L, bins].
        """
        finite = np.maximum(self.finite, 1)[:, None]
        linear = self.linear_counts / np.diff(self.linear_edges, axis=1) / finite
        return linear, self.log_counts / np.diff(self.log_edges) / finite


def _by_decade(magnitudes: np.ndarray) -> np.ndarray:
    """Counts of positive numbers in the logarithmic bins."""
    scaled = (np.log10(magnitudes) - LOG_LOW) * (LOG_BINS / (LOG_HIGH - LOG_LOW))
    bins = np.clip(np.floor(scaled), 0, LOG_BINS - 1).astype(np.int64)
    return np.bincount(bins, minlength=LOG_BINS)


def _linear_edges(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, BULK) if len(finite) else (0.0, 0.0)
    width = (high - low) or abs(low) or 1.0
    return np.linspace(low - MARGIN * width, high + MARGIN * width, LINEAR_BINS + 1)
