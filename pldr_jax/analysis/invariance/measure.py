"""Invariance: whether the deductive outputs are the same tensors for every text, and with caches as
without (arXiv 2603.23539; the claim is that of 2502.13502).

Every row is a prompt, continued three times by sampling: run 1 and run 2 recompute G_LM from all
tokens at every new token, with other draws; the cached run keeps the prompt's G_LM. What is
compared are the deductive outputs that each run ends with: those of the whole text in runs 1 and
2, those of the prompt in the cached run. `samples` compares each row of the given text with the
next one, which is what the evaluation during training reports.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from pldr_jax.analysis.batches import batches, deductive_outputs
from pldr_jax.analysis.invariance import view as views
from pldr_jax.analysis.invariance.determinants import DeterminantAgreement, Determinants
from pldr_jax.analysis.invariance.view import COMPARISONS, verdict
from pldr_jax.analysis.section import Section
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.reference import reference_outputs
from pldr_jax.training.evaluate import DeductiveStatistics, Spread

NEW_TOKENS = 32
"""Tokens that a prompt is continued by, at most half of a row."""
_SEEDS = {"run 1": 0, "run 2": 1 << 20}

Outputs = Mapping[str, np.ndarray]
Get = Callable[[np.ndarray], Outputs]
"""Deductive outputs [L,B,N,H,J] of tokens [B,T]."""


class _Tally:
    """The comparisons, in one precision."""

    def __init__(self) -> None:
        self.statistics: dict[str, dict[str, DeductiveStatistics]] = {}
        self.determinants = Determinants()
        self.agreement = {name: DeterminantAgreement() for name in COMPARISONS}

    def add(self, rows: Outputs, run_1: Outputs, run_2: Outputs, cached: Outputs) -> None:
        """Adds a batch; outputs are [L,B,N,H,J]."""
        for name, x in rows.items():
            self._of("samples", name).add(x)
            self._of("runs", name).add_pairs(run_1[name], run_2[name])
            self._of("cached", name).add_pairs(run_1[name], cached[name])
        self.determinants.add(rows["G_LM"])
        self.agreement["samples"].add(rows["G_LM"])
        self.agreement["runs"].add_pairs(run_1["G_LM"], run_2["G_LM"])
        self.agreement["cached"].add_pairs(run_1["G_LM"], cached["G_LM"])

    def _of(self, comparison: str, name: str) -> DeductiveStatistics:
        of = self.statistics.setdefault(comparison, {})
        return of.setdefault(name, DeductiveStatistics())

    def results(self, n_layers: int) -> dict[str, Any]:
        """For `Section.numbers`."""
        results: dict[str, Any] = {}
        for comparison in COMPARISONS:
            results[comparison] = {
                name: {
                    **_numbers(statistics.spread()),
                    "by_layer": _columns([statistics.spread(i) for i in range(n_layers)]),
                }
                for name, statistics in self.statistics[comparison].items()
            }
        agreement = {name: pairs.results() for name, pairs in self.agreement.items()}
        results["determinants"] = self.determinants.results() | agreement
        return results


def relative_rmse(spread: Spread) -> float:
    """The RMSE over the larger of the mean's magnitude and the standard deviation: the order
    parameter, unless the mean is small beside the entries.
    """
    return spread.rmse / max(abs(spread.mean), spread.std) if spread.rmse else 0.0


def measure(
    model: LanguageModel,
    rows_RC: np.ndarray,
    batch_size: int = 8,
    new_tokens: int | None = None,
    float64: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> Section:
    """The protocol on each row; memory does not grow with rows.

    Args:
      rows_RC: int32 token rows without padding, C at most the model's context.
      new_tokens: the last tokens of a row, which the runs replace; None is `NEW_TOKENS`, or half a
        row if that is less.
      float64: also compute the deductive outputs of the same texts in float64, by the NumPy model
        of `interop/reference.py`: what differs there is no rounding.
      advance: takes the number of rows that were done.

    Raises:
      ConfigError: a single row, or rows that leave no prompt before the new tokens.
    """
    if model.config.g_source != "learned":
        return _given(model, rows_RC, advance)
    length = rows_RC.shape[1]
    new = min(NEW_TOKENS, length // 2) if new_tokens is None else new_tokens
    if len(rows_RC) < 2:
        raise ConfigError("invariance: needs two rows of text or more, to compare them")
    if not 1 <= new < length:
        raise ConfigError(f"rows of {length} tokens leave no prompt before {new} new tokens")
    gets: dict[str, Get] = {"float32": lambda tokens_BT: deductive_outputs(model, tokens_BT)}
    if float64:
        gets["float64"] = _reference(model)
    tallies = {precision: _Tally() for precision in gets}
    done = same_tokens = 0
    for rows_BC, real in batches(rows_RC, batch_size):
        prompts_BP = rows_BC[:, :-new]
        runs = {
            name: _continued(model, prompts_BP, new, seed + done, kept=False)
            for name, seed in _SEEDS.items()
        }
        cached_BC = _continued(model, prompts_BP, new, _SEEDS["run 1"] + done, kept=True)
        agree_BC = (cached_BC == runs["run 1"])[:real, -new:]
        same_tokens += int(np.cumprod(agree_BC, axis=1).sum())
        for precision, get in gets.items():
            texts = (rows_BC, runs["run 1"], runs["run 2"], prompts_BP)
            tallies[precision].add(*(_first(get(tokens), real) for tokens in texts))
        done += real
        advance(real)
    numbers: dict[str, Any] = {
        "rows": done,
        "prompt_tokens": length - new,
        "new_tokens": new,
        "same_tokens": same_tokens / (done * new),
    }
    n_layers = model.config.num_layers
    numbers |= {precision: tally.results(n_layers) for precision, tally in tallies.items()}
    judged = tallies["float32"].statistics
    worst = max(relative_rmse(judged[name]["G_LM"].spread()) for name in COMPARISONS)
    numbers = {
        "verdict": verdict(worst),
        "relative_rmse": worst,
        "by_construction": False,
    } | numbers
    return Section(
        "invariance",
        "Invariance of the deductive outputs",
        tuple(views.words(model.config, numbers)),
        tuple(views.tables(numbers)),
        tuple(views.pictures(numbers)),
        numbers,
    )


def _continued(
    model: LanguageModel, prompts_BP: np.ndarray, new: int, seed: int, kept: bool
) -> np.ndarray:
    """[B, P + new]: each prompt and the tokens drawn after it; `kept` caches keys, values, G_LM."""
    made = model.generate(
        prompts_BP.tolist(),
        max_new_tokens=new,
        temperature=1.0,
        seed=seed,
        stop_ids=[],
        kv_cache=kept,
        g_cache="G_LM" if kept else "none",
        rows=len(prompts_BP),
    )
    tokens = np.asarray([generation.tokens for generation in made], np.int32)
    return np.concatenate([prompts_BP, tokens], axis=1)


def _reference(model: LanguageModel) -> Get:
    """The deductive outputs in float64."""
    tensors = to_tensors(model.config, jax.device_get(model.params))

    def get(tokens_BT: np.ndarray) -> Outputs:
        rows = [reference_outputs(model.config, tensors, row, None)[1] for row in tokens_BT]
        return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}

    return get


def _first(outputs: Outputs, real: int) -> Outputs:
    return {name: np.asarray(x[:, :real], np.float64) for name, x in outputs.items()}


def _numbers(spread: Spread) -> dict[str, float]:
    return {
        "mean": spread.mean,
        "std": spread.std,
        "rmse": spread.rmse,
        "order_parameter": spread.order_parameter,
        "rmse_over_std": spread.rmse_over_std,
    }


def _columns(spreads: list[Spread]) -> dict[str, list[float]]:
    layers = [_numbers(spread) for spread in spreads]
    return {name: [layer[name] for layer in layers] for name in layers[0]}


def _given(model: LanguageModel, rows_RC: np.ndarray, advance: Callable[[int], None]) -> Section:
    """The section of a model whose G_LM is not learned."""
    determinants = Determinants()
    determinants.add(deductive_outputs(model, rows_RC[:1])["G_LM"])
    advance(len(rows_RC))
    found = determinants.results()
    return Section(
        "invariance",
        "Invariance of the deductive outputs",
        (
            f"G_LM of this model is given (Model.g_source = {model.config.g_source!r}), one tensor "
            "for every text: it is invariant by construction, and there is nothing to compare.",
        ),
        (views.determinant_table(found, "float32"),),
        (views.determinant_picture(found),),
        {"verdict": "invariant", "by_construction": True, "determinants": found},
    )
