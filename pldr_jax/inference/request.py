"""What is asked of the engine, and what it answers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from pldr_jax.config import ModelConfig, SamplingConfig
from pldr_jax.config.fields import field
from pldr_jax.config.sampling import Keywords

SMALLEST_BUCKET = 16
BROKEN = "the logits are not finite: the checkpoint may be broken"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one.
      sampling: how; `stop_ids` None is no stop id, since the engine knows no tokenizer.
      error: why it cannot be decoded, if that is known before; the engine answers with it.
      logit_bias: pairs of a token id and what is added to its logits.
      top_logprobs: how many of the most probable tokens of each step are told, at most 20.
      g_lm: G_LM [L,1,N,H,J] of this request alone; None is what the engine was told. Only where
        each slot keeps its own.
      params: parameters that its prompt runs with, of the shapes of the engine's; None is those.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig = SamplingConfig()
    error: str | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    g_lm: Any = dataclasses.field(default=None, compare=False)
    params: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class DecodeOptions(Keywords):
    """How the requests of one call are decoded; no completion depends on the first three.

    Keys and values without G_LM cannot be cached: a recomputed G_LM changes every key (arXiv
    2502.13502).
    """

    batch_size: int = field(8, "B, slots: prompts decoded side by side", low=1, high=2**16)
    capacity: int | None = field(
        None, "S, tokens that a slot can hold; None is what the requests need", low=1
    )
    steps: int = field(8, "X, decode steps in one call, between two looks at the texts", low=1)
    share_first_g: bool = field(False, "the G_LM of the first prompt serves all")
    kv_cache: bool = field(True, "cache keys and values; off recomputes them at every token")
    g_cache: Literal["G_LM", "A", "none"] = field(
        "G_LM",
        "keep the prompt's G_LM, or its metric tensor A, from which the last steps of PLGA run at "
        "every token, or recompute G_LM from all tokens: the definition of the model",
    )

    prefix_cache_mb: int = field(
        0,
        "MiB of keys and values kept of beginnings that prompts share, where one G_LM serves all; "
        "0 is off",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_cache_mb and not self.kv_cache:
            self.fail("prefix_cache_mb", "keeps keys and values: turn the key-value cache on")
        if self.kv_cache and self.g_cache == "none":
            self.fail(
                "g_cache",
                "a recomputed G_LM changes every key: turn the key-value cache off, or keep G_LM",
            )


@dataclasses.dataclass
class Completion:
    """One request's continuation, growing while it is decoded.

    Attributes:
      index: of the request, from 0.
      request: what was asked.
      tokens: new token ids; a stop token is not among them.
      logprobs: of those tokens, in the model's own distribution.
      top: ids and log-probabilities of the most probable tokens at each step, as many as asked for.
      finish_reason: "stop" (a stop token or string), "length" (max_new_tokens), "context" (the
        model's context is full) or "error"; None while it grows. Who reads the engine may set
        another one, which frees the slot before the next step.
      error: one line, where the finish reason is "error".
    """

    index: int
    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    def fail(self, reason: str) -> None:
        """Ends it with an error."""
        self.finish_reason, self.error = "error", reason

    def stop(self, count: int) -> None:
        """Ends it after `count` tokens."""
        del self.tokens[count:], self.logprobs[count:], self.top[count:]
        self.finish_reason, self.error = "stop", None

    def end_when_full(self, context_length: int) -> None:
        """Ends it where no more tokens were asked for, or the model's context is full."""
        if self.finish_reason is None:
            if len(self.tokens) >= self.request.sampling.max_new_tokens:
                self.finish_reason = "length"
            elif len(self.request.prompt) + len(self.tokens) >= context_length:
                self.finish_reason = "context"


FindStop = Callable[[Completion], int | None]
"""Tokens of a completion up to a stop string, if it has one; the engine knows no text."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's result.

    Attributes:
      prompt_tokens: the prompt's token ids.
      tokens: new token ids.
      text: their text; "" where the checkpoint has no tokenizer.
      finish_reason: "stop", "length", "context" or "error"; None while it is being decoded.
      logprobs: log-probability of each new token in the model's own distribution.
      error: one line, where the finish reason is "error".

    Examples:
      >>> (one,) = pldr_jax.load("runs/nano").generate("def ", 4, stop_ids=())
      >>> one.finish_reason, len(one.logprobs)
      ('length', 4)
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[float]
    error: str | None = None


def check_request(
    request: Request, config: ModelConfig, pieces: int, capacity: int | None = None
) -> str | None:
    """What is wrong with a request, in one line; None if nothing is.

    Args:
      pieces: token ids that can be read and drawn: those of the tokenizer, or the vocabulary.
      capacity: tokens that a slot can hold; None is the model's context.
    """
    prompt, context = request.prompt, config.context_length
    if request.error is not None:
        return request.error
    if not prompt:
        return "the prompt is empty"
    if len(prompt) >= context:
        return (
            f"the prompt has {len(prompt)} tokens, which leaves no room in the model's context of "
            f"{context}; shorten it"
        )
    biased = [token for token, _ in request.logit_bias]
    stop_ids = request.sampling.stop_ids or ()
    for name, ids in (("the prompt", prompt), ("stop_ids", stop_ids), ("logit_bias", biased)):
        for token in ids:
            if not 0 <= token < config.vocab_size:
                vocab = config.vocab_size
                return f"{name} has the token id {token}, outside the vocabulary of {vocab}"
            if token >= pieces:
                return f"{name} has the token id {token}, of which the tokenizer has no piece"
    needed = min(len(prompt) + request.sampling.max_new_tokens, context)
    if capacity is not None and needed > capacity:
        return f"the prompt and max_new_tokens need {needed} tokens, the slots hold {capacity}"
    return None


def bucket(length: int, limit: int) -> int:
    """The padded length that `length` tokens are compiled for: a power of two, at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def bias_of(request: Request, vocab_size: int) -> Any:
    """What is added to the request's logits [V], float32, in NumPy."""
    bias_V = np.zeros((vocab_size,), np.float32)
    for token, value in request.logit_bias:
        bias_V[token] = value
    return bias_V


def prompts_together(width: int, batch: int) -> int:
    """Q, the prompts of a bucket that enter in one call: as many as cost little more than one.

    Always that many, so that what a prompt gives, to the last bit, depends on it and on the number
    of slots alone: where fewer wait, one stands for the missing ones.

    Args:
      width: tokens of the bucket.
      batch: B, slots.
    """
    tokens = 64 if jax.default_backend() == "cpu" else 512
    most = max(min(batch, tokens // width), 1)
    return 1 << (most.bit_length() - 1)


def padded(prompt: Sequence[int], limit: int, needed: int = 0) -> tuple[Any, Any]:
    """The tokens [T] of a prompt in its bucket, or that of `needed` tokens, and its length; int32,
    in NumPy, which a jitted function takes as it takes its own arrays.
    """
    tokens = np.zeros((bucket(max(len(prompt), needed), limit),), np.int32)
    tokens[: len(prompt)] = prompt
    return tokens, np.int32(len(prompt))
