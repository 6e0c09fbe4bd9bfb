"""The frozen-operator contract of a model whose G_LM is learned."""

import dataclasses
from typing import Self

import numpy as np

from pldr_jax.analysis.batches import NOT_FINITE, check_rows, split_calibration
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Settings, Table
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.partition import mesh_scope
from pldr_jax.training.freeze.contract import CONTRACT_LENGTHS, MOST_KL, MOST_RMS, frozen_contract


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenContract(ModelSection):
    """Whether one frozen G_LM can stand for the model's own, by length of the text."""

    key = "contract"
    title = "Frozen-operator contract"

    @classmethod
    def measure(
        cls, model: LanguageModel, rows_RC: np.ndarray, settings: Settings = DEFAULTS
    ) -> Self:
        """Freezes the mean G_LM of some rows (`split_calibration`) and compares the others.

        Raises:
          ConfigError: rows that the model cannot take, or logits that are not finite.
        """
        check_rows(model.config, rows_RC, 2)
        if model.config.g_source != "learned":
            settings.advance(len(rows_RC))
            return cls(numbers={"by_construction": True})
        with mesh_scope(model.mesh):
            averaged_RC, compared_RC = map(list, split_calibration(rows_RC))
            lengths = frozen_contract(model.config, model.params, averaged_RC, compared_RC)
        if any(entry["kl"] is None for entry in lengths):
            raise ConfigError(NOT_FINITE.format("logits of held-out rows"))
        settings.advance(len(rows_RC))
        verdict = "passes" if all(entry["passes"] for entry in lengths) else "does not pass"
        verdict = verdict if lengths else "not measured"
        return cls(numbers={"verdict": verdict, "by_construction": False, "lengths": lengths})

    def words(self) -> tuple[str, ...]:
        if self.numbers["by_construction"]:
            return ("G_LM of this model is predefined: it passes by construction.",)
        if not self.numbers["lengths"]:
            return (f"The rows are shorter than {CONTRACT_LENGTHS[0]} tokens: nothing to compare.",)
        failed = [str(entry["length"]) for entry in self.numbers["lengths"] if not entry["passes"]]
        at = f", at {', '.join(failed)} tokens" if failed else ""
        return (
            f"A frozen mean G_LM {self.numbers['verdict']} the contract{at}: a centred relative "
            f"RMS of the logits of at most {MOST_RMS:g} and a mean KL divergence of at most "
            f"{MOST_KL:g} nats.",
        )

    def tables(self) -> tuple[Table, ...]:
        columns = ("length", "documents", "centred_relative_rms", "kl")
        rows = tuple(
            (*(entry[name] for name in columns), "yes" if entry["passes"] else "no")
            for entry in self.numbers.get("lengths", ())
        )
        headings = (
            "tokens",
            "documents",
            "centred relative RMS of the logits",
            "KL, nats",
            "passes",
        )
        return (Table("Frozen mean G_LM against the model's own", headings, rows),) if rows else ()
