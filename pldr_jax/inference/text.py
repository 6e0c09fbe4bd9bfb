"""The text of a completion: as a continuation of its prompt, and cut at a stop string."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from pldr_jax.inference.request import Completion


class TextDecoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def eos_id(self) -> int:
        """Id of the end piece, -1 if there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that `ids` add after the ids `before`."""


def text_of(tokenizer: TextDecoder, completion: Completion) -> str:
    """The text so far, cut before the first stop string."""
    before = completion.request.prompt
    if not all(0 <= token < tokenizer.vocab_size for token in before):
        return ""
    text = tokenizer.decode_continuation(before, completion.tokens)
    found = [text.find(string) for string in completion.request.sampling.stop]
    return text[: min((at for at in found if at >= 0), default=len(text))]


def find_stop(tokenizer: TextDecoder, completion: Completion) -> int | None:
    """Tokens of the completion up to the end of its first stop string; None if it has none."""
    strings = completion.request.sampling.stop
    before, tokens = completion.request.prompt, completion.tokens
    if not strings or not _has_any(tokenizer.decode_continuation(before, tokens), strings):
        return None
    for count in range(1, len(tokens) + 1):
        if _has_any(tokenizer.decode_continuation(before, tokens[:count]), strings):
            return count
    return None


def _has_any(text: str, strings: Sequence[str]) -> bool:
    return any(string in text for string in strings)
