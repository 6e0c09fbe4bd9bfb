"""How many documents may share a row, where `Data.max_segments` leaves it to the text.

A row of K segments costs as much whether they are used or not: the model computes G_LM for K of
them. More of them fill the rows better and cost more each, so that there is a best number, which
follows from the lengths of the training documents and the sizes of the model. It is computed, not
timed: every process of a run, and every start of it, finds the same. Once chosen it is an ordinary
value of the config, which run folders and checkpoints keep.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.mixture import TrainingText
from pldr_jax.data.rows import pack_segments

MOST_SEGMENTS = 16
"""In a row at most: PLGA keeps its activations of each one for the backward pass."""

NEAR = 0.95
"""The smallest number is taken whose speed is at least this share of the best one's: an estimate is
not exact, and fewer segments take less memory."""


@dataclasses.dataclass(frozen=True)
class SegmentCount:
    """A number of segments and what it is expected to do.

    Attributes:
      max_segments: K.
      filled_share: share of the places for targets that have one.
      gain: targets a second, over those with one segment in a row.
    """

    max_segments: int
    filled_share: float
    gain: float

    def __str__(self) -> str:
        speed = "more documents side by side would be slower"
        if self.max_segments > 1:
            speed = f"{self.gain:.2f} times as fast as with 1"
        return (
            f"Data.max_segments = {self.max_segments}: rows {self.filled_share:.1%} filled, {speed}"
        )


def choose_segment_count(
    lengths: Sequence[np.ndarray],
    weights: Sequence[float],
    context_length: int,
    row_cost: Callable[[int], float],
) -> SegmentCount:
    """The number of segments with which a step sees the most targets a second.

    Args:
      lengths: tokens of the documents of each text, end pieces included.
      weights: shares of the rows of each text.
      context_length: C; rows have C - 1 inputs.
      row_cost: what a row with places for K segments costs, in operations.
    """
    length = context_length - 1
    inputs = [np.maximum(np.asarray(one, np.int64) - 1, 0) for one in lengths]
    counts = [np.bincount(one % length, minlength=length) for one in inputs]

    def filled_share(segments: int) -> float:
        """Mean over the rows of all texts."""
        total = 0.0
        for weight, one, remainders in zip(weights, inputs, counts, strict=True):
            patterns = pack_segments(remainders, length, segments)
            rows = int((one // length).sum()) + sum(pattern.count for pattern in patterns)
            total += weight * int(one.sum()) / max(rows * length, 1)
        return total

    shares: list[float] = []
    rates: list[float] = []
    for segments in range(1, MOST_SEGMENTS + 1):
        cost = row_cost(segments)
        if rates and 1 / cost <= max(rates):
            break  # nor would full rows be faster, here or with more segments
        shares.append(filled_share(segments))
        rates.append(shares[-1] / cost)
    k = next(k for k, rate in enumerate(rates) if rate >= NEAR * max(rates))
    return SegmentCount(k + 1, shares[k], rates[k] / rates[0] if rates[0] else 1.0)


def with_segment_count(
    config: ExperimentConfig,
    text: TrainingText,
    row_cost: Callable[[int], float],
    log: Callable[[str], None],
) -> ExperimentConfig:
    """The config with `Data.max_segments` chosen for the training documents of a text, and said in
    a line, where the packing needs it and it is open; else the config.

    Args:
      row_cost: as `choose_segment_count` takes it; `model.counts.flops.row_flops` gives it.
    """
    if config.data.packing != "packed" or config.data.max_segments is not None:
        return config
    lengths = [one.train.lengths for one in text.texts]
    chosen = choose_segment_count(lengths, text.weights, config.model.context_length, row_cost)
    log(f"{chosen} (estimated)")
    data = dataclasses.replace(config.data, max_segments=chosen.max_segments)
    return dataclasses.replace(config, data=data)
