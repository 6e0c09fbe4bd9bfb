"""The measurements by their names: a new one is one line here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pldr_jax.analysis import alteration, low_rank
from pldr_jax.analysis.causality import measure as causality
from pldr_jax.analysis.invariance import measure as invariance
from pldr_jax.analysis.section import Section
from pldr_jax.analysis.structure import measure as structure
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measurement.

    Attributes:
      measure: takes model, rows_RC, `batch_size=`, `advance=` and the options.
      options: names of the settings that it takes besides.
    """

    measure: Callable[..., Section]
    options: tuple[str, ...] = ()


MEASUREMENTS: Mapping[str, Measurement] = {
    "invariance": Measurement(invariance.measure, ("float64",)),
    "causality": Measurement(causality.measure),
    "structure": Measurement(structure.measure),
    "alteration": Measurement(alteration.measure, ("others",)),
    "low_rank": Measurement(low_rank.measure),
}
"""In the order of the report."""


def chosen(names: str | None) -> dict[str, Measurement]:
    """The measurements of a comma-separated list, in the order of the report; all if None.

    Raises:
      ConfigError: one line, for a name that is none of them.
    """
    if names is None:
        return dict(MEASUREMENTS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in MEASUREMENTS]
    if unknown or not wanted:
        listed = ", ".join(MEASUREMENTS)
        raise ConfigError(
            f"--sections={names}: {unknown[0] if unknown else 'nothing'!r} is no "
            f"section; there are {listed}"
        )
    return {name: found for name, found in MEASUREMENTS.items() if name in wanted}


def run_section(
    measurement: Measurement,
    model: LanguageModel,
    rows_RC: np.ndarray,
    batch_size: int,
    settings: Mapping[str, Any],
    advance: Callable[[int], None],
) -> Section:
    """Measures; of the settings, the measurement takes those that it names."""
    options = {name: settings[name] for name in measurement.options}
    return measurement.measure(model, rows_RC, batch_size=batch_size, advance=advance, **options)
