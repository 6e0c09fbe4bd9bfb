"""The group `Data` of the configuration."""

import dataclasses
from typing import Literal

from pldr_jax.config.fields import SEED_LIMIT, Validated, field


@dataclasses.dataclass(frozen=True)
class DataConfig(Validated):
    """Text, tokenizer and batches."""

    source: str = field(
        "stdlib",
        "'stdlib' (the interpreter's own sources), a file, folder or glob of text, JSONL, Parquet "
        "or Arrow, or a folder that pldr-data build has made",
        path=True,
    )
    mixture: tuple[str, ...] = field(
        (),
        "folders that pldr-data build has made, trained on together; takes source's place",
        path=True,
    )
    mixture_weights: tuple[float, ...] = field(
        (), "shares of the rows, one a folder of mixture; () is by their tokens", above=0
    )
    tokenizer: str | None = field(
        None,
        "SentencePiece model to load; None trains one with Model.vocab_size pieces on the text",
        path=True,
    )
    chat_template: str | None = field(
        None,
        "Jinja file with which conversations, JSON lines of messages, are written; None is the "
        "template beside the tokenizer, or the default one",
        path=True,
    )
    tokenizer_sample_bytes: int = field(
        1_000_000, "bytes of text that a new tokenizer is trained on", low=1000, high=2**40
    )
    validation_fraction: float = field(
        0.05,
        "share of the documents held out, chosen by a hash of their text; prepared text has its "
        "own",
        above=0,
        high=0.5,
    )
    packing: Literal["concat", "document", "packed"] = field(
        "concat",
        "what a row is: documents joined and cut, a document or a piece of one, or several of "
        "these side by side, each with its own G_LM",
    )
    max_segments: int | None = field(
        None,
        "documents in a row at most (packing = 'packed'); None is as many as make training "
        "fastest, by the lengths of the documents and the cost of a G_LM",
        low=1,
    )
    batch_size: int = field(16, "sequences in a step, over all devices", low=1)
    seed: int = field(0, "seed of the shuffle", low=0, high=SEED_LIMIT)
    order: str | None = field(
        None,
        "npy file with the numbers of rows in the order in which they are trained on, each at most "
        "once a pass; None is a shuffle by seed",
        path=True,
    )
    epochs: int | None = field(
        None,
        "passes over the text at most, more Training.steps are an error; None is any, but one with "
        "order",
        low=1,
    )
    workers: int = field(
        0, "processes that make batches ahead, in each process of the run; 0 is threads", low=0
    )
    cache_dir: str | None = field(
        None, "folder of tokenised text; None is the user's cache folder", path=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture_weights and len(self.mixture_weights) != len(self.mixture):
            self.fail("mixture_weights", f"must be one a folder of mixture, {len(self.mixture)}")
        if self.order is not None and self.mixture_weights:
            self.fail("mixture_weights", "Data.order says which rows are taken; leave one out")

    @property
    def segments_per_row(self) -> int:
        """K, the segments of a row that are kept apart; 1 unless packing is 'packed'.

        Raises:
          ConfigError: it is not chosen yet (`pldr_jax/data/segment_count.py`).
        """
        if self.packing != "packed":
            return 1
        if self.max_segments is None:
            self.fail("max_segments", "is chosen where a run has its text; give a number here")
        return self.max_segments

    @property
    def keeps_segments(self) -> bool:
        """Whether a row may hold several segments."""
        return self.packing == "packed" and self.max_segments != 1
