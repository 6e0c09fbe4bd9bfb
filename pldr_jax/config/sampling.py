"""How a prompt is continued: one value for configs, flags, lines of JSONL, requests and the API."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, Self

from pldr_jax.config.annotations import show, suggest
from pldr_jax.config.fields import SEED_LIMIT, ConfigError, Validated, field

MAX_STOP_IDS = 8
"""Stop ids of a prompt: a bounded number, so that no number needs a compilation of its own."""


class Keywords(Validated):
    """Values that a function takes as keywords: messages name the field without a group."""

    def fail(self, name: str, remedy: str) -> NoReturn:
        """Raises the one-line `ConfigError` for field `name`."""
        raise ConfigError(f"{name} = {show(getattr(self, name))}: {remedy}")


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Keywords):
    """How the next token is drawn, and what ends a text.

    A number that is added here is an array of the decoding batch (`inference/sampling.py`), a flag,
    a config field, a key of JSONL and a keyword of the API without further ado.

    Examples:
      >>> warm = pldr_jax.SamplingConfig(max_new_tokens=4, temperature=0.7, top_p=0.9, seed=1)
      >>> one, again = (pldr_jax.load("runs/nano").generate("def ", warm)[0] for _ in range(2))
      >>> one.tokens == again.tokens
      True
    """

    max_new_tokens: int = field(128, "new tokens for each prompt", low=1)
    temperature: float = field(
        0.0, "0 is greedy; otherwise logits are divided by it", low=0, high=1e6
    )
    top_k: int = field(0, "draw from the k most probable tokens; 0 is off", low=0)
    top_p: float = field(
        1.0, "draw from the smallest set whose probability reaches p; 1 is off", above=0, high=1
    )
    min_p: float = field(
        0.0,
        "draw from tokens at least this share as probable as the best one; 0 is off",
        low=0,
        high=1,
    )
    repetition_penalty: float = field(
        1.0,
        "above 1 makes tokens already in the text less probable; 1 is off",
        low=1e-6,
        high=1e6,
    )
    presence_penalty: float = field(
        0.0, "taken from the logits of tokens that the new text has; 0 is off", low=-1e6, high=1e6
    )
    frequency_penalty: float = field(
        0.0, "the same for each time that it has them; 0 is off", low=-1e6, high=1e6
    )
    seed: int = field(
        0, "seed of the draws; prompt i of several draws with seed + i", low=0, high=SEED_LIMIT
    )
    stop_ids: tuple[int, ...] | None = field(
        None, f"token ids that end a text, at most {MAX_STOP_IDS}; None is the tokenizer's end"
    )
    stop: tuple[str, ...] = field((), "strings that end a text, which is cut before them")

    def __post_init__(self) -> None:
        alone = self.stop if isinstance(self.stop, str) else None
        object.__setattr__(self, "stop", (alone,) if alone is not None else _listed(self.stop))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", _listed(self.stop_ids))
        super().__post_init__()
        if "" in self.stop:
            self.fail("stop", "an empty string ends every text at once; leave it out")
        for token in self.stop_ids or ():
            if not 0 <= token < 2**31:
                self.fail("stop_ids", "must be token ids, from 0 to 2**31 - 1")
        if len(self.stop_ids or ()) > MAX_STOP_IDS:
            count = len(self.stop_ids or ())
            self.fail("stop_ids", f"has {count} ids, at most {MAX_STOP_IDS} are possible")

    def of_prompt(self, index: int) -> Self:
        """The settings of one of several prompts: its seed is `seed + index`, modulo 2**32."""
        if index == 0:
            return self
        return dataclasses.replace(self, seed=(self.seed + index) % (SEED_LIMIT + 1))


@dataclasses.dataclass(frozen=True)
class GenerationConfig(SamplingConfig):
    """Decoding: how the next token is drawn and where G_LM comes from."""

    batch_size: int = field(8, "prompts decoded side by side", low=1, high=2**16)
    truncate: Literal["error", "left"] = field(
        "error",
        "a prompt that is too long: an error, or cut at its start so that max_new_tokens fit too, "
        "or to half of the context where they alone would fill it",
    )
    g_mode: Literal["prompt", "first", "frozen", "identity", "recompute"] = field(
        "prompt",
        "G_LM: each prompt's, the first prompt's, g_file's or the checkpoint's own, the identity, "
        "or recomputed at every token",
    )
    g_file: str | None = field(
        None, "npz or safetensors file holding G_LM [L,N,H,H] (g_mode = 'frozen')", path=True
    )
    kv_cache: bool = field(True, "cache keys and values; off recomputes them at every token")
    g_cache: bool = field(
        True, "cache G_LM itself; off caches the metric tensor A and recomputes the last steps"
    )
    cache_dtype: Literal["auto", "float32", "bfloat16"] = field(
        "auto", "dtype of cached keys and values; auto is Model.dtype"
    )
    weights: Literal["float32", "bfloat16", "int8"] = field(
        "float32",
        "dtype in which the kernels of attention, feed-forward and head are held, PLGA's never; "
        "float32 is as trained, int8 has a scale for each output channel",
    )
    rank_budget: float | None = field(
        None,
        "relative error of a G_LM shared by all prompts (g_mode 'first' or 'frozen') for which "
        "keys are cached in fewer numbers; 0 keeps every rank",
        low=0,
        high=1,
    )

    prefix_cache_mb: int = field(
        0,
        "MiB of keys and values kept of beginnings that prompts share, where one G_LM serves all; "
        "0 is off",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_cache_mb and not (self.kv_cache and self.g_mode != "recompute"):
            self.fail("prefix_cache_mb", "keeps keys and values, which are recomputed here")
        if self.g_file is not None and self.g_mode != "frozen":
            self.fail("g_file", f"is only read when g_mode = 'frozen', not {self.g_mode!r}")

    fail = Validated.fail  # a group of the config, which messages name

    @property
    def sampling(self) -> SamplingConfig:
        """The part that is about one prompt."""
        names = [one.name for one in dataclasses.fields(SamplingConfig)]
        return SamplingConfig(**{name: getattr(self, name) for name in names})


def _listed(value: Any) -> Any:
    """Any array, set or list as a tuple, None as an empty one; other values as they are."""
    if value is None:
        return ()
    plain = isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable)
    return value if plain else tuple(value)


def renamed(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of decoding by their present names."""
    names = {"rows": "batch_size", "length": "capacity"}
    return {names.get(name, name): value for name, value in overrides.items()}


def override(values: Mapping[str, Any], *settings: Keywords) -> list[Any]:
    """The settings, each with those of the values that are fields of it.

    Raises:
      ConfigError: a name that none of them has, or a value that is out of bounds.
    """
    own = [{one.name for one in dataclasses.fields(each)} for each in settings]  # type: ignore[arg-type]
    names = sorted(set().union(*own))
    for name in values:
        if name not in names:
            hint = suggest(name, names) or f"; there are {', '.join(names)}"
            raise ConfigError(f"{name}: no such setting{hint}")
    return [
        dataclasses.replace(each, **{name: values[name] for name in values if name in fields})  # type: ignore[type-var]
        for each, fields in zip(settings, own, strict=True)
    ]
