"""The sections of a report. A new one is a subclass of `ModelSection`, and a line here."""

from pldr_jax.analysis.alteration import Alteration
from pldr_jax.analysis.audits.contract import FrozenContract
from pldr_jax.analysis.audits.decoding import Decoding
from pldr_jax.analysis.audits.row_map import RowMap
from pldr_jax.analysis.audits.symmetry import Symmetry
from pldr_jax.analysis.causality.measure import Causality
from pldr_jax.analysis.invariance.measure import Invariance
from pldr_jax.analysis.low_rank import LowRank
from pldr_jax.analysis.section import ModelSection
from pldr_jax.analysis.structure.measure import Structure
from pldr_jax.config import ConfigError

_ORDER: tuple[type[ModelSection], ...] = (
    Invariance,
    Causality,
    Structure,
    Alteration,
    LowRank,
    RowMap,
    Symmetry,
    Decoding,
    FrozenContract,
)
SECTIONS = {section.key: section for section in _ORDER}
"""By their keys, in the order of the report."""


def chosen_sections(keys: str | None) -> list[type[ModelSection]]:
    """The sections of a comma-separated list, in the order of the report; all if None.

    Raises:
      ConfigError: one line, for a key that no section has.
    """
    if keys is None:
        return list(SECTIONS.values())
    wanted = [key.strip() for key in keys.split(",") if key.strip()]
    unknown = [key for key in wanted if key not in SECTIONS]
    if unknown or not wanted:
        raise ConfigError(
            f"--sections={keys}: {unknown[0] if unknown else 'nothing'!r} is no section; there "
            f"are {', '.join(SECTIONS)}"
        )
    return [section for key, section in SECTIONS.items() if key in wanted]
