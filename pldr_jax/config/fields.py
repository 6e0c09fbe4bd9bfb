"""What a config dataclass is made of: fields with their meaning and bounds, checked at birth."""

import dataclasses
import math
from typing import Any, Literal, NoReturn, get_args


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message is one line naming field, value and
    remedy.
    """


def field(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field with its meaning and bounds: `low` <= value, `above` < value, value <=
    `high`.
    """
    return dataclasses.field(
        default=default, metadata={"doc": doc, "low": low, "above": above, "high": high}
    )


def group_name(config_class: type) -> str:
    """`ModelConfig` -> `Model`, the name the group has in config files, flags and messages."""
    return config_class.__name__.removesuffix("Config")


class Validated:
    """Checks the bounds declared by `field` as soon as a config object exists."""

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            value, bounds = getattr(self, one.name), one.metadata
            choices = get_args(one.type) if getattr(one.type, "__origin__", None) is Literal else ()
            if choices and value not in choices:
                self.fail(one.name, f"is not one of {', '.join(map(repr, choices))}")
            if value is None or isinstance(value, (str, bool)):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                self.fail(one.name, "must be finite")
            if bounds["low"] is not None and value < bounds["low"]:
                self.fail(one.name, f"must be at least {bounds['low']}")
            if bounds["above"] is not None and value <= bounds["above"]:
                self.fail(one.name, f"must be greater than {bounds['above']}")
            if bounds["high"] is not None and value > bounds["high"]:
                self.fail(one.name, f"must be at most {bounds['high']}")

    def fail(self, name: str, remedy: str) -> NoReturn:
        """Raises the one-line `ConfigError` for field `name`."""
        raise ConfigError(f"{group_name(type(self))}.{name} = {getattr(self, name)!r}: {remedy}")
