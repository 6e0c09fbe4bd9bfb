"""How far the deductive outputs of different sequences are apart: the order parameter of arXiv
2603.23539.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a deductive output differs between sequences.

    Attributes:
      mean, std: over all entries of all sequences.
      rmse: between the two sequences of each pair.
    """

    mean: float
    std: float
    rmse: float

    @property
    def order_parameter(self) -> float:
        """The RMSE over the magnitude of the mean (arXiv 2603.23539)."""
        return self.rmse / abs(self.mean) if self.mean else math.inf

    @property
    def rmse_over_std(self) -> float:
        """The same over the standard deviation, which also holds where the mean is near zero."""
        return self.rmse / self.std if self.std else 0.0


class DeductiveStatistics:
    """Running sums of a deductive output over sequences, by layer, in float64 on the host: memory
    does not grow with their number.
    """

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._sums_L3: np.ndarray = np.zeros(())
        self._pairs, self._entries = 0, 0

    def add(self, x_LBNHJ: np.ndarray) -> None:
        """Adds the sequences of one batch; each makes a pair with the next one, also across
        batches.
        """
        x_LBNHJ = np.asarray(x_LBNHJ, np.float64)
        before = [] if self._last is None else [self._last]
        chain = np.concatenate([*before, x_LBNHJ], axis=1)
        self._last = x_LBNHJ[:, -1:]
        self._add(x_LBNHJ, np.diff(chain, axis=1))

    def add_pairs(self, x_LBNHJ: np.ndarray, y_LBNHJ: np.ndarray) -> None:
        """Adds pairs of sequences, x and y of each row."""
        x, y = np.asarray(x_LBNHJ, np.float64), np.asarray(y_LBNHJ, np.float64)
        self._add(np.concatenate([x, y], axis=1), x - y)

    def add_sums(self, sums_L3: np.ndarray, sequences: int, pairs: int, size: int) -> None:
        """Adds what `pair_sums` has made of so many sequences of `size` entries in a layer."""
        self._sums_L3 = self._sums_L3 + np.asarray(sums_L3, np.float64)
        self._entries += sequences * size
        self._pairs += pairs * size

    def _add(self, x_LBNHJ: np.ndarray, differences_LBNHJ: np.ndarray) -> None:
        axes = (1, 2, 3, 4)
        sums = (
            x_LBNHJ.sum(axes),
            np.square(x_LBNHJ).sum(axes),
            np.square(differences_LBNHJ).sum(axes),
        )
        size = math.prod(x_LBNHJ.shape[2:])
        self.add_sums(np.stack(sums, axis=-1), x_LBNHJ.shape[1], differences_LBNHJ.shape[1], size)

    def spread(self, layer: int | None = None) -> Spread:
        """Of one layer, or of all together."""
        layers = len(self._sums_L3) if layer is None else 1
        sums = self._sums_L3.sum(0) if layer is None else self._sums_L3[layer]
        entries, pairs = self._entries * layers, max(self._pairs * layers, 1)
        mean = float(sums[0]) / entries
        variance = float(sums[1]) / entries - mean * mean
        return Spread(mean, math.sqrt(max(variance, 0.0)), math.sqrt(float(sums[2]) / pairs))

    def results(self, name: str) -> dict[str, float]:
        """`order_parameter`, `rmse` and `rmse_over_std` of all layers."""
        spread = self.spread()
        return {
            f"eval/order_parameter/{name}": spread.order_parameter,
            f"eval/rmse/{name}": spread.rmse,
            f"eval/rmse_over_std/{name}": spread.rmse_over_std,
        }


def pair_sums(
    x_LBNHJ: jax.Array, counted_BK: jax.Array, last_LNHJ: jax.Array, exists: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the counted sequences of a microbatch, without moving any between devices but the
    last of each row.

    Args:
      x_LBNHJ: a deductive output; its batch axis holds K sequences of each of B rows.
      counted_BK: which of them count: the first ones of each of the first rows.
      last_LNHJ: the last sequence counted before; `exists` says whether there is one.

    Returns:
      Sums [L,3] of all entries, of their squares, and of the squared differences of each sequence
      and the next; the pairs among these; the last sequence [L,N,H,J].
    """
    rows, segments = counted_BK.shape
    layers, entries = x_LBNHJ.shape[0], x_LBNHJ.shape[2:]
    x = x_LBNHJ.astype(jnp.float32).reshape(layers, rows, segments, *entries)
    x = jnp.where(counted_BK[None, :, :, None, None, None], x, 0.0)
    counted_B = counted_BK[:, 0]

    def at_end(y: jax.Array, counted: jax.Array, axis: int) -> jax.Array:
        """The last counted entry along an axis of y, on every device that holds a part of it."""
        end = counted.sum(-1, keepdims=True) - 1
        place = jnp.arange(counted.shape[-1]) == end
        return jnp.where(place[(None, ..., None, None, None)], y, 0.0).sum(axis)

    def squares(y: jax.Array, counted: jax.Array) -> jax.Array:
        kept = jnp.where(counted[(None, ..., None, None, None)], jnp.square(y), 0.0)
        return kept.sum(tuple(range(1, y.ndim)))

    ends_LBNHJ = at_end(x, counted_BK, 2)
    before = jnp.concatenate([last_LNHJ[:, None], ends_LBNHJ[:, :-1]], axis=1)
    follows_B = counted_B & jnp.concatenate([exists[None], counted_B[:-1]])
    within_BK = counted_BK[:, 1:] & counted_BK[:, :-1]
    apart = squares(x[:, :, 1:] - x[:, :, :-1], within_BK) + squares(x[:, :, 0] - before, follows_B)
    sums = (x.sum((1, 2, 3, 4, 5)), squares(x, counted_BK), apart)
    last = jnp.where(counted_B.any(), at_end(ends_LBNHJ, counted_B, 1), last_LNHJ)
    return jnp.stack(sums, axis=-1), within_BK.sum() + follows_B.sum(), last
