"""Evaluation on held-out rows: loss, DAG losses, the causal gap and the order parameter.

Through G_LM a position sees its future, so the ordinary loss of a model whose G_LM depends on its
input is too good to be true. Two numbers tell: the loss with G_LM frozen from another sequence,
from which nothing can leak (`loss_frozen_g`, and `causal_gap`, that minus the ordinary loss), and
how far the deductive outputs of two sequences are apart (the order parameter of arXiv 2603.23539).
A third can be asked for: the loss of the second half of each row with the G_LM of its first half
(`loss_prefix_g`, and `prefix_gap`, that minus the loss of the second half with the G_LM of it all).
That is what a prompt as long gives its continuation.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Params
from pldr_jax.partition import batch_sharding
from pldr_jax.training.causal import half_lengths
from pldr_jax.training.losses import TokenLoss, dag_losses, token_loss
from pldr_jax.training.rows import RowOutputs, forward_rows


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
    does not grow with rows.
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

    def _add(self, x_LBNHJ: np.ndarray, differences_LBNHJ: np.ndarray) -> None:
        axes = (1, 2, 3, 4)
        sums = (
            x_LBNHJ.sum(axes),
            np.square(x_LBNHJ).sum(axes),
            np.square(differences_LBNHJ).sum(axes),
        )
        self._sums_L3 = self._sums_L3 + np.stack(sums, axis=-1)
        self._entries += x_LBNHJ[0].size
        self._pairs += differences_LBNHJ[0].size

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


class Evaluator:
    """Evaluates parameters on fixed held-out rows.

    Args:
      config: of the model.
      mesh: the rows' batch axis is split over it.
      rows_RC: int32 [R, C] held-out rows that are scored.
      calibration_RC: int32 [K, C] other held-out rows; G_LM is frozen from the first.
      batch_size: rows in one call.
      bytes_per_token: of the held-out text, for bits per byte.
      max_segments: of the rows, which have the packing that is trained on. The loss is over their
        targets; a "sequence" of the statistics is a row, or a segment of one, and G_LM is frozen
        from the first.
      prefix_g: also evaluate the second half of each row with the G_LM of its first.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        rows_RC: np.ndarray,
        calibration_RC: np.ndarray,
        batch_size: int,
        bytes_per_token: float,
        max_segments: int = 1,
        prefix_g: bool = False,
    ) -> None:
        self._config, self._max_segments = config, max_segments
        self._prefix_g = prefix_g and config.g_source == "learned"
        self._batch_size = min(batch_size, len(rows_RC))
        self._rows = rows_RC
        self._calibration = calibration_RC[:1]
        self._bytes_per_token = bytes_per_token
        self._rows_sharding = batch_sharding(mesh, (self._batch_size, *rows_RC.shape[1:]))
        # Whole on every device, so that each process can read all of it.
        whole = NamedSharding(mesh, PartitionSpec())
        self._score: Callable[..., Any] = jax.jit(self._score_rows, out_shardings=whole)
        self._score_halves: Callable[..., Any] = jax.jit(self._second_halves, out_shardings=whole)
        self._calibrate: Callable[..., Any] = jax.jit(self._calibrated_g_lm, out_shardings=whole)

    def _score_rows(
        self, params: Params, rows_BC: jax.Array, g_lm: jax.Array | None, frozen: jax.Array | None
    ) -> tuple[TokenLoss, TokenLoss | None, Any, Any, jax.Array | None]:
        own, targets_BT, real_B = self._forward(params, rows_BC, g_lm)
        scored = token_loss(own.logits, targets_BT)
        if frozen is None:
            return scored, None, {}, {}, None
        other = token_loss(self._forward(params, rows_BC, frozen).outputs.logits, targets_BT)
        tensors = dict(own.deductive.items())
        return scored, other, dag_losses(own.deductive, real_B), tensors, real_B

    def _second_halves(self, params: Params, rows_BC: jax.Array) -> tuple[TokenLoss, TokenLoss]:
        """Of the targets that the first half of the row does not hold: the loss with the G_LM of
        that half, and with that of the whole row.
        """
        half_B = half_lengths(rows_BC)
        before = forward_rows(self._config, params, rows_BC, g_length_B=half_B)
        whole = self._forward(params, rows_BC, None).outputs
        return (
            token_loss(before.outputs.logits, before.targets_BT),
            token_loss(whole.logits, before.targets_BT),
        )

    def _forward(self, params: Params, rows_BC: jax.Array, g_lm: jax.Array | None) -> RowOutputs:
        return forward_rows(self._config, params, rows_BC, self._max_segments, g_lm)

    def _calibrated_g_lm(self, params: Params, rows_BC: jax.Array) -> jax.Array:
        g_lm = self._forward(params, rows_BC, None).outputs.deductive.G_LM
        assert g_lm is not None
        return g_lm[:, :1]

    def __call__(self, params: Params, g_lm: jax.Array | None = None) -> dict[str, float]:
        """The metrics, named `eval/...`. With a predefined G_LM nothing can leak: no gap, no order
        parameter.
        """
        learned = self._config.g_source == "learned"
        frozen = self._calibrate(params, self._calibration) if learned else None
        own_parts, frozen_parts, dag_parts, half_parts = [], [], [], []
        statistics: dict[str, DeductiveStatistics] = {}
        for start in range(0, len(self._rows), self._batch_size):
            rows = self._rows[start : start + self._batch_size]
            # A short last batch is filled with padding rows, whose targets do not count.
            filled = np.zeros((self._batch_size, *rows.shape[1:]), np.int32)
            filled[: len(rows)] = rows
            placed = jax.device_put(filled, self._rows_sharding)
            own, other, dag, tensors, real = self._score(params, placed, g_lm, frozen)
            own_parts.append(own)
            if self._prefix_g:
                half_parts.append(self._score_halves(params, placed))
            if not learned:
                continue
            frozen_parts.append(other)
            if len(rows) == self._batch_size:
                dag_parts.append(dag)
                chosen = slice(None) if real is None else np.flatnonzero(jax.device_get(real))
                for name, tensor in tensors.items():
                    x_LBNHJ = jax.device_get(tensor)[:, chosen]
                    statistics.setdefault(name, DeductiveStatistics()).add(x_LBNHJ)
        metrics = self._summary(own_parts, frozen_parts, dag_parts, statistics)
        if half_parts:
            before, whole = (
                float(_add_up(list(part)).loss) for part in zip(*half_parts, strict=True)
            )
            metrics |= {"eval/loss_prefix_g": before, "eval/prefix_gap": before - whole}
        return metrics

    def _summary(
        self,
        own: list[TokenLoss],
        frozen: list[Any],
        dag: list[Any],
        statistics: dict[str, DeductiveStatistics],
    ) -> dict[str, float]:
        total = _add_up(own)
        loss = float(total.loss)
        metrics = {
            "eval/loss": loss,
            "eval/accuracy": float(total.accuracy),
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": loss / math.log(2) / self._bytes_per_token,
        }
        if frozen:
            frozen_loss = float(_add_up(frozen).loss)
            metrics |= {"eval/loss_frozen_g": frozen_loss, "eval/causal_gap": frozen_loss - loss}
        for name in dag[0] if dag else ():
            metrics[f"eval/dag_loss/{name}"] = float(np.mean([float(part[name]) for part in dag]))
        for name, sums in statistics.items():
            metrics |= sums.results(name)
        return metrics


def _add_up(parts: list[TokenLoss]) -> TokenLoss:
    host = jax.device_get(parts)
    return jax.tree.map(lambda *leaves: jnp.float32(sum(float(leaf) for leaf in leaves)), *host)
