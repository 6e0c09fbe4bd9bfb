"""A sample of any input to train a tokenizer on, and the measure of one on held-out text."""

import collections
import dataclasses
import random
from collections.abc import Sequence

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.units import UnitSettings, documents, split_of
from pldr_jax.data.text.inputs import Unit
from pldr_jax.data.text.tokenizer import TRAINING_BLOCK, Tokenizer

_LEAST_SHARE = 1 << 18
"""Bytes taken from a unit at least, so that a sample is not all beginnings."""
_LONGEST = 512 * TRAINING_BLOCK
"""Characters taken from one document."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts to train on and held-out ones to measure on; `problems` counts what was left out."""

    training: list[str]
    held_out: list[str]
    problems: dict[str, int]


def take_sample(units: Sequence[Unit], settings: UnitSettings, sample_bytes: int) -> Sample:
    """About `sample_bytes` of training documents, and the held-out ones met on the way.

    Units are visited in an order that the seed gives, each for its share; held-out documents are
    those that a preparation with the same seed and shares holds out.

    Raises:
      ConfigError: no text to train on.
      DataError: a problem, where `settings.on_error` is "fail".
    """
    order = list(units)
    random.Random(settings.seed).shuffle(order)
    problems: collections.Counter[str] = collections.Counter()
    texts: dict[str, list[str]] = {"train": [], "held_out": []}
    taken = {"train": 0, "held_out": 0}
    share = max(sample_bytes // max(len(order), 1) + 1, _LEAST_SHARE)
    for unit in order:
        if taken["train"] >= sample_bytes:
            break
        end = min(taken["train"] + share, sample_bytes)
        for document in documents(unit, settings, problems):
            side = "train" if split_of(document.text, settings) == "train" else "held_out"
            text = document.text[:_LONGEST]
            if taken[side] < sample_bytes:
                texts[side].append(text)
                taken[side] += len(text.encode())
            if taken["train"] >= end:
                break
    if not texts["train"]:
        raise ConfigError("--input: holds no text to train a tokenizer on")
    return Sample(texts["train"], texts["held_out"], dict(problems))


@dataclasses.dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer makes of some texts.

    Attributes:
      n_bytes, n_tokens, n_documents: of the texts.
      byte_tokens: tokens that spell a byte of what has no piece.
      unknown_tokens: tokens of what could not even be spelled.
      exact_documents: those that come back from their ids as they were.
      used_pieces: different pieces that occur.
    """

    vocab_size: int
    n_documents: int
    n_bytes: int
    n_tokens: int
    byte_tokens: int
    unknown_tokens: int
    exact_documents: int
    used_pieces: int

    def lines(self) -> list[str]:
        """The report, one fact a line."""
        tokens = max(self.n_tokens, 1)
        return [
            f"vocabulary            {self.vocab_size:,} pieces, {self.used_pieces:,} of them used",
            f"held-out text         {self.n_bytes:,} bytes, {self.n_documents:,} documents",
            f"bytes per token       {self.n_bytes / tokens:.3f}",
            f"byte-fallback tokens  {self.byte_tokens / tokens:.4%}",
            f"unknown tokens        {self.unknown_tokens / tokens:.4%}",
            f"exact round trips     {self.exact_documents:,} of {self.n_documents:,} documents",
        ]


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenizerReport:
    """The report on texts, best on ones that the tokenizer was not trained on."""
    counts: collections.Counter[int] = collections.Counter()
    exact = 0
    for text in texts:
        ids = tokenizer.encode(text)
        counts.update(ids)
        exact += tokenizer.decode(ids) == text
    return TokenizerReport(
        tokenizer.vocab_size,
        len(texts),
        sum(len(text.encode()) for text in texts),
        counts.total(),
        sum(n for i, n in counts.items() if tokenizer.is_byte(i)),
        counts[tokenizer.unk_id],
        exact,
        len(counts),
    )
