"""The group `Task` of the configuration."""

import dataclasses
from typing import Literal

from pldr_jax.config.fields import Validated, field

_TEXT = {"sequence": ("text",), "token": ("tokens",), "question": ("question", "context")}
_LABEL = {"sequence": "label", "token": "labels", "question": "answers"}


@dataclasses.dataclass(frozen=True)
class TaskConfig(Validated):
    """What a task's head learns from the lines of JSONL that Data.source names."""

    kind: Literal["sequence", "token", "question"] | None = field(
        None,
        "a label of a text, a label of each word, or an answer that stands in a text; None trains "
        "a language model",
    )
    labels: tuple[str, ...] = field(
        (),
        "names of the labels, in the order of the logits; () is those of --init_from, or else of "
        "the training text in sorted order",
    )
    text: tuple[str, ...] = field(
        (),
        "columns of the text, joined where they are several; () is text, for tokens tokens (a list "
        "of words), for a question question and context",
    )
    label: str | None = field(
        None, "column of the label; None is label, for tokens labels, for a question answers"
    )
    dropout: float = field(
        0.0,
        "share of the hidden states before the head that each step of training sets to 0; 0.1 is "
        "what the transformers port does where each token has a label",
        low=0,
        high=0.9,
    )
    held_out: str | None = field(
        None,
        "JSONL to evaluate on; None holds out Data.validation_fraction of Data.source",
        path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.labels)) < len(self.labels):
            self.fail("labels", "names a label twice")
        if self.kind == "question" and self.labels:
            self.fail("labels", "a question has none; leave it out")
        if self.kind == "question" and self.dropout:
            self.fail("dropout", "the head of a question has none; take 0")
        counts = {"sequence": (1, 2), "token": (1,), "question": (2,)}
        if self.kind and self.text and len(self.text) not in counts[self.kind]:
            self.fail("text", f"must be {' or '.join(map(str, counts[self.kind]))} columns")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """`text`, or what it is for the kind."""
        return self.text or _TEXT[self.kind or "sequence"]

    @property
    def label_column(self) -> str:
        """`label`, or what it is for the kind."""
        return self.label or _LABEL[self.kind or "sequence"]
