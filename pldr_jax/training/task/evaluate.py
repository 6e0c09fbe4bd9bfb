"""Evaluation of a task on held-out texts: loss, accuracy, F1, exact match."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ExperimentConfig
from pldr_jax.data.labelled.examples import Example
from pldr_jax.data.rows import PAD_ID, blank_rows
from pldr_jax.model.decoder import Params
from pldr_jax.partition import batch_sharding
from pldr_jax.training.losses import TokenLoss
from pldr_jax.training.rows import forward_rows
from pldr_jax.training.task.data import HeldOutExamples
from pldr_jax.training.task.metrics import accuracy, answer_scores, entity_f1, macro_f1
from pldr_jax.training.vocabulary_loss import batch_loss

LONGEST_ANSWER = 64
"""Tokens of an answer at most."""


class TaskEvaluator:
    """Evaluates parameters on fixed held-out texts; as `Evaluator`, for a task."""

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, held_out: HeldOutExamples, _: float = 1.0
    ) -> None:
        self._config, self._held_out = config, held_out
        self._at_once = config.data.batch_size // config.training.grad_accumulation
        whole = NamedSharding(mesh, PartitionSpec())
        shape = (self._at_once, *held_out.rows_BC.shape[1:])
        self._sharding = batch_sharding(mesh, shape)
        self._score: Callable[..., Any] = jax.jit(self._scored, out_shardings=whole)

    def __call__(self, params: Params, g_lm: jax.Array | None = None) -> dict[str, float]:
        """The metrics, named `eval/...`."""
        rows, total, logits = self._held_out.rows_BC, [], []
        for start in range(0, len(rows), self._at_once):
            some = rows[start : start + self._at_once]
            padded = blank_rows(self._at_once, rows.shape[1:])
            padded[: len(some)] = some
            loss, made = jax.device_get(
                self._score(params, jax.device_put(padded, self._sharding), g_lm)
            )
            total.append((float(loss.loss_sum), float(loss.count)))
            logits += list(made[: len(some)])
        loss_sum, count = np.sum(total, axis=0)
        results = self._measure(self._held_out.examples, logits)
        measured = {"loss": loss_sum / max(count, 1), **results}
        return {f"eval/{name}": float(value) for name, value in measured.items()}

    def lower(self, params: Params, g_lm: jax.Array | None = None) -> Any:
        """The evaluation of one microbatch, lowered; for what it would need."""
        shape = (self._at_once, *self._held_out.rows_BC.shape[1:])
        rows = jax.ShapeDtypeStruct(shape, "int32", sharding=self._sharding)
        return self._score.lower(params, rows, g_lm)  # type: ignore[attr-defined]

    def _scored(
        self, params: Params, rows: jax.Array, g_lm: jax.Array | None
    ) -> tuple[TokenLoss, jax.Array]:
        made = forward_rows(self._config.model, params, rows, g_lm=g_lm)
        loss = batch_loss(self._config, params, made.outputs, made.targets_BT)
        return loss, made.outputs.logits

    def _measure(self, examples: Any, logits: list[np.ndarray]) -> dict[str, float]:
        if self._config.model.task == "question":
            scores = [
                answer_scores(answer_of(e, x), [text for text, _ in e.line.label])
                for e, x in zip(examples, logits, strict=True)
            ]
            exact, f1 = np.mean(scores, axis=0)
            return {"exact_match": exact, "f1": f1}
        predicted, expected, labels = [], [], self._config.task.labels
        for example, made in zip(examples, logits, strict=True):
            places = np.flatnonzero(example.targets != PAD_ID)
            predicted.append([labels[i] for i in made[places].argmax(-1)])
            expected.append([labels[i] for i in example.targets[places]])
        one, other = sum(predicted, []), sum(expected, [])
        marked = any(label.startswith(("B-", "I-")) for label in labels)
        spans = self._config.model.task == "token" and marked
        f1 = entity_f1(predicted, expected) if spans else macro_f1(one, other)
        return {"accuracy": accuracy(one, other), "f1": f1}


def answer_of(example: Example, logits_T2: np.ndarray) -> str:
    """The text between the most probable start and end, which lie in the context and in order."""
    assert example.spans_T2 is not None
    places = np.flatnonzero(example.spans_T2[:, 0] >= 0)
    start_T, end_T = logits_T2[places].T
    sums = start_T[:, None] + end_T[None, :]
    ordered = np.triu(np.ones_like(sums, bool)) & ~np.triu(np.ones_like(sums, bool), LONGEST_ANSWER)
    first, last = np.unravel_index(np.where(ordered, sums, -np.inf).argmax(), sums.shape)
    start, stop = example.spans_T2[places[first], 0], example.spans_T2[places[last], 1]
    return example.line.texts[1].encode()[start:stop].decode(errors="replace").strip()
