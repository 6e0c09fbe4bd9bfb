"""Prompts as users give them: strings or token ids of any kind, one or several."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.config.annotations import show

Prompt = str | Sequence[int] | np.ndarray | jax.Array
Prompts = Prompt | Iterable[Prompt]


class Encoder(Protocol):
    """What turns text into token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


def token_ids(prompt: Prompt, tokenizer: Encoder | None) -> list[int]:
    """Token ids of a prompt.

    Raises:
      ConfigError: neither a string nor token ids; or a string, and there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt: this checkpoint has no tokenizer; pass lists of token ids")
        return tokenizer.encode(prompt)
    if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray, Mapping)):
        tokens = list(prompt)
        if all(map(_is_token, tokens)):
            return [operator.index(token) for token in tokens]
    raise ConfigError(f"prompt {show(prompt)}: must be a string or a list of token ids")


def token_array(tokens_BT: Any, vocab_size: int) -> np.ndarray:
    """Token ids [B,T] as int32.

    Raises:
      ConfigError: another shape or type, or an id outside the vocabulary.
    """
    try:
        tokens = np.asarray(tokens_BT)
    except ValueError:
        raise ConfigError("tokens: the rows are not of one length: must be ids [B,T]") from None
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ConfigError(
            f"tokens: shape {tokens.shape}, dtype {tokens.dtype}: must be integer ids [B,T]"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ConfigError(f"tokens: an id lies outside the vocabulary of {vocab_size}")
    return tokens.astype(np.int32)


def as_list(prompts: Prompts) -> list[Prompt]:
    """Several prompts, or a single one, as a list.

    Raises:
      ConfigError: neither.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Mapping)):
        raise ConfigError(
            f"prompts: {show(prompts)}: must be a string, a list of token ids, or a list of these"
        )
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(map(_is_token, listed)) else listed


def _is_token(value: Any) -> bool:
    """Whether a value is an integer of any kind, a scalar of an array included."""
    if isinstance(value, (bool, np.bool_, str)) or np.ndim(value):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
