"""What a run trains on: a text, prepared shards, or a weighted mixture of several of them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data import corpus
from pldr_jax.data.rows import Rows, TokenStore, make_rows
from pldr_jax.data.shards.prepared import Manifest, ShardedTokens, is_prepared, read_manifest
from pldr_jax.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
    """One text of a mixture; `weight` is its share of the rows, the shares add up to 1."""

    name: str
    weight: float
    train: TokenStore
    validation: TokenStore


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Tokenizer and texts of a run.

    Attributes:
      digest: names prepared texts and their weights; None for a source that is not prepared.
    """

    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    digest: str | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts."""
        return tuple(part.weight for part in self.parts)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text a token, the parts by their weights."""
        return sum(part.weight * part.validation.bytes_per_token for part in self.parts)

    def rows(self, split: str, context_length: int, config: DataConfig) -> list[Rows]:
        """Rows of every part; split is 'train' or 'validation'."""
        return [make_rows(getattr(part, split), context_length, config) for part in self.parts]


def open_text(
    config: DataConfig, vocab_size: int, log: Callable[[str], None] = print
) -> TrainingText:
    """The text of `Data.mixture`, or of `Data.source`.

    vocab_size: Model.vocab_size; the tokenizer must have as many pieces. ConfigError for whatever
    the user can put right.
    """
    if not config.mixture and not is_prepared(config.source):
        text = corpus.prepare(config, vocab_size, log)
        return TrainingText(
            text.tokenizer, (Part(config.source, 1.0, text.train, text.validation),)
        )
    field = "Data.mixture" if config.mixture else "Data.source"
    paths = config.mixture or (config.source,)
    manifests = [read_manifest(path, field) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        _check(f"{field} = {path!r}", manifest, manifests[0], vocab_size)
    tokenizer = manifests[0].tokenizer
    if config.tokenizer and Tokenizer.load(config.tokenizer).digest != tokenizer.digest:
        config.fail("tokenizer", "is not the one the shards were made with; leave it at None")
    trains = [ShardedTokens(manifest, "train") for manifest in manifests]
    sizes = config.mixture_weights or tuple(float(train.n_tokens) for train in trains)
    weights = tuple(size / sum(sizes) for size in sizes)
    key = [[train.digest for train in trains], weights]
    parts = tuple(
        Part(path, weight, train, ShardedTokens(manifest, "validation"))
        for path, weight, train, manifest in zip(paths, weights, trains, manifests, strict=True)
    )
    for part in parts:
        log(
            f"{part.name}: {part.weight:.1%} of the rows; {part.train.n_documents:,} documents, "
            f"{part.train.n_tokens:,} tokens, and {part.validation.n_tokens:,} held out"
        )
    return TrainingText(tokenizer, parts, hashlib.sha256(json.dumps(key).encode()).hexdigest())


def _check(where: str, manifest: Manifest, first: Manifest, vocab_size: int) -> None:
    if manifest.vocab_size != vocab_size:
        raise ConfigError(
            f"Model.vocab_size = {vocab_size}: the shards of {where} have {manifest.vocab_size} "
            f"pieces; set Model.vocab_size = {manifest.vocab_size}"
        )
    if manifest.tokenizer_digest != first.tokenizer_digest:
        raise ConfigError(
            f"{where}: was made with another tokenizer than {first.folder}; prepare it anew"
        )
    for split in ("train", "validation"):
        if not manifest.count(split, "n_tokens"):
            raise ConfigError(
                f"{where}: has no {split} documents; prepare it anew with another "
                "--validation_fraction"
            )
