"""The loss of every position of a row, under four G_LMs.

`full` is the ordinary forward pass: G_LM of the whole row, so that a position sees its future
through it. `prefix` cuts the row behind the position: the definition of next-token prediction.
`other` takes G_LM of another row, and `calibrated` one mean G_LM of rows that are not scored:
nothing of a row can leak through either.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pldr_jax.analysis.batches import quick_to_compile
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import full_step
from pldr_jax.model.decoder import Params, forward


def row_nats(
    config: ModelConfig, params: Params, rows_BC: jax.Array, g_lm_LBNHJ: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Cross-entropy of tokens[1:] given tokens[:-1], [B,T] nats with T = C - 1, and the G_LM
    [L,B,N,H,J] that was used; a pure function.

    Args:
      rows_BC: whole rows, no padding.
      g_lm_LBNHJ: to use instead of the row's own, one for all where B is 1.
    """
    outputs = forward(config, params, rows_BC[:, :-1], g_lm_LBNHJ)
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, rows_BC[:, 1:])
    return nats_BT, outputs.deductive.G_LM


def prefix_nats(
    config: ModelConfig, params: Params, row_C: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """Cross-entropy [B] of the token after each position of one row, from the row cut behind the
    position; a pure function.

    One shape serves every position: what is cut off stays in the row as padding, which the length
    keeps out of Q^T Q and the causal mask out of the rest.
    """
    inputs_BT = jnp.broadcast_to(row_C[:-1], (positions_B.shape[0], row_C.shape[0] - 1))
    logits_BV = full_step(config, params, inputs_BT, positions_B + 1, None)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BV, row_C[positions_B + 1])


def prefix_positions(length: int, stride: int) -> np.ndarray:
    """Every `stride`-th of `length` positions, from the middle of the first stride."""
    return np.arange(min(stride // 2, length - 1), length, stride, dtype=np.int32)


class JittedLosses(NamedTuple):
    """The pure functions above, compiled once a model config and shape."""

    row_nats: Callable[..., tuple[jax.Array, jax.Array]]
    prefix_nats: Callable[..., jax.Array]


@functools.lru_cache(maxsize=8)
def jitted_losses(config: ModelConfig) -> JittedLosses:
    """`row_nats` and `prefix_nats` of a model."""
    config = quick_to_compile(config)
    rows, prefix = (jax.jit(functools.partial(f, config)) for f in (row_nats, prefix_nats))
    return JittedLosses(rows, prefix)


class RowMeans:
    """Mean over rows of a value at each position, and the spread of the means of the rows."""

    def __init__(self) -> None:
        self._positions, self._rows = RunningStatistics(), RunningStatistics()

    def add(self, x_RT: np.ndarray) -> None:
        """Adds rows."""
        x = np.asarray(x_RT, np.float64)
        self._positions.add(x)
        self._rows.add(x.mean(1))

    @property
    def rows(self) -> int:
        """Added so far."""
        return self._rows.rows

    @property
    def by_position(self) -> np.ndarray:
        """Mean over rows [T]."""
        return self._positions.mean

    @property
    def mean(self) -> float:
        """Over rows and positions."""
        return float(self._rows.mean)

    @property
    def standard_error(self) -> float | None:
        """Of `mean`, rows being independent; None for a single row."""
        return self._rows.standard_error


@dataclasses.dataclass
class PositionLosses:
    """Losses of the rows so far.

    Attributes:
      losses: nats of `full`, `other`, `calibrated`, and at the prefix positions `prefix` and
        `full_at_prefix`.
      gaps: the same without `full`, minus `full` of the same tokens.
      differences: log-probability in the full row minus that after the prefix, of each token that
        was scored both ways, one array [P] a row.
    """

    losses: dict[str, RowMeans] = dataclasses.field(default_factory=dict)
    gaps: dict[str, RowMeans] = dataclasses.field(default_factory=dict)
    differences: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, nats: dict[str, np.ndarray]) -> None:
        """Adds rows [R,T] of each kind."""
        full = nats["full"].astype(np.float64)
        for name, x_RT in nats.items():
            self.losses.setdefault(name, RowMeans()).add(x_RT)
            if name != "full":
                self.gaps.setdefault(name, RowMeans()).add(x_RT.astype(np.float64) - full)

    def add_prefix(self, full_P: np.ndarray, prefix_P: np.ndarray) -> None:
        """Adds one row, scored both ways at the prefix positions."""
        difference_P = prefix_P.astype(np.float64) - full_P.astype(np.float64)
        self.losses.setdefault("full_at_prefix", RowMeans()).add(full_P[None])
        self.losses.setdefault("prefix", RowMeans()).add(prefix_P[None])
        self.gaps.setdefault("prefix", RowMeans()).add(difference_P[None])
        self.differences.append(difference_P)
