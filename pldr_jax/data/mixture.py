"""What a run trains on: a text, prepared shards, or a weighted mixture of several of them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable

from pldr_jax.config import ConfigError, DataConfig, ExperimentConfig
from pldr_jax.data.pipeline import TrainIterator, ValidationRows, train_iterator, validation_rows
from pldr_jax.data.rows import Rows, SegmentRows, make_rows
from pldr_jax.data.shards.cached import cached_text
from pldr_jax.data.shards.prepared import (
    Manifest,
    ShardedTokens,
    is_prepared,
    open_tokens,
    read_prepared,
)
from pldr_jax.data.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class WeightedText:
    """One text of a mixture; `weight` is its share of the rows, the shares add up to 1."""

    name: str
    weight: float
    train: ShardedTokens
    validation: ShardedTokens


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Tokenizer and texts of a run.

    Attributes:
      digest: of the tokens of all texts, both splits, and of their weights.
      chat_template: of the conversations among them; None where there are none.
    """

    tokenizer: Tokenizer
    texts: tuple[WeightedText, ...]
    digest: str
    chat_template: str | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the texts."""
        return tuple(text.weight for text in self.texts)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of held-out text a token, the texts by their weights."""
        return sum(text.weight * text.validation.bytes_per_token for text in self.texts)

    def rows(self, split: str, context_length: int, config: DataConfig) -> list[Rows]:
        """Rows of every text; split is 'train' or 'validation'.

        Raises:
          ConfigError: a packing that cuts conversations.
        """
        if self.chat_template is not None and config.packing == "concat":
            config.fail("packing", "would cut conversations; take 'document' or 'packed'")
        return [make_rows(getattr(text, split), context_length, config) for text in self.texts]

    def cut_conversations(self, config: ExperimentConfig) -> str | None:
        """A line on the training conversations that are too long for a row; None without any."""
        cut = dropped = 0
        for rows in self.rows("train", config.model.context_length, config.data):
            if isinstance(rows, SegmentRows):
                cut, dropped = cut + rows.n_cut, dropped + rows.n_dropped
        if not cut + dropped:
            return None
        return (
            f"Model.context_length = {config.model.context_length}: of {cut:,} longer "
            f"conversations only the first tokens are trained on, and {dropped:,} are left out, "
            "whose answer would begin behind them"
        )

    def train_batches(
        self, config: ExperimentConfig, process: tuple[int, int] = (0, 1)
    ) -> TrainIterator:
        """Shuffled batches without end, or those of `Data.epochs` or `Data.order`, as
        `train_iterator` makes them.

        Args:
          process: which part of each batch this process takes, of how many.
        """
        return train_iterator(
            self.rows("train", config.model.context_length, config.data),
            config.data.batch_size,
            config.data.seed,
            process,
            weights=self.weights,
            epochs=config.data.epochs,
            digest=self.digest,
            workers=config.data.workers,
            order=config.data.order,
        )

    def held_out_rows(self, config: ExperimentConfig) -> ValidationRows:
        """The rows that a run evaluates, and those for the G_LM of another row."""
        rows = self.rows("validation", config.model.context_length, config.data)
        return validation_rows(rows, config.training.eval_rows, weights=self.weights)


def open_training_text(
    config: DataConfig, vocab_size: int, log: Callable[[str], None] = print
) -> TrainingText:
    """The text of `Data.mixture`, or of `Data.source`.

    Args:
      vocab_size: Model.vocab_size; the tokenizer must have as many pieces.

    Raises:
      ConfigError: whatever the user can put right.
    """
    field = "Data.mixture" if config.mixture else "Data.source"
    paths = config.mixture or (config.source,)
    raw = not config.mixture and not is_prepared(config.source)
    manifests = [cached_text(config, vocab_size, log)] if raw else []
    manifests = manifests or [read_prepared(path, field) for path in paths]
    for path, manifest in zip(paths, manifests, strict=True):
        _check(f"{field} = {path!r}", manifest, manifests[0], vocab_size)
    tokenizer = manifests[0].tokenizer
    if config.tokenizer and Tokenizer.load(config.tokenizer).digest != tokenizer.digest:
        config.fail("tokenizer", "is not the one the shards were made with; leave it at None")
    if config.chat_template is not None and not raw:
        config.fail("chat_template", "prepared conversations have theirs; leave it at None")
    trains = [open_tokens(manifest, "train") for manifest in manifests]
    sizes = config.mixture_weights or tuple(float(train.n_tokens) for train in trains)
    weights = tuple(size / sum(sizes) for size in sizes)
    key = [[manifest.digest("train", "validation") for manifest in manifests], weights]
    texts = tuple(
        WeightedText(path, weight, train, open_tokens(manifest, "validation"))
        for path, weight, train, manifest in zip(paths, weights, trains, manifests, strict=True)
    )
    for text in () if raw else texts:
        log(
            f"{text.name}: {text.weight:.1%} of the rows; {text.train.n_documents:,} documents, "
            f"{text.train.n_tokens:,} tokens, and {text.validation.n_tokens:,} held out"
        )
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    templates = {manifest.chat_template for manifest in manifests} - {None}
    if len(templates) > 1:
        config.fail("mixture", "its folders have several chat templates; prepare them with one")
    return TrainingText(tokenizer, texts, digest, *templates)


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
    if manifest.held_out_rule != first.held_out_rule:
        raise ConfigError(
            f"{where}: holds out other documents than {first.folder} (seed, validation_fraction "
            f"and test_fraction {manifest.held_out_rule}, there {first.held_out_rule}), so that "
            "one could train on what the other holds out; prepare it anew with those"
        )
    for split in ("train", "validation"):
        if not manifest.count(split, "n_tokens"):
            raise ConfigError(
                f"{where}: has no {split} documents; prepare it anew with another "
                "--validation_fraction"
            )
