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

from pldr_jax.config import ExperimentConfig, ModelConfig
from pldr_jax.data.mixture import Part
from pldr_jax.data.rows import fit
from pldr_jax.model.flops import forward_entries, forward_flops
from pldr_jax.model.kernels import cudnn_can

MOST = 16
"""Segments in a row at most: PLGA keeps its activations of each one for the backward pass."""

NEAR = 0.95
"""The smallest number is taken whose speed is at least this share of the best one's: an estimate is
not exact, and fewer segments take less memory."""

ENTRY = 200
"""Operations of matrix products that a number written costs as much as, fitted to steps on CPU
cores: PLGA of one segment took 1.14, 0.19, 0.41 and 0.165 times what the rest of its row took, for
0.65M parameters at 127 and 511 tokens and 110M at 256 and 1024, and takes 1.36, 0.21, 0.36 and 0.08
times that by this; PLGA has become faster since (docs/training_speed.md). No accelerator was
measured."""


@dataclasses.dataclass(frozen=True)
class SegmentCount:
    """A number of segments and what it is expected to do.

    Attributes:
      max_segments: K.
      fill: share of the places for targets that have one.
      gain: targets a second, over those with one segment in a row.
    """

    max_segments: int
    fill: float
    gain: float

    def __str__(self) -> str:
        speed = "more documents side by side would be slower"
        if self.max_segments > 1:
            speed = f"{self.gain:.2f} times as fast as with 1"
        return f"Data.max_segments = {self.max_segments}: rows {self.fill:.1%} filled, {speed}"


def row_cost(model: ModelConfig, segments: int) -> float:
    """What a row with places for some segments costs in a step, counted in operations of matrix
    products of the forward pass.
    """
    length = model.context_length - 1
    kernel = model.attention_kernel == "auto" and cudnn_can(model.dtype, model.head_dim)
    entries = forward_entries(model, length, segments, scores=segments > 1 or not kernel)
    return sum(forward_flops(model, length, segments).values()) + ENTRY * entries


def choose(
    lengths: Sequence[np.ndarray], weights: Sequence[float], model: ModelConfig
) -> SegmentCount:
    """The number of segments with which a step sees the most targets a second.

    Args:
      lengths: tokens of the documents of each text, end pieces included.
      weights: shares of the rows of each text.
      model: whose rows have `context_length` - 1 inputs.
    """
    length = model.context_length - 1
    inputs = [np.maximum(np.asarray(one, np.int64) - 1, 0) for one in lengths]
    counts = [np.bincount(one % length, minlength=length) for one in inputs]

    def fill(segments: int) -> float:
        """Mean over the rows of all texts."""
        total = 0.0
        for weight, one, remainders in zip(weights, inputs, counts, strict=True):
            shapes = fit(remainders, length, segments)
            rows = int((one // length).sum()) + sum(shape.count for shape in shapes)
            total += weight * int(one.sum()) / max(rows * length, 1)
        return total

    fills: list[float] = []
    rates: list[float] = []
    for segments in range(1, MOST + 1):
        cost = row_cost(model, segments)
        if rates and 1 / cost <= max(rates):
            break  # nor would full rows, here or with more segments
        fills.append(fill(segments))
        rates.append(fills[-1] / cost)
    k = next(k for k, rate in enumerate(rates) if rate >= NEAR * max(rates))
    return SegmentCount(k + 1, fills[k], rates[k] / rates[0] if rates[0] else 1.0)


def settled(
    config: ExperimentConfig, parts: Sequence[Part], log: Callable[[str], None]
) -> ExperimentConfig:
    """The config with `Data.max_segments` chosen for the training documents of `parts`, and said in
    a line, where the packing needs it and it is open; else the config.
    """
    if config.data.packing != "packed" or config.data.max_segments is not None:
        return config
    lengths, weights = [part.train.lengths for part in parts], [part.weight for part in parts]
    chosen = choose(lengths, weights, config.model)
    log(f"{chosen} (estimated)")
    data = dataclasses.replace(config.data, max_segments=chosen.max_segments)
    return dataclasses.replace(config, data=data)
