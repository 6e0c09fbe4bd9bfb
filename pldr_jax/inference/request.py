"""What is asked of the engine, and what it answers."""

import dataclasses

from pldr_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: at most this many new tokens.
      temperature, top_p, min_p, top_k, repetition_penalty: see `inference/sampling.py`.
      seed: of the draws.
      stop_ids: tokens that end the text; they are not part of it.
      stop_strings: strings that end the text, which is cut before them.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass
class Completion:
    """One request's continuation, growing while it is decoded.

    Attributes:
      index: of the request, from 0.
      request: what was asked.
      tokens: new token ids; a stop token is not among them.
      logprobs: of those tokens, in the model's own distribution.
      finish_reason: "stop" (a stop token or string), "length" (max_new_tokens), "context" (the
        model's context is full) or "error"; None while it grows.
      error: one line, where the finish reason is "error".
    """

    index: int
    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


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
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[float]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class CacheMode:
    """What is kept from the prompt while decoding (arXiv 2502.13502).

    Attributes:
      kv: keys and values are cached; off recomputes them from all tokens at every step.
      g: "G_LM" keeps G_LM itself; "A" keeps the metric tensor, and the last steps of PLGA run again
        at every step; "none" recomputes G_LM from all tokens at every step: the definition of the
        model, without a kv cache.
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


def check_request(request: Request, context_length: int, vocab_size: int) -> str | None:
    """What is wrong with a request, in one line; None if nothing is."""
    prompt = request.prompt
    if not prompt:
        return "the prompt is empty"
    if len(prompt) >= context_length:
        return (
            f"the prompt has {len(prompt)} tokens, which leaves no room in the model's context of "
            f"{context_length}; shorten it"
        )
    if not all(0 <= token < vocab_size for token in prompt):
        return f"the prompt has a token id outside the vocabulary of {vocab_size}"
    if request.max_new_tokens < 1:
        return f"max_new_tokens = {request.max_new_tokens}: must be at least 1"
    return None
