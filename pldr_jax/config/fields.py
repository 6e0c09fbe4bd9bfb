"""What a config dataclass is made of: fields with their meaning and bounds, which are checked
whenever an object is made.
"""

import dataclasses
import functools
import math
import numbers
import os
import typing
from typing import Any, NoReturn

from pldr_jax.config.annotations import choices, coerce, show, type_name

SEED_LIMIT = 2**32 - 1
"""The largest seed: JAX's generators take 32 bits, and would drop the others."""
_INT_LIMIT = 2**31 - 1
"""The largest integer of a field that states no bound: more is no count of anything."""


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message is one line naming field, value and
    remedy.

    Examples:
      >>> pldr_jax.SamplingConfig(temperature=-1.0)
      Traceback (most recent call last):
      ...
      pldr_jax.config.fields.ConfigError: temperature = -1.0: must be at least 0
    """


class UnavailableError(ConfigError):
    """A bucket, or another process of the run, that does not answer: the same command may succeed
    later. Programs then end with status 1, and with 2 for every other `ConfigError`.
    """


def field(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    path: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with its meaning and bounds: `low` <= value, `above` < value, value <=
    `high`. A `path`, or a tuple of them, may begin with `~`. `metavar` stands for the value in the
    help of a field that is a flag.
    """
    metadata: dict[str, Any] = {"doc": doc, "low": low, "above": above, "high": high, "path": path}
    metadata["metavar"] = metavar
    return dataclasses.field(default=default, metadata=metadata)


def group_name(config_class: type) -> str:
    """`ModelConfig` -> `Model`, the name the group has in config files, flags and messages."""
    return config_class.__name__.removesuffix("Config")


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by the home folder.

    Raises:
      ValueError: there is no such folder, as in some containers; or no file can have such a name.
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"there is no home folder for {path.partition('/')[0]!r}; write it out")
    if not path:
        raise ValueError("is empty; give a path")
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise ValueError("cannot be the name of a file")
    return expanded


class Validated:
    """Checks types and bounds of all fields as soon as a config object exists.

    As in a config file, an integer serves as a float and a list as a tuple. NumPy's numbers and
    `pathlib` paths become Python's.
    """

    def __post_init__(self) -> None:
        config_class: Any = type(self)
        annotations = _annotations(config_class)
        for one in dataclasses.fields(config_class):
            annotation, bounds = annotations[one.name], one.metadata
            value = _plain(getattr(self, one.name))
            try:
                value = coerce(value, annotation)
            except ValueError:
                verb = "is not" if choices(annotation) else "must be"
                self.fail(one.name, f"{verb} {type_name(annotation)}")
            if bounds["path"] and value is not None:
                try:
                    many = isinstance(value, tuple)
                    value = tuple(map(expand_home, value)) if many else expand_home(value)
                except ValueError as error:
                    self.fail(one.name, str(error))
            object.__setattr__(self, one.name, value)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    self._check_bounds(one.name, number, bounds)

    def _check_bounds(self, name: str, value: float, bounds: typing.Mapping[str, Any]) -> None:
        high = bounds["high"]
        if high is None and isinstance(value, int):
            high = _INT_LIMIT
        if not isinstance(value, int) and not math.isfinite(value):
            self.fail(name, "must be finite")
        if bounds["low"] is not None and value < bounds["low"]:
            self.fail(name, f"must be at least {bounds['low']}")
        if bounds["above"] is not None and value <= bounds["above"]:
            self.fail(name, f"must be greater than {bounds['above']}")
        if high is not None and value > high:
            self.fail(name, f"must be at most {high}")

    def fail(self, name: str, remedy: str) -> NoReturn:
        """Raises the one-line `ConfigError` for field `name`."""
        raise ConfigError(
            f"{group_name(type(self))}.{name} = {show(getattr(self, name))}: {remedy}"
        )


class FlagGroup(Validated):
    """Settings that are plain flags of a program: `rows` is `--rows`, and its errors say so."""

    def fail(self, name: str, remedy: str) -> NoReturn:
        """Raises the one-line `ConfigError` for flag `name`."""
        raise ConfigError(f"--{name}={_shown(getattr(self, name))}: {remedy}")


def _shown(value: object) -> str:
    return value if isinstance(value, str) else show(value)


@functools.cache
def _annotations(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _plain(value: Any) -> Any:
    """A NumPy number as Python's, a path as its text, and everything else as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)
