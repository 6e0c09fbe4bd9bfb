"""Invariance: whether the deductive outputs are the same tensors for every text, and with caches as
without (arXiv 2603.23539 and 2502.13502).

Every row is a prompt, continued three times by sampling: run 1 and run 2 recompute G_LM from all
tokens at every new token, with different draws; the cached run keeps the prompt's G_LM. Compared
are the deductive outputs that each run ends with: those of the whole text in runs 1 and 2, those of
the prompt in the cached run. `samples` compares each row of the given text with the next one, as
the evaluation during training does.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from pldr_jax.analysis.batches import batches, deductive_tensors
from pldr_jax.analysis.invariance.determinants import DeterminantAgreement, Determinants
from pldr_jax.analysis.invariance.view import (
    COMPARISONS,
    determinant_figure,
    determinant_table,
    invariance_tables,
    invariance_verdict,
    invariance_words,
    order_parameter_figure,
)
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.reference import reference_outputs
from pldr_jax.model.audits import OPERATOR_INVARIANT, stabilised_order
from pldr_jax.training.order_parameter import DeductiveStatistics, Spread

NEW_TOKENS = 32
"""Tokens that a prompt is continued by, at most half of a row."""
_SEEDS = {"run 1": 0, "run 2": 1 << 20}

Outputs = Mapping[str, np.ndarray]
"""Deductive outputs [L,B,N,H,J] by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invariance(ModelSection):
    """How far the deductive outputs differ between texts, runs and caches."""

    key = "invariance"
    title = "Invariance of the deductive outputs"

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        new_tokens: int | None = None,
    ) -> Self:
        """Continues and compares each row.

        Args:
          rows_RC: C is at most the model's context.
          settings: with `float64`, the deductive outputs of the same texts also in float64, by the
            NumPy model of `interop/reference.py`; what differs there is not rounding.
          new_tokens: the last tokens of a row, which the runs replace; None is `NEW_TOKENS`, or
            half a row if that is less.

        Raises:
          ConfigError: a single row, or rows that leave no prompt before the new tokens.
        """
        if model.config.g_source != "learned":
            return cls(numbers=_predefined_numbers(model, rows_RC, settings))
        length = rows_RC.shape[1]
        new = min(NEW_TOKENS, length // 2) if new_tokens is None else new_tokens
        if len(rows_RC) < 2:
            raise ConfigError("invariance: needs two rows of text or more, to compare them")
        if not 1 <= new < length:
            raise ConfigError(f"rows of {length} tokens leave no prompt before {new} new tokens")
        tallies, same_tokens = _compare_rows(model, rows_RC, new, settings)
        judged = tallies["float32"].statistics
        worst = float(np.max([relative_rmse(judged[k]["G_LM"].spread()) for k in COMPARISONS]))
        n_layers = model.config.num_layers
        order_rms = float(tallies["float32"].order_rms["runs"]["G_LM"].max)
        return cls(
            numbers={
                "verdict": invariance_verdict(worst),
                "relative_rmse": worst,
                "operator_invariant": order_rms < OPERATOR_INVARIANT,
                "by_construction": False,
                "dtype": model.config.dtype,
                "rows": len(rows_RC),
                "prompt_tokens": length - new,
                "new_tokens": new,
                "same_tokens": same_tokens / (len(rows_RC) * new),
                **{precision: tally.results(n_layers) for precision, tally in tallies.items()},
            }
        )

    def words(self) -> tuple[str, ...]:
        if self.numbers["by_construction"]:
            source = self.numbers["g_source"]
            return (
                f"G_LM of this model is predefined (Model.g_source = {source!r}), one tensor for "
                "every text: it is invariant by construction, and there is nothing to compare.",
            )
        return tuple(invariance_words(self.numbers))

    def tables(self) -> tuple[Table, ...]:
        if self.numbers["by_construction"]:
            return (determinant_table(self.numbers["determinants"], "float32"),)
        return tuple(invariance_tables(self.numbers))

    def figures(self) -> tuple[Picture, ...]:
        if self.numbers["by_construction"]:
            return (determinant_figure(self.numbers["determinants"]),)
        single = self.numbers["float32"]
        return order_parameter_figure(single), determinant_figure(single["determinants"])


class _Tally:
    """The comparisons, in one precision."""

    def __init__(self) -> None:
        self.statistics: dict[str, dict[str, DeductiveStatistics]] = {
            name: {} for name in COMPARISONS
        }
        self.order_rms: dict[str, dict[str, RunningStatistics]] = {name: {} for name in COMPARISONS}
        self._last: Outputs | None = None
        self.determinants = Determinants()
        self.agreement = {name: DeterminantAgreement() for name in COMPARISONS}

    def add(self, rows: Outputs, run_1: Outputs, run_2: Outputs, cached: Outputs) -> None:
        """Adds a batch."""
        for name, x in rows.items():
            for statistics in self.statistics.values():
                statistics.setdefault(name, DeductiveStatistics())
            self.statistics["samples"][name].add(x)
            self.statistics["runs"][name].add_pairs(run_1[name], run_2[name])
            self.statistics["cached"][name].add_pairs(run_1[name], cached[name])
        self._add_order(rows, run_1, run_2, cached)
        self.determinants.add(rows["G_LM"])
        self.agreement["samples"].add(rows["G_LM"])
        self.agreement["runs"].add_pairs(run_1["G_LM"], run_2["G_LM"])
        self.agreement["cached"].add_pairs(run_1["G_LM"], cached["G_LM"])

    def _add_order(self, rows: Outputs, run_1: Outputs, run_2: Outputs, cached: Outputs) -> None:
        """The stabilised order parameter of every pair, over all layers and heads."""
        for name, x in rows.items():
            chain = x if self._last is None else np.concatenate([self._last[name], x], axis=1)
            pairs = {
                "samples": (chain[:, :-1], chain[:, 1:]),
                "runs": (run_1[name], run_2[name]),
                "cached": (run_1[name], cached[name]),
            }
            for comparison, (one, other) in pairs.items():
                statistics = self.order_rms[comparison].setdefault(name, RunningStatistics())
                statistics.add(stabilised_order(one, other, (0, 2, 3, 4)))
        self._last = {name: x[:, -1:] for name, x in rows.items()}

    def results(self, n_layers: int) -> dict[str, Any]:
        """For the numbers of the section."""
        results: dict[str, Any] = {}
        for comparison, by_output in self.statistics.items():
            results[comparison] = {}
            for name, statistics in by_output.items():
                layers = [_spread_numbers(statistics.spread(i)) for i in range(n_layers)]
                by_layer = {key: [layer[key] for layer in layers] for key in layers[0]}
                numbers = _spread_numbers(statistics.spread())
                order = self.order_rms[comparison][name]
                numbers |= {"order_rms": float(order.mean), "order_rms_max": float(order.max)}
                results[comparison][name] = numbers | {"by_layer": by_layer}
        agreement = {name: pairs.results() for name, pairs in self.agreement.items()}
        return results | {"determinants": self.determinants.results() | agreement}


def relative_rmse(spread: Spread) -> float:
    """The RMSE over the larger of the mean's magnitude and the standard deviation: the order
    parameter, unless the mean is small beside the entries.
    """
    return spread.rmse / max(abs(spread.mean), spread.std) if spread.rmse else 0.0


def _compare_rows(
    model: LanguageModel, rows_RC: np.ndarray, new: int, settings: Settings
) -> tuple[dict[str, _Tally], int]:
    """The comparisons by precision; and how many tokens the cached run wrote as run 1 did."""
    outputs_of = {"float32": lambda tokens_BT: deductive_tensors(model, tokens_BT)}
    if settings.float64:
        outputs_of["float64"] = _float64_outputs(model)
    tallies = {precision: _Tally() for precision in outputs_of}
    done = same_tokens = 0
    for rows_BC, real in batches(rows_RC, settings.batch_size):
        prompts_BP = rows_BC[:, :-new]
        runs = {
            name: _continued(model, prompts_BP, new, seed + done, cached=False)
            for name, seed in _SEEDS.items()
        }
        cached_BC = _continued(model, prompts_BP, new, _SEEDS["run 1"] + done, cached=True)
        agree_BC = (cached_BC == runs["run 1"])[:real, -new:]
        same_tokens += int(np.cumprod(agree_BC, axis=1).sum())
        for precision, outputs in outputs_of.items():
            texts = (rows_BC, runs["run 1"], runs["run 2"], prompts_BP)
            tallies[precision].add(*(_real_rows(outputs(tokens), real) for tokens in texts))
        done += real
        settings.advance(real)
    return tallies, same_tokens


def _continued(
    model: LanguageModel, prompts_BP: np.ndarray, new: int, seed: int, cached: bool
) -> np.ndarray:
    """[B, P + new]: each prompt and the tokens drawn after it; with `cached`, keys, values and G_LM
    are kept from the prompt on.
    """
    generations = model.generate(
        prompts_BP.tolist(),
        max_new_tokens=new,
        temperature=1.0,
        seed=seed,
        stop_ids=[],
        kv_cache=cached,
        g_cache="G_LM" if cached else "none",
        batch_size=len(prompts_BP),
    )
    tokens = np.asarray([generation.tokens for generation in generations], np.int32)
    return np.concatenate([prompts_BP, tokens], axis=1)


def _float64_outputs(model: LanguageModel) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Deductive outputs [L,B,N,H,J] of tokens [B,T] in float64."""
    tensors = to_tensors(model.config, jax.device_get(model.params))

    def outputs(tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
        rows = [reference_outputs(model.config, tensors, row, None)[1] for row in tokens_BT]
        return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}

    return outputs


def _real_rows(outputs: Outputs, real: int) -> Outputs:
    return {name: np.asarray(x[:, :real], np.float64) for name, x in outputs.items()}


def _spread_numbers(spread: Spread) -> dict[str, float]:
    return {
        "mean": spread.mean,
        "std": spread.std,
        "rmse": spread.rmse,
        "order_parameter": spread.order_parameter,
        "rmse_over_std": spread.rmse_over_std,
    }


def _predefined_numbers(
    model: LanguageModel, rows_RC: np.ndarray, settings: Settings
) -> dict[str, Any]:
    """Of a model whose G_LM is not learned."""
    determinants = Determinants()
    determinants.add(deductive_tensors(model, rows_RC[:1])["G_LM"])
    settings.advance(len(rows_RC))
    return {
        "verdict": "invariant",
        "by_construction": True,
        "g_source": model.config.g_source,
        "determinants": determinants.results(),
    }
