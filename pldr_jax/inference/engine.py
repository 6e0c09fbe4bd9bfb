"""The engine: prompts in, text out. It pads prompts to buckets, compiles once a bucket, and drives
the decode step.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.decode import decode_step, full_step, prefill, prompt_g_lm
from pldr_jax.inference.sampling import Sampling, draw
from pldr_jax.model.cache import Cache
from pldr_jax.model.decoder import Params, unstack_layers

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class CacheMode:
    """What is kept from the prompt while decoding (arXiv 2502.13502); every combination is exact
    for its definition.

    Attributes:
      kv: keys and values are cached; off recomputes them from all tokens at every step.
      g: "G_LM" keeps G_LM itself; "A" keeps the metric tensor, and the last steps of PLGA run
        again at every step; "none" recomputes G_LM from all tokens at every step, which only makes
        sense without a kv cache.
    """

    kv: bool = True
    g: str = "G_LM"

    def __post_init__(self) -> None:
        if self.g not in ("G_LM", "A", "none"):
            raise ConfigError(f"cache mode g = {self.g!r}: must be 'G_LM', 'A' or 'none'")
        if self.kv and self.g == "none":
            raise ConfigError(
                "a recomputed G_LM changes every key: turn the key-value cache off, or keep G_LM"
            )


@dataclasses.dataclass
class Completion:
    """One prompt's continuation, growing while it is decoded.

    Attributes:
      prompt: the prompt's token ids.
      tokens: new token ids; the stop token, if one ended the text, is not among them.
      finish_reason: "stop" (a stop token), "length" (max_new_tokens) or "context" (the model's
        context is full).
    """

    prompt: list[int]
    tokens: list[int]
    finish_reason: str | None = None


@dataclasses.dataclass(frozen=True)
class _Jitted:
    """The jitted functions of one model config."""

    prefill: Callable[..., Any]
    decode: Callable[..., Any]
    full: Callable[..., Any]
    prompt_g_lm: Callable[..., Any]
    unstack: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> _Jitted:
    """Shared by all engines of a config, so that new parameters (after each evaluation) compile
    nothing again.
    """

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, config)

    return _Jitted(
        prefill=jax.jit(bound(_prefill_and_draw), static_argnames=("slots", "keep")),
        decode=jax.jit(bound(_decode_and_draw), donate_argnames="cache"),
        full=jax.jit(bound(_full_and_draw)),
        prompt_g_lm=jax.jit(bound(prompt_g_lm)),
        unstack=jax.jit(bound(unstack_layers)),
    )


class Engine:
    """Decodes batches of prompts with one set of parameters.

    Args:
      config: of the model.
      params: stacked parameters.
      g_lm: the model's predefined G_LM [L,1,N,H,J], if it has one.
    """

    def __init__(self, config: ModelConfig, params: Params, g_lm: jax.Array | None = None) -> None:
        self._config = config
        self._params = params
        self._g_lm = g_lm
        self._jitted = _jitted(config)

    @functools.cached_property
    def _unstacked(self) -> Params:
        return self._jitted.unstack(self._params)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int] = frozenset(),
        g_lm: jax.Array | None = None,
        mode: CacheMode | None = None,
    ) -> Iterator[list[Completion]]:
        """Decodes the prompts as one batch; yields the same list of completions after every new
        token.

        Args:
          prompts: token ids, at least one each; they may have different lengths.
          max_new_tokens: at most this many new tokens for each prompt.
          sampling: settings, one row a prompt.
          stop_ids: tokens that end a completion.
          g_lm: G_LM for every prompt, [L,B,N,H,J] or [L,1,N,H,J]; None takes the model's own.
          mode: what is cached; keys, values and G_LM unless told otherwise.

        Raises:
          ConfigError: no prompts, an empty one, one as long as the context, or an unknown id.
        """
        mode = mode or CacheMode()
        completions = self._checked(prompts, max_new_tokens)
        given = g_lm if g_lm is not None else self._g_lm
        steps = (
            self._cached(completions, max_new_tokens, sampling, given, mode.g)
            if mode.kv
            else self._uncached(completions, max_new_tokens, sampling, given, mode.g)
        )
        for tokens_B in steps:
            for completion, token in zip(completions, tokens_B.tolist(), strict=True):
                if completion.finish_reason is None:
                    self._take(completion, token, max_new_tokens, stop_ids)
            yield completions
            if all(completion.finish_reason for completion in completions):
                return

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        """The finished completions of `stream`, whose arguments it takes."""
        return deque(self.stream(*args, **kwargs), maxlen=1).pop()

    def _cached(
        self,
        completions: list[Completion],
        max_new: int,
        sampling: Sampling,
        g_lm: jax.Array | None,
        keep: str,
    ) -> Iterator[np.ndarray]:
        slots = self._slots(completions, max_new)
        tokens_BT, length_B = _pad(
            completions, bucket(int(max(len(c.prompt) for c in completions)), slots)
        )
        learned = self._config.g_source == "learned" and g_lm is None
        token_B, cache = self._jitted.prefill(
            self._params,
            tokens_BT,
            length_B,
            g_lm,
            sampling,
            slots=slots,
            keep=keep if learned else "G_LM",
        )
        while True:
            yield np.asarray(token_B)
            token_B, cache = self._jitted.decode(self._unstacked, token_B, cache, sampling)

    def _uncached(
        self,
        completions: list[Completion],
        max_new: int,
        sampling: Sampling,
        g_lm: jax.Array | None,
        keep: str,
    ) -> Iterator[np.ndarray]:
        slots = self._slots(completions, max_new)
        tokens_BS, length_B = _pad(completions, slots)
        if g_lm is None and keep != "none" and self._config.g_source == "learned":
            g_lm = self._jitted.prompt_g_lm(self._params, tokens_BS, length_B)
        while True:
            token_B, tokens_BS, length_B = self._jitted.full(
                self._params, tokens_BS, length_B, g_lm, sampling
            )
            yield np.asarray(token_B)

    def _slots(self, completions: list[Completion], max_new: int) -> int:
        longest = max(len(completion.prompt) for completion in completions)
        return bucket(
            min(longest + max_new, self._config.context_length), self._config.context_length
        )

    def _checked(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        if not prompts:
            raise ConfigError("prompts: none were given")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
        limit, vocab = self._config.context_length, self._config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ConfigError(f"prompt {i}: is empty")
            if len(prompt) >= limit:
                raise ConfigError(
                    f"prompt {i}: has {len(prompt)} tokens, which leaves no room in the model's "
                    f"context of {limit}; shorten it"
                )
            if not all(0 <= token < vocab for token in prompt):
                raise ConfigError(f"prompt {i}: has a token id outside the vocabulary of {vocab}")
        return [Completion(prompt=list(prompt), tokens=[]) for prompt in prompts]

    def _take(
        self, completion: Completion, token: int, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> None:
        if token in stop_ids:
            completion.finish_reason = "stop"
            return
        completion.tokens.append(token)
        if len(completion.tokens) >= max_new_tokens:
            completion.finish_reason = "length"
        elif len(completion.prompt) + len(completion.tokens) >= self._config.context_length:
            completion.finish_reason = "context"


def bucket(length: int, limit: int) -> int:
    """The padded length that `length` tokens are compiled for: a power of two, at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def _pad(completions: list[Completion], width: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.zeros((len(completions), width), np.int32)
    for row, completion in zip(tokens, completions, strict=True):
        row[: len(completion.prompt)] = completion.prompt
    return jnp.asarray(tokens), jnp.asarray(
        [len(completion.prompt) for completion in completions], jnp.int32
    )


def _prefill_and_draw(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    g_lm: jax.Array | None,
    sampling: Sampling,
    slots: int,
    keep: str,
) -> tuple[jax.Array, Cache]:
    logits_BV, cache = prefill(config, params, tokens_BT, length_B, g_lm, slots, keep)
    return draw(logits_BV, sampling, length_B), cache


def _decode_and_draw(
    config: ModelConfig, unstacked: Params, token_B: jax.Array, cache: Cache, sampling: Sampling
) -> tuple[jax.Array, Cache]:
    logits_BV, cache = decode_step(config, unstacked, token_B, cache)
    return draw(logits_BV, sampling, cache.length_B), cache


def _full_and_draw(
    config: ModelConfig,
    params: Params,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    g_lm: jax.Array | None,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    token_B = draw(full_step(config, params, tokens_BS, length_B, g_lm), sampling, length_B)
    # A finished row keeps writing; the slot is clamped to the last one, and its tokens are no
    # longer read.
    slot_B = jnp.minimum(length_B, tokens_BS.shape[1] - 1)
    tokens_BS = tokens_BS.at[jnp.arange(len(slot_B)), slot_B].set(token_B)
    return token_B, tokens_BS, jnp.minimum(length_B + 1, tokens_BS.shape[1])
