"""Labelled texts as tokens and targets, and as rows that training takes."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.data.labelled.lines import Line
from pldr_jax.data.rows import INPUTS, PAD_ID, SEGMENTS, TARGETS, Rows
from pldr_jax.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """A labelled text.

    Attributes:
      tokens: [T].
      targets: [T], the labels that are predicted, `PAD_ID` where none is; of a question, first the
        token that the answer starts at and that it ends at.
      line: that it was made of.
      spans_T2: of a question, first byte of each token in the context and the first after it, -1
        for what is none of the context.
      cut: whether the text was too long.
    """

    tokens: np.ndarray
    targets: np.ndarray
    line: Line
    spans_T2: np.ndarray | None = None
    cut: bool = False


def make_examples(
    model: ModelConfig, labels: Sequence[str], tokenizer: Tokenizer, lines: Sequence[Line]
) -> list[Example]:
    """Tokens and targets of every line. A text that is longer than the model's context keeps its
    beginning; a label or an answer beyond it is lost.

    Args:
      labels: their names; none of a question.

    Raises:
      ConfigError: a label that is none of `labels`, or a text without a token, by file and line.
    """
    numbers = {label: i for i, label in enumerate(labels)}
    make = {"sequence": _sequence, "token": _token, "question": _question}[str(model.task)]
    return [make(model, numbers, tokenizer, line) for line in lines]


def joined(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, with the separator before the second."""
    parts = tokenizer.encode_arrays(list(texts))
    separator = np.asarray([tokenizer.separator_id], np.int32)
    return parts if len(parts) == 1 else [np.concatenate([parts[0], separator]), parts[1]]


def _sequence(
    model: ModelConfig, numbers: dict[str, int], tokenizer: Tokenizer, line: Line
) -> Example:
    tokens = np.concatenate(joined(tokenizer, line.texts))
    kept = _kept(model, tokens, line)
    # A token that is padding by its id is never pooled.
    while len(kept) > 1 and kept[-1] == model.pad_id:
        kept = kept[:-1]
    targets = np.full(len(kept), PAD_ID, np.int32)
    targets[-1] = _number(numbers, line.label, line)
    return Example(kept, targets, line, cut=len(tokens) > model.context_length)


def _token(
    model: ModelConfig, numbers: dict[str, int], tokenizer: Tokenizer, line: Line
) -> Example:
    """The first token of a word has its label."""
    text = " ".join(line.texts)
    tokens, spans_T2 = tokenizer.encode_spans(text)
    content = text.encode()
    starts = np.cumsum([0, *(len(word.encode()) + 1 for word in line.texts)])[:-1]
    targets, labelled = np.full(len(tokens), PAD_ID, np.int32), -1
    for place, (start, stop) in enumerate(spans_T2):
        blank = len(content[start:stop]) - len(content[start:stop].lstrip())
        word = int(np.searchsorted(starts, start + blank, side="right")) - 1
        if start + blank < stop and word > labelled:
            labelled = word
            if line.label[word] is not None:
                targets[place] = _number(numbers, line.label[word], line)
    kept = _kept(model, tokens, line)
    cut = len(tokens) > len(kept)
    return Example(kept, targets[: len(kept)], line, cut=cut)


def _question(
    model: ModelConfig, numbers: dict[str, int], tokenizer: Tokenizer, line: Line
) -> Example:
    question, context = line.texts
    before = joined(tokenizer, (question, ""))[0]
    tokens, spans_T2 = tokenizer.encode_spans(context)
    if len(before) + 1 > model.context_length:
        raise ConfigError(
            f"{line.where}: the question alone has {len(before)} tokens, the model's context is "
            f"{model.context_length}"
        )
    everything = np.concatenate([before, tokens])
    kept = _kept(model, everything, line)
    spans_T2 = np.concatenate([np.full((len(before), 2), -1), spans_T2])[: len(kept)]
    text, start = line.label[0]
    first = len(context[:start].encode())
    last = first + len(text.encode())
    inside = np.flatnonzero((spans_T2[:, 1] > first) & (spans_T2[:, 0] < last))
    targets = np.full(len(kept), PAD_ID, np.int32)
    if len(inside) and spans_T2[inside[-1], 1] >= last:  # else it was cut
        targets[:2] = inside[0], inside[-1]
    return Example(kept, targets, line, spans_T2, len(everything) > len(kept))


def _kept(model: ModelConfig, tokens: np.ndarray, line: Line) -> np.ndarray:
    if not len(tokens):
        raise ConfigError(f"{line.where}: the tokenizer makes no token of its text")
    return tokens[: model.context_length]


def _number(numbers: dict[str, int], label: str, line: Line) -> int:
    if label in numbers:
        return numbers[label]
    # Data sets that name labels by number, and a checkpoint that names them by words.
    if label.isdecimal() and int(label) < len(numbers) and not any(map(str.isdecimal, numbers)):
        return int(label)
    raise ConfigError(f"{line.where}: the label {label!r} is none of {', '.join(numbers)}")


class ExampleRows(Rows):
    """Rows [3,T] of examples, one each: inputs, targets, and 1 for a token and 0 for padding.

    Args:
      width: T; at least the longest example, None is that.
    """

    def __init__(self, examples: Sequence[Example], width: int | None = None) -> None:
        self._examples = examples
        longest = max(len(example.tokens) for example in examples)
        self.row_shape = (3, max(width or longest, 2))
        self.max_segments = 1
        self.n_targets = sum(int((e.targets != PAD_ID).sum()) for e in examples)

    def __len__(self) -> int:
        return len(self._examples)

    def write(self, k: int, row: np.ndarray) -> None:
        """Writes row k over zeros."""
        example = self._examples[k]
        length = len(example.tokens)
        row[INPUTS, :length] = example.tokens
        row[TARGETS] = PAD_ID
        row[TARGETS, :length] = example.targets
        row[SEGMENTS, :length] = 1


def digest(lines: Sequence[Line]) -> str:
    """Of labelled texts, to know them again."""
    return hashlib.sha256(repr([line[:2] for line in lines]).encode()).hexdigest()
