"""Structure: what A, A_LM, A_P and G_LM are as matrices. Rank, condition, symmetry, sparsity and
DAG losses by layer and head, distributions of their entries, the learned powers and couplings, and
what the heads attend to.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import batches
from pldr_jax.analysis.held_out import check_at_least, check_rows, quick_to_compile
from pldr_jax.analysis.section import Section
from pldr_jax.analysis.structure.attention_maps import describe_weights, weights_of
from pldr_jax.analysis.structure.distributions import EntryHistograms
from pldr_jax.analysis.structure.figures import pictures_of
from pldr_jax.analysis.structure.spectra import RowStatistics, describe, singular_values
from pldr_jax.analysis.structure.tables import tables_of
from pldr_jax.analysis.structure.words import kind, words_of
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Decoder, Params, apply
from pldr_jax.model.deductive import DeductiveOutputs, identity_g_lm
from pldr_jax.partition import mesh_scope
from pldr_jax.training.losses import log_trace_expm

SPECTRUM_ROWS = 32
"""Rows of which single tensors are decomposed, not only their mean, by default."""

PROMPT_TOKENS = 128
"""Tokens of the prompt whose attention weights are shown, at most, by default."""


class OutputStatistics:
    """What one deductive output is, row by row: memory does not grow with rows.

    Attributes:
      mean: running mean tensor [L,N,H,J], float64.
      rows: statistics of single rows' tensors, [L,N] each.
      entries: their distribution.
    """

    def __init__(self) -> None:
        self._sum: np.ndarray | float = 0.0
        self._n_rows = 0
        self.matrices, self.dag, self.entries = RowStatistics(), RowStatistics(), EntryHistograms()

    def add(self, x_LNHJ: np.ndarray, dag_LN: np.ndarray | None, decompose: bool) -> None:
        """Adds one row's tensor and its DAG loss."""
        self._sum = self._sum + x_LNHJ.astype(np.float64)
        self._n_rows += 1
        self.entries.add(x_LNHJ)
        if dag_LN is not None:
            self.dag.add({"dag_loss": dag_LN})
        if decompose:
            self.matrices.add(describe(x_LNHJ))

    @property
    def mean(self) -> np.ndarray:
        """The mean tensor [L,N,H,J]."""
        return np.asarray(self._sum) / self._n_rows

    @property
    def of_rows(self) -> dict[str, dict[str, np.ndarray]]:
        """`mean`, `min` and `max` over rows, [L,N], of each quantity."""
        return self.matrices.results() | self.dag.results()


def deductive_outputs(
    config: ModelConfig, params: Params, tokens_BT: jax.Array
) -> tuple[DeductiveOutputs, dict[str, jax.Array]]:
    """Deductive outputs [L,B,N,H,J] of rows, and the DAG losses [L,B,N] of A_LM, A_P and G_LM; a
    pure function.
    """
    _, layers = apply(Decoder(config), params, Decoder.hidden, tokens_BT)
    tensors = dict(layers.deductive.items())
    return layers.deductive, {name: dag_losses(x) for name, x in tensors.items() if name != "A"}


def dag_losses(x: jax.Array) -> jax.Array:
    """log(tr(exp(X * X)) / H) of each matrix of [..., H, H] (arXiv 2410.16703)."""
    return log_trace_expm(x**2)


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> Callable[..., Any]:
    return jax.jit(functools.partial(deductive_outputs, quick_to_compile(config)))


def measure(
    model: LanguageModel,
    rows_RC: np.ndarray,
    batch_size: int = 8,
    spectrum_rows: int = SPECTRUM_ROWS,
    prompt_tokens: int = PROMPT_TOKENS,
    advance: Callable[[int], None] = lambda n: None,
) -> Section:
    """Measures the deductive outputs of rows; with a predefined G_LM, that tensor alone.

    Args:
      rows_RC: held-out rows, int32, without padding; all but the last token of each are inputs.
      batch_size: rows of one forward pass.
      spectrum_rows: the tensors of so many rows are also decomposed one by one.
      prompt_tokens: so many tokens of the first row are the prompt of the attention maps.
      advance: called with the number of rows that are done.

    Raises:
      ConfigError: rows that the model cannot take, or a setting below 1 (2 for `prompt_tokens`).
    """
    check_rows(model.config, rows_RC)
    check_at_least("batch_size", batch_size, 1)
    check_at_least("spectrum_rows", spectrum_rows, 1)
    check_at_least("prompt_tokens", prompt_tokens, 2)
    learned = model.config.g_source == "learned"
    outputs: dict[str, OutputStatistics] = {}
    if learned:
        outputs = _of_rows(model, rows_RC, batch_size, spectrum_rows, advance)
    else:
        outputs["G_LM"] = _of_predefined(model)
        advance(len(rows_RC))
    learned_tensors = _learned_tensors(model)
    weights_LNTS = weights_of(model, rows_RC[0, :-1][:prompt_tokens])
    numbers: dict[str, Any] = {
        "rows": len(rows_RC) if learned else 0,
        "decomposed_rows": min(spectrum_rows, len(rows_RC)) if learned else 0,
        "head_dim": model.config.head_dim,
        "outputs": {name: _output_numbers(x) for name, x in outputs.items()},
        "parameters": {name: _lists(x.results()) for name, x in learned_tensors.items()},
        "attention": _lists(describe_weights(weights_LNTS)),
    }
    numbers["verdict"] = ", ".join(kind("G_LM", numbers))
    tensors: dict[str, np.ndarray] = {}
    for name, statistics in outputs.items():
        tensors[f"mean_{name}"] = statistics.mean.astype(np.float32)
        tensors[f"singular_values_{name}"] = singular_values(statistics.mean)
    for name, entries in _histograms(outputs, learned_tensors).items():
        tensors[f"linear_edges_{name}"] = entries.linear_edges
        tensors[f"linear_counts_{name}"] = entries.linear_counts
        tensors[f"positive_counts_{name}"] = entries.positive_counts
        tensors[f"negative_counts_{name}"] = entries.negative_counts
        tensors["log10_magnitude_edges"] = entries.log_edges
    return Section(
        name="structure",
        title="Structure of the deductive outputs",
        words=words_of(numbers),
        tables=tables_of(numbers),
        pictures=pictures_of(
            tensors,
            _histograms(outputs, learned_tensors),
            {name: model.params["layers"]["attention"]["plga"][name] for name in learned_tensors},
            weights_LNTS,
        ),
        numbers=numbers,
        tensors=tensors,
    )


def _of_rows(
    model: LanguageModel,
    rows_RC: np.ndarray,
    batch_size: int,
    spectrum_rows: int,
    advance: Callable[[int], None],
) -> dict[str, OutputStatistics]:
    outputs: dict[str, OutputStatistics] = {}
    done, outputs_of = 0, _jitted(model.config)
    for batch_BC, real in batches(rows_RC, batch_size):
        with mesh_scope(model.mesh):
            deductive, dag = jax.device_get(outputs_of(model.params, batch_BC[:, :-1]))
        for b in range(real):
            for name, x_LBNHJ in deductive.items():
                dag_LN = dag[name][:, b] if name in dag else None
                statistics = outputs.setdefault(name, OutputStatistics())
                statistics.add(x_LBNHJ[:, b], dag_LN, done < spectrum_rows)
            done += 1
            advance(1)
    return outputs


def _of_predefined(model: LanguageModel) -> OutputStatistics:
    g_lm = identity_g_lm(model.config) if model.g_lm is None else model.g_lm
    statistics = OutputStatistics()
    x_LNHJ = np.asarray(g_lm)[:, 0]
    statistics.add(x_LNHJ, np.asarray(dag_losses(jnp.asarray(x_LNHJ))), decompose=True)
    return statistics


def _learned_tensors(model: LanguageModel) -> dict[str, EntryHistograms]:
    """Distributions of the learned powers P and couplings a, [L,N,H,J]."""
    plga = model.params["layers"]["attention"].get("plga")
    made = {}
    for name in ("P", "a") if plga is not None else ():
        made[name] = EntryHistograms()
        made[name].add(np.asarray(plga[name]))
    return made


def _histograms(
    outputs: dict[str, OutputStatistics], learned_tensors: dict[str, EntryHistograms]
) -> dict[str, EntryHistograms]:
    return {name: x.entries for name, x in outputs.items()} | learned_tensors


def _output_numbers(statistics: OutputStatistics) -> dict[str, Any]:
    of_rows = {name: _lists(values) for name, values in statistics.of_rows.items()}
    return {
        "mean_tensor": _lists(describe(statistics.mean)),
        "of_rows": of_rows,
        "entries": _lists(statistics.entries.results()),
    }


def _lists(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: np.asarray(x).tolist() for name, x in values.items()}
