"""Generation settings of lm-evaluation-harness, by the names that its backends know."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pldr_jax.config import ConfigError, SamplingConfig

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one number; the first that is there counts, as in the harness."""
_OWN = ("max_new_tokens", "seed", "stop_ids", "stop", "repetition_penalty")
_DRAWS = {f.name: type(f.default) for f in dataclasses.fields(SamplingConfig) if f.name not in _OWN}
"""Settings of a draw, which the harness names as we do."""
_KNOWN = ("until", *_LENGTHS, "do_sample", *_DRAWS, "repetition_penalty", "num_beams")
_NEW_TOKENS = 256
"""New tokens of a generation that names no number, as in the harness."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What a task asks of a generation.

    Attributes:
      until: texts that end it.
      new_tokens: at most so many; 0 is an empty text.
      sampling: `temperature`, `top_p` and the like where tokens are drawn; of a greedy one only
        `repetition_penalty`.
    """

    until: tuple[str, ...]
    new_tokens: int
    sampling: dict[str, Any]


def read_settings(settings: Mapping[str, Any]) -> GenerationSettings:
    """Greedy where `do_sample` is false, or where neither it nor a temperature says otherwise; and
    at a temperature of 0.

    Raises:
      ConfigError: a setting that does not exist, or a value that it cannot have.
    """
    stated = {name: value for name, value in settings.items() if value is not None}
    for name, value in stated.items():
        if name not in _KNOWN:
            raise ConfigError(f"{name} = {value!r}: no such setting; there are {', '.join(_KNOWN)}")
    until = stated.get("until", ())
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, (list, tuple)) or not all(isinstance(text, str) for text in until):
        raise ConfigError(f"until = {until!r}: must be a string or a list of strings")
    lengths = [_number(stated, name, int) for name in _LENGTHS if name in stated]
    if lengths and lengths[0] < 0:
        raise ConfigError(f"max_gen_toks = {lengths[0]}: must be at least 0")
    if _number(stated, "num_beams", int, 1) != 1:
        raise ConfigError(f"num_beams = {stated['num_beams']!r}: there is no beam search; leave 1")
    if (temperature := _number(stated, "temperature", float, 0.0)) < 0:
        raise ConfigError(f"temperature = {temperature}: must be at least 0")
    sample = stated.get("do_sample", temperature > 0)
    if not isinstance(sample, bool):
        raise ConfigError(f"do_sample = {sample!r}: must be true or false")
    sampling = {"repetition_penalty": _number(stated, "repetition_penalty", float, 1.0)}
    if sample and _number(stated, "temperature", float, 1.0) > 0:
        sampling["temperature"] = 1.0
        sampling |= {n: _number(stated, n, kind) for n, kind in _DRAWS.items() if n in stated}
    new_tokens = lengths[0] if lengths else _NEW_TOKENS
    return GenerationSettings(tuple(text for text in until if text), new_tokens, sampling)


def _number(settings: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = settings.get(name, default)
    try:
        number = kind(value)
        if isinstance(value, bool) or number != float(value):  # 1.9 is no int, and NaN no number
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        whole = ", a whole one" if kind is int else ""
        raise ConfigError(f"{name} = {value!r}: must be a number{whole}") from None
    return number
