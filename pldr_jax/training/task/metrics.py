"""Accuracy, F1 and exact match of predictions, as the field computes them."""

import collections
import re
import string
from collections.abc import Iterable, Sequence

import numpy as np


def accuracy(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Share of equal labels."""
    return float(np.mean([p == e for p, e in zip(predicted, expected, strict=True)]))


def macro_f1(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Mean over the labels that occur of their F1."""
    pairs = list(zip(predicted, expected, strict=True))
    scores = []
    for label in {*predicted, *expected}:
        right = sum(p == e == label for p, e in pairs)
        scores.append(_f1(right, predicted.count(label), expected.count(label)))
    return float(np.mean(scores))


def entities(labels: Sequence[str]) -> set[tuple[int, int, str]]:
    """Spans (first, after the last, kind) of labels B-kind and I-kind, as CoNLL's script reads
    them: I- begins a span where none of its kind goes on.
    """
    found, start, kind = set(), 0, ""
    for place, label in enumerate([*labels, "O"]):
        mark, _, name = label.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and name and not kind:
            start, kind = place, name
    return found


def entity_f1(predicted: Iterable[Sequence[str]], expected: Iterable[Sequence[str]]) -> float:
    """F1 of the spans of all texts together, each right where ends and kind are."""
    right = given = wanted = 0
    for one, other in zip(predicted, expected, strict=True):
        spans, true = entities(one), entities(other)
        right, given, wanted = right + len(spans & true), given + len(spans), wanted + len(true)
    return _f1(right, given, wanted)


def normalized_answer(text: str) -> list[str]:
    """Words of an answer, as SQuAD's script compares them: in small letters, without punctuation
    and articles.
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def answer_scores(predicted: str, expected: Sequence[str]) -> tuple[float, float]:
    """(Exact match, F1 of words) with the nearest of the true answers."""
    given, scores = normalized_answer(predicted), []
    for answer in expected:
        wanted = normalized_answer(answer)
        common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
        exact = float(given == wanted)
        scores.append((exact, _f1(common, len(given), len(wanted)) if given or wanted else exact))
    return max(exact for exact, _ in scores), max(f1 for _, f1 in scores)


def _f1(right: int, given: int, wanted: int) -> float:
    return 2 * right / (given + wanted) if given + wanted else 1.0
