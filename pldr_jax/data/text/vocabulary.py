"""A sample of any input to train a tokenizer on, and the measure of one on held-out text."""

import collections
import dataclasses
import random
from collections.abc import Sequence

from pldr_jax.config import ConfigError
from pldr_jax.data.shards.units import Problems, UnitSettings, documents_of, split_of
from pldr_jax.data.text.inputs import Unit
from pldr_jax.data.text.tokenizer import TRAINING_BLOCK, Tokenizer

_LEAST_SHARE = 1 << 18
"""Bytes taken from a unit at least, so that a sample is not all beginnings."""
_SPREAD = 16
"""A share is spread over as many times its bytes of a unit."""
_LONGEST = 512 * TRAINING_BLOCK
"""Characters taken from one held-out document."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Texts to train on and held-out ones to measure on, and what was left out."""

    training: list[str]
    held_out: list[str]
    problems: Problems


def take_sample(units: Sequence[Unit], settings: UnitSettings, sample_bytes: int) -> Sample:
    """About `sample_bytes` of training documents, and the held-out ones met on the way.

    Units are visited in an order that the seed gives. Each gives its share, in blocks that are
    spread evenly over its first part; held-out documents are those that a preparation with the same
    seed and shares holds out.

    Raises:
      ConfigError: no text to train on.
      DataError: a problem, where `settings.on_error` is "fail".
    """
    sample = Sample([], [], Problems())
    order = list(units)
    random.Random(settings.seed).shuffle(order)
    share = max(sample_bytes // max(len(order), 1) + 1, _LEAST_SHARE)
    taken = 0
    for unit in order:
        if taken >= sample_bytes:
            break
        taken += _sample_unit(unit, settings, min(share, sample_bytes - taken), sample)
    if not sample.training:
        raise ConfigError("Data.source: holds no text to train a tokenizer on")
    return sample


def _sample_unit(unit: Unit, settings: UnitSettings, wanted: int, sample: Sample) -> int:
    """Adds about `wanted` bytes of a unit to a sample; gives how many."""
    held_out = settings.validation_fraction + settings.test_fraction
    spread_over = min(unit.size * (1 - held_out), _SPREAD * wanted)
    density = min(1.0, wanted / max(spread_over, 1))
    taken = owed = n_held_out = 0.0
    for document in documents_of(unit, settings, sample.problems):
        if split_of(document.text, settings) != "train":
            if n_held_out < wanted:
                sample.held_out.append(document.text[:_LONGEST])
                n_held_out += len(sample.held_out[-1].encode())
            continue
        for start in range(0, len(document.text), TRAINING_BLOCK):
            block = document.text[start : start + TRAINING_BLOCK]
            owed += density * len(block)
            if owed > 0:
                owed -= len(block)
                sample.training.append(block)
                taken += len(block.encode())
                if taken >= wanted:
                    return int(taken)
    return int(taken)


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


def measure_tokenizer(tokenizer: Tokenizer, texts: Sequence[str]) -> TokenizerReport:
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
