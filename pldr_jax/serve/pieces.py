"""Tokens as text, one by one: what lists of log-probabilities show."""

import math
from collections.abc import Sequence

from pldr_jax.data.text.tokenizer import Tokenizer

NEVER = -9999.0
"""The log-probability of a token that cannot come; JSON has no infinity."""


def token_text(tokenizer: Tokenizer | None, before: Sequence[int], token: int) -> tuple[str, int]:
    """A token after others as text, and how many characters of the text it is.

    A piece of a character is `bytes:\\xNN`, a special piece its name, and without a tokenizer a
    token is `token_id:N`.
    """
    if tokenizer is None or not 0 <= token < tokenizer.vocab_size:
        return f"token_id:{token}", 0
    piece = tokenizer.piece(token)
    if tokenizer.is_byte(token):  # "<0xE2>"
        code = piece[3:5].lower()
        return (f"bytes:\\x{code}" if code >= "80" else chr(int(code, 16))), 1
    text = tokenizer.decode_continuation(before, [token])
    return text or piece, len(text)


def finite(logprob: float) -> float:
    """A log-probability as JSON can write it."""
    return logprob if math.isfinite(logprob) else NEVER


class Logprobs:
    """The lists of one text, token by token, as `/v1/completions` writes them.

    Args:
      tokenizer: None where the checkpoint has none.
      prompt: the tokens before.
      offset: characters before.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], offset: int = 0) -> None:
        self._tokenizer, self._prompt, self._offset = tokenizer, list(prompt), offset
        self._ids: list[int] = []
        self.tokens: list[str] = []
        self.token_logprobs: list[float | None] = []
        self.top_logprobs: list[dict[str, float] | None] = []
        self.text_offset: list[int] = []

    def add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """One more token; the first one of a text has no log-probability."""
        before = [*self._prompt[-8:], *self._ids]
        text, length = token_text(self._tokenizer, before, token)
        self._ids.append(token)
        self.tokens.append(text)
        self.text_offset.append(self._start(length))
        self.token_logprobs.append(None if logprob is None else finite(logprob))
        best: dict[str, float] | None = None
        if logprob is not None:
            pairs = [(token_text(self._tokenizer, before, i)[0], p) for i, p in top]
            best = {}
            for name, value in [*pairs, (text, logprob)]:  # equal texts keep the more probable one
                best.setdefault(name, finite(value))
        self.top_logprobs.append(best)

    def _start(self, length: int) -> int:
        """Where the newest token begins; bytes of half a character begin where it does."""
        text = ""
        if self._tokenizer is not None:
            text = self._tokenizer.decode_continuation(self._prompt, self._ids)
        start = min(len(text) - length, len(text.rstrip("\ufffd")))
        last = self.text_offset[-1] if self.text_offset else self._offset
        return max(last, self._offset + start)

    def json(self, start: int = 0, end: int | None = None) -> dict[str, list[object]]:
        """The lists from one token to another."""
        lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: getattr(self, name)[start:end] for name in lists}

    def told_until(self, length: int) -> int:
        """How many tokens begin before a number of characters."""
        return sum(offset < length for offset in self.text_offset)
