"""What a request may say, field by field, and the engine's requests that it becomes."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from pldr_jax.config import SEED_LIMIT, ConfigError, SamplingConfig
from pldr_jax.config.fields import field
from pldr_jax.config.sampling import Keywords, override
from pldr_jax.inference.request import Request, check_request
from pldr_jax.inference.slots import MAX_TOP_LOGPROBS
from pldr_jax.serve.served import Served, gain_of
from pldr_jax.serve.wire import ApiError, checked_text

MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_STOPS = 16
NOT_SUPPORTED = (
    "best_of suffix functions function_call tools tool_choice parallel_tool_calls response_format "
    "modalities audio prediction store service_tier reasoning_effort web_search_options verbosity "
    "min_tokens ignore_eos guided_json guided_regex guided_choice guided_grammar use_beam_search "
    "length_penalty early_stopping prompt_logprobs skip_special_tokens stop_token_ids"
).split()
"""Fields of other servers, refused by name."""


@dataclasses.dataclass(frozen=True)
class Body(Keywords):
    """Fields that all ways to ask for text have; the meaning is that of OpenAI's API."""

    model: str | None = field(None, "the name of the model served")
    stream: bool = field(False, "send the text as it grows, as server-sent events")
    n: int = field(1, "texts for each prompt", low=1, high=MAX_CHOICES)
    stop: str | tuple[str, ...] = field((), "strings that end a text")
    temperature: float = field(1.0, "0 is greedy", low=0, high=1e6)
    top_p: float = field(1.0, "nucleus", above=0, high=1)
    seed: int | None = field(
        None, "of the draws; choice i has seed + i; none: another each time", low=0, high=SEED_LIMIT
    )
    presence_penalty: float = field(0.0, "taken from logits of tokens that came", low=-2, high=2)
    frequency_penalty: float = field(0.0, "the same for each time they came", low=-2, high=2)
    user: str | None = field(None, "a name of the client's own; no answer depends on it")
    top_k: int = field(0, "not of the standard: as SamplingConfig.top_k", low=0)
    min_p: float = field(0.0, "not of the standard: as SamplingConfig.min_p", low=0, high=1)
    repetition_penalty: float = field(1.0, "not of the standard", low=1e-6, high=1e6)
    g_mode: str | None = field(None, "not of the standard: where G_LM comes from")
    g_text: str | None = field(None, "not of the standard: a text whose G_LM is taken")

    def __post_init__(self) -> None:
        super().__post_init__()
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", stops)
        if len(stops) > MAX_STOPS:
            self.fail("stop", f"at most {MAX_STOPS} strings are possible")


@dataclasses.dataclass(frozen=True)
class CompletionBody(Body):
    """The fields of `/v1/completions`."""

    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...] = field(
        (), "text, token ids, or a list of these"
    )
    max_tokens: int = field(16, "new tokens; 0 needs echo", low=0)
    logprobs: int | None = field(
        None, "log-probabilities of this many tokens", low=0, high=MAX_TOP_LOGPROBS
    )
    echo: bool = field(False, "the prompt is the beginning of the text")
    g_tokens: int | None = field(
        None,
        "not of the standard: log-probabilities of an echoed prompt take G_LM from this many of "
        "its tokens; none: from all but the last",
        low=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_tokens and not self.echo:
            self.fail("max_tokens", "nothing is asked for; 0 is for echo")
        if self.g_tokens is not None and not (self.echo and self.logprobs is not None):
            self.fail(
                "g_tokens", "is about the log-probabilities of a prompt: needs echo, logprobs"
            )

    @property
    def prompts(self) -> list[Any]:
        """Each prompt, a string or token ids."""
        several = not isinstance(self.prompt, str) and not all(
            isinstance(x, int) for x in self.prompt
        )
        return list(self.prompt) if several else [self.prompt]


_DEFAULTS = CompletionBody()  # made once, since making one checks every field


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request of the API, checked.

    Attributes:
      body: its plain fields.
      requests: of the engine, one a choice; `max_new_tokens` is 1 where none are asked for.
      max_tokens: new tokens of each.
      logprobs: how many log-probabilities of each token are told; None is none.
      include_usage: a stream ends with the number of tokens.
      g_text: token ids of that field.
      gain: factors [L,N] of G_LM.
    """

    body: Any
    requests: list[Request]
    max_tokens: int
    logprobs: int | None
    include_usage: bool
    g_text: list[int] | None
    gain: np.ndarray | None


def read_body(
    values: Mapping[str, Any], served: Served, defaults: Body
) -> tuple[Any, dict[str, Any]]:
    """The plain fields of a request, and those that are objects.

    Raises:
      ApiError: a field that there is not, that is not supported, or whose value cannot be used.
    """
    plain = dict(values)
    objects = {name: plain.pop(name, None) for name in ("logit_bias", "stream_options", "gain")}
    for name in NOT_SUPPORTED:
        if name in plain:
            raise ApiError(400, f"{name}: is not supported by this server", name, "unsupported")
    try:
        (body,) = override(plain, defaults)
    except ConfigError as error:
        raise ApiError.of(error) from None
    if body.model not in (None, served.name):
        raise ApiError(
            404, f"model = {body.model!r}: is not served; there is {served.name!r}", "model",
            "model_not_found",
        )  # fmt: skip
    for text in (*body.stop, body.g_text or "", body.user or ""):
        checked_text(text, "stop or g_text")
    return body, objects


def ask(values: Mapping[str, Any], served: Served) -> Asked:
    """What a body of `/v1/completions` asks for.

    Raises:
      ApiError: it cannot be done, and why.
    """
    if "prompt" not in values:
        raise ApiError(400, "prompt: is missing", "prompt")
    body, objects = read_body(values, served, _DEFAULTS)
    for prompt in body.prompts:
        if isinstance(prompt, str):
            checked_text(prompt, "prompt")
    return asked_of(body, objects, served, body.prompts, body.max_tokens, body.logprobs)


def asked_of(
    body: Any,
    objects: Mapping[str, Any],
    served: Served,
    prompts: list[Any],
    max_tokens: int,
    logprobs: int | None,
) -> Asked:
    """A checked request of the engine for every choice.

    Raises:
      ApiError: a prompt that cannot be decoded, or settings that this model rules out.
    """
    lm = served.lm
    if len(prompts) * body.n > served.settings.max_waiting:
        most = served.settings.max_waiting
        raise ApiError(400, f"n = {body.n}: {len(prompts) * body.n} texts, at most {most}", "n")
    seed = secrets.randbelow(SEED_LIMIT + 1) if body.seed is None else body.seed
    numbers = {
        name: getattr(body, name)
        for name in (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty",
        )
    }  # fmt: skip
    bias = _bias(objects["logit_bias"])
    try:
        sampling = SamplingConfig(max(max_tokens, 1), seed=seed, stop=body.stop, **numbers)
    except ConfigError as error:
        raise ApiError.of(error) from None
    requests = []
    for i, prompt in enumerate(prompts):
        request = lm.request(prompt, sampling)
        request = dataclasses.replace(
            request, logit_bias=bias, top_logprobs=logprobs or 0, params=None
        )
        requests += [_checked(request, served, max_tokens, i * body.n + j) for j in range(body.n)]
    mode = body.g_mode or served.g_mode
    gain = None
    if objects["gain"] is not None:
        gain = gain_of(objects["gain"], lm.config.num_layers, lm.config.num_heads)
    served.check_given(mode, body.g_text, gain)
    g_text = None if body.g_text is None else tokens_of(body.g_text, served, "g_text")
    usage = _include_usage(body, objects["stream_options"])
    return Asked(body, requests, max_tokens, logprobs, usage, g_text, gain)


def _checked(request: Request, served: Served, max_tokens: int, choice: int) -> Request:
    """The request of a choice; a prompt that is only read may be longer by two tokens."""
    lm = served.lm
    pieces = lm.config.vocab_size if lm.tokenizer is None else lm.tokenizer.vocab_size
    error = request.error
    if error is None and max_tokens:
        error = check_request(request, lm.config, pieces, served.capacity)
    elif error is not None and not max_tokens:
        short = dataclasses.replace(request, prompt=request.prompt[:1], error=None)
        error = check_request(short, lm.config, pieces) if request.prompt else error
        over = len(request.prompt) - served.capacity - 1
        bad = [token for token in request.prompt if not 0 <= token < pieces]
        if over > 0:
            error = f"the prompt has {over} tokens more than can be read"
        elif bad:
            error = f"the prompt has the token id {bad[0]}, which there is not"
    if error is not None:
        raise ApiError(400, error, "prompt")
    return dataclasses.replace(request, sampling=request.sampling.of_prompt(choice), error=None)


def tokens_of(text: str, served: Served, name: str) -> list[int]:
    """Token ids of a text that is read, not continued.

    Raises:
      ApiError: there is no tokenizer, or no token, or there are too many.
    """
    try:
        tokens = served.lm.encode(checked_text(text, name))
    except ConfigError as error:
        raise ApiError(400, f"{name}: {error}", name) from None
    if not 0 < len(tokens) <= served.capacity:
        raise ApiError(
            400, f"{name}: has {len(tokens)} tokens, must be 1 to {served.capacity}", name
        )
    return tokens


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    error = ApiError(
        400, "logit_bias: must map token ids to numbers from -100 to 100", "logit_bias"
    )
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise error
    if len(value) > MAX_BIASES:
        raise ApiError(400, f"logit_bias: at most {MAX_BIASES} tokens are possible", "logit_bias")
    pairs = []
    for key, number in value.items():
        plain = type(number) in (int, float) and abs(number) <= 100
        if not (plain and key.isascii() and key.isdigit() and len(key) < 10):
            raise error
        pairs.append((int(key), float(number)))
    return tuple(pairs)


def _include_usage(body: Body, value: Any) -> bool:
    if value is None:
        return False
    plain = isinstance(value, dict) and set(value) <= {"include_usage"}
    if not (plain and body.stream and isinstance(value.get("include_usage", False), bool)):
        raise ApiError(
            400, "stream_options: must be {include_usage: true or false}, and needs stream",
            "stream_options",
        )  # fmt: skip
    return bool(value.get("include_usage", False))
