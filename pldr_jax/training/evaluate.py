"""Evaluation on held-out rows: loss, DAG losses, the causal gap and the order parameter.

Through G_LM a position sees its future, so the ordinary loss of a model whose G_LM depends on its
input is too good to be true. Two numbers tell: the loss with G_LM frozen from another sequence,
from which nothing can leak (`loss_frozen_g`, and `causal_gap`, that minus the ordinary loss), and
how far the deductive outputs of two sequences are apart (the order parameter of arXiv 2603.23539).
A third can be asked for: the loss of the second half of each row with the G_LM of its first half
(`loss_prefix_g`, and `prefix_gap`, that minus the loss of the second half with the G_LM of it all).
That is what a prompt as long gives its continuation. Where `Loss.g_from = 'prompt'`, the ordinary
loss has the G_LM of the prompts, and its gap tells of nothing else.
The audits of `pldr_jax/model/audits.py:quick_audits` are of the first two rows.

Memory is that of a microbatch, whatever the number of rows: logits are made in the chunks of
training, and deductive outputs are reduced to sums on the device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.pipeline import ValidationRows
from pldr_jax.data.rows import blank_rows
from pldr_jax.model.audits import quick_audits
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import g_lm_shape
from pldr_jax.partition import batch_sharding
from pldr_jax.training.causal import half_lengths, prefix_lengths
from pldr_jax.training.laws.targets import at_chosen_targets
from pldr_jax.training.losses import TokenLoss, dag_losses
from pldr_jax.training.order_parameter import DeductiveStatistics, pair_sums
from pldr_jax.training.rows import RowOutputs, first_documents, forward_rows
from pldr_jax.training.vocabulary_loss import batch_loss

_NAMES = ("A", "A_LM", "A_P", "G_LM")


class Carry(NamedTuple):
    """The last sequence counted before a microbatch, which makes a pair with the first one in it.

    Attributes:
      last: x [L,N,H,J] of each deductive output.
      exists: whether there was one.
    """

    last: dict[str, jax.Array]
    exists: jax.Array


class Scores(NamedTuple):
    """What a microbatch comes to; all small.

    Attributes:
      tokens: with the G_LM of each row ("own") and with the frozen one ("frozen"); of the last
        target of each row alone ("last"), where `Loss.targets` is one a row.
      dag: mean DAG losses of the counted sequences.
      sums: of each deductive output, `pair_sums`.
      sequences, pairs: how many were counted.
    """

    tokens: dict[str, TokenLoss]
    dag: dict[str, jax.Array]
    sums: dict[str, jax.Array]
    sequences: jax.Array
    pairs: jax.Array


class Evaluator:
    """Evaluates parameters on fixed held-out rows.

    A "sequence" of the statistics is a row, or a segment of one. As many rows are counted in them
    as make whole batches.

    Args:
      config: of the run; the held-out rows have its packing.
      mesh: the rows' batch axis is split over it.
      held_out: rows that are scored, and calibration rows; G_LM is frozen from the first of these.
      bytes_per_token: of the held-out text, for bits per byte.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        mesh: Mesh,
        held_out: ValidationRows,
        bytes_per_token: float,
    ) -> None:
        # Scanned layers: a run evaluates now and then, and compiles them in a fraction of the time.
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, unroll=False))
        self._config, self._rows, self._bytes_per_token = config, held_out.rows_BC, bytes_per_token
        self._learned = config.model.g_source == "learned"
        self._prefix_g = config.training.eval_prefix_g and self._learned
        loss = dataclasses.replace(config.loss, targets="last")
        self._last = None  # the config that scores the last target of a row, where training may
        if config.loss.targets != "all":
            self._last = dataclasses.replace(config, loss=loss)
        self._calibration = held_out.calibration_BC[:1]
        self._batch_size = min(config.data.batch_size, len(self._rows))
        at_once = config.data.batch_size // config.training.grad_accumulation
        self._at_once = min(at_once, self._batch_size)
        self._sharding = batch_sharding(mesh, (self._at_once, *self._rows.shape[1:]))
        # Whole on every device, so that each process can read all of it.
        self._whole = whole = NamedSharding(mesh, PartitionSpec())
        self._score: Any = jax.jit(self._score_rows, out_shardings=whole)
        self._score_halves: Callable[..., Any] = jax.jit(self._second_halves, out_shardings=whole)
        self._calibrate: Callable[..., Any] = jax.jit(self._calibrated_g_lm, out_shardings=whole)
        self._audited = first_documents(self._rows[[0, min(1, len(self._rows) - 1)]])
        # Two rows: on a CPU compiling takes longer than all calls, half as long without optimising.
        options = {"xla_backend_optimization_level": 0}
        self._audit: Callable[..., Any] = jax.jit(
            functools.partial(quick_audits, config.model),
            out_shardings=whole,
            compiler_options=options if jax.default_backend() == "cpu" else None,
        )

    def __call__(self, params: Params, g_lm: jax.Array | None = None) -> dict[str, float]:
        """The metrics, named `eval/...`. With a predefined G_LM nothing can leak: no gap, no order
        parameter.
        """
        frozen = self._calibrate(params, self._calibration) if self._learned else None
        carry = jax.device_put(self._nothing(), self._whole)
        scores, halves = [], []
        for rows, counted_B in self._microbatches():
            score, carry = self._score(params, rows, counted_B, g_lm, frozen, carry)
            scores.append(score)
            if self._prefix_g:
                halves.append(self._score_halves(params, rows))
        metrics = self._summary(jax.device_get(scores))
        if halves:
            before, whole = (_mean(part) for part in zip(*halves, strict=True))
            metrics |= {"eval/loss_prefix_g": before, "eval/prefix_gap": before - whole}
        if self._learned:
            audits = jax.device_get(self._audit(params, *self._audited))
            metrics |= {f"eval/{name}": float(value) for name, value in audits.items()}
        return metrics

    def lower(self, params: Params, g_lm: Any) -> Any:
        """The program of a microbatch, lowered for abstract parameters and G_LM."""

        def whole(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._whole)

        shape = (self._at_once, *self._rows.shape[1:])
        rows = jax.ShapeDtypeStruct(shape, self._rows.dtype, sharding=self._sharding)
        frozen = whole(g_lm_shape(self._config.model), np.float32) if self._learned else None
        carry = jax.tree.map(lambda x: whole(x.shape, x.dtype), self._nothing())
        counted_B = whole((self._at_once,), bool)
        return self._score.lower(params, rows, counted_B, g_lm, frozen, carry)

    def _nothing(self) -> Any:
        """What the first microbatch goes on from, in NumPy."""
        shape = g_lm_shape(self._config.model)
        zero: Any = np.zeros((shape[0], *shape[2:]), np.float32)
        exists: Any = np.zeros((), bool)
        return Carry(dict.fromkeys(_NAMES, zero) if self._learned else {}, exists)

    def _microbatches(self) -> Iterator[tuple[jax.Array, np.ndarray]]:
        """Rows, laid out on the mesh, and which of them are counted in the statistics. A short last
        microbatch is filled up with padding, whose targets do not count.
        """
        counted = len(self._rows) // self._batch_size * self._batch_size
        for start in range(0, len(self._rows), self._at_once):
            rows = self._rows[start : start + self._at_once]
            padded = blank_rows(self._at_once, rows.shape[1:])
            padded[: len(rows)] = rows
            counted_B = np.arange(start, start + self._at_once) < counted
            yield jax.device_put(padded, self._sharding), counted_B

    def _score_rows(
        self,
        params: Params,
        rows_BC: jax.Array,
        counted_B: jax.Array,
        g_lm: jax.Array | None,
        frozen: jax.Array | None,
        carry: Carry,
    ) -> tuple[Scores, Carry]:
        own = self._forward(params, rows_BC, g_lm)
        tokens = {"own": self._loss(params, own)}
        if self._last is not None:
            outputs, targets_B1 = at_chosen_targets(self._last, params, own.outputs, own.targets_BT)
            tokens["last"] = batch_loss(self._last, params, outputs, targets_B1)
        if frozen is None:
            none = jnp.zeros((), jnp.int32)
            return Scores(tokens, {}, {}, none, none), carry
        tokens["frozen"] = self._loss(params, self._forward(params, rows_BC, frozen))
        deductive = own.outputs.deductive
        counted_BK = jnp.broadcast_to(
            counted_B[:, None], (len(counted_B), self._config.data.segments_per_row)
        )
        if own.real_B is not None:
            counted_BK &= own.real_B.reshape(counted_BK.shape)
        sums, last, pairs = {}, {}, jnp.zeros((), jnp.int32)
        for name, x_LBNHJ in deductive.items():
            sums[name], pairs, last[name] = pair_sums(
                x_LBNHJ, counted_BK, carry.last[name], carry.exists
            )
        dag = dag_losses(deductive, counted_BK.reshape(-1))
        score = Scores(tokens, dag, sums, counted_BK.sum(), pairs)
        return score, Carry(last, carry.exists | counted_BK.any())

    def _second_halves(self, params: Params, rows_BC: jax.Array) -> tuple[TokenLoss, TokenLoss]:
        """Of the targets that the first half of the row does not hold: the loss with the G_LM of
        that half, and with that of the whole row.
        """
        half_B = half_lengths(rows_BC)
        before = forward_rows(self._config.model, params, rows_BC, g_length_B=half_B)
        whole = self._forward(params, rows_BC, None)._replace(targets_BT=before.targets_BT)
        return self._loss(params, before), self._loss(params, whole)

    def _forward(self, params: Params, rows_BC: jax.Array, g_lm: jax.Array | None) -> RowOutputs:
        config, lengths = self._config, None
        if config.loss.g_from == "prompt" and g_lm is None:
            lengths = prefix_lengths(config, rows_BC, 0)
        segments = config.data.segments_per_row
        return forward_rows(config.model, params, rows_BC, segments, g_lm, lengths)

    def _loss(self, params: Params, rows: RowOutputs) -> TokenLoss:
        return batch_loss(self._config, params, rows.outputs, rows.targets_BT)

    def _calibrated_g_lm(self, params: Params, rows_BC: jax.Array) -> jax.Array:
        g_lm = self._forward(params, rows_BC, None).outputs.deductive.G_LM
        assert g_lm is not None
        return g_lm[:, :1]

    def _summary(self, scores: Sequence[Scores]) -> dict[str, float]:
        own = [score.tokens["own"] for score in scores]
        loss = _mean(own)
        metrics = {
            "eval/loss": loss,
            "eval/accuracy": _mean(own, "correct"),
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": loss / math.log(2) / self._bytes_per_token,
        }
        if self._last is not None:
            metrics["eval/loss_last"] = _mean([score.tokens["last"] for score in scores])
        if not self._learned:
            return metrics
        frozen_loss = _mean([score.tokens["frozen"] for score in scores])
        metrics |= {"eval/loss_frozen_g": frozen_loss, "eval/causal_gap": frozen_loss - loss}
        sequences = np.asarray([score.sequences for score in scores], np.float64)
        # The mean of each batch, then of the batches.
        starts = np.arange(len(scores)) * self._at_once // self._batch_size
        in_batch = np.stack(
            [starts == batch for batch in range(len(self._rows) // self._batch_size)]
        )
        for name in scores[0].dag:
            losses = sequences * np.asarray([score.dag[name] for score in scores], np.float64)
            means = (in_batch @ losses) / np.maximum(in_batch @ sequences, 1)
            metrics[f"eval/dag_loss/{name}"] = float(means.mean())
        size = math.prod(g_lm_shape(self._config.model)[2:])
        for name in scores[0].sums:
            statistics = DeductiveStatistics()
            for score in scores:
                statistics.add_sums(
                    np.asarray(score.sums[name]), int(score.sequences), int(score.pairs), size
                )
            metrics |= statistics.results(name)
        return metrics


def _mean(parts: Sequence[TokenLoss], field: str = "loss_sum") -> float:
    """A field of the parts over all targets that were scored; by default nats a token."""
    total = sum(float(getattr(part, field)) for part in parts)
    return total / max(sum(float(part.count) for part in parts), 1)
