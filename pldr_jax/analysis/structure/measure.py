"""Structure: what A, A_LM, A_P and G_LM are as matrices. Rank, condition, symmetry, sparsity and
DAG losses by layer and head, distributions of their entries, the learned powers and couplings, and
what the heads attend to.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import (
    batches,
    check_at_least,
    check_rows,
    predefined_or_identity,
    quick_to_compile,
)
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.analysis.structure.attention_maps import describe_attention, prompt_attention
from pldr_jax.analysis.structure.distributions import EntryHistograms
from pldr_jax.analysis.structure.figures import structure_figures
from pldr_jax.analysis.structure.matrices import describe_matrices
from pldr_jax.analysis.structure.tables import structure_tables
from pldr_jax.analysis.structure.words import matrix_kind, structure_words
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Decoder, Params, apply
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.low_rank import singular_values
from pldr_jax.partition import mesh_scope
from pldr_jax.training.losses import log_trace_expm

SPECTRUM_ROWS = 32
"""Rows of which single tensors are decomposed, not only their mean, by default."""

PROMPT_TOKENS = 128
"""Tokens of the prompt whose attention weights are shown, at most, by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure(ModelSection):
    """The deductive outputs as matrices.

    Attributes:
      histograms: of the entries of the deductive outputs, and of P and a.
      parameters: the learned powers P and couplings a, [L,N,H,J]; {} without a PLGA network.
      attention_LNTS: attention weights of one prompt.
    """

    key = "structure"
    title = "Structure of the deductive outputs"
    histograms: dict[str, EntryHistograms]
    parameters: dict[str, np.ndarray]
    attention_LNTS: np.ndarray

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        spectrum_rows: int = SPECTRUM_ROWS,
        prompt_tokens: int = PROMPT_TOKENS,
    ) -> Self:
        """Measures the deductive outputs of rows; with a predefined G_LM, that tensor alone.

        Args:
          rows_RC: all but the last token of each row are inputs.
          spectrum_rows: rows whose tensors are also decomposed one by one.
          prompt_tokens: tokens of the first row that are the prompt of the attention maps.

        Raises:
          ConfigError: rows that the model cannot take, or a setting below 1 (2 for
            `prompt_tokens`).
        """
        check_rows(model.config, rows_RC)
        check_at_least("batch_size", settings.batch_size, 1)
        check_at_least("spectrum_rows", spectrum_rows, 1)
        check_at_least("prompt_tokens", prompt_tokens, 2)
        learned = model.config.g_source == "learned"
        if learned:
            outputs = _row_statistics(model, rows_RC, spectrum_rows, settings)
        else:
            outputs = {"G_LM": _predefined_statistics(model)}
            settings.advance(len(rows_RC))
        plga = model.params["layers"]["attention"].get("plga")
        parameters = {name: np.asarray(plga[name]) for name in ("P", "a")} if plga else {}
        of_parameters = {name: EntryHistograms() for name in parameters}
        for name, x_LNHJ in parameters.items():
            of_parameters[name].add(x_LNHJ)
        histograms = {name: x.entries for name, x in outputs.items()} | of_parameters
        attention_LNTS = prompt_attention(model, rows_RC[0, :-1][:prompt_tokens])
        numbers: dict[str, Any] = {
            "rows": len(rows_RC) if learned else 0,
            "decomposed_rows": min(spectrum_rows, len(rows_RC)) if learned else 0,
            "head_dim": model.config.head_dim,
            "outputs": {name: x.numbers() for name, x in outputs.items()},
            "parameters": {name: _lists(x.results()) for name, x in of_parameters.items()},
            "attention": _lists(describe_attention(attention_LNTS)),
        }
        numbers["verdict"] = ", ".join(matrix_kind("G_LM", numbers))
        return cls(
            numbers=numbers,
            tensors=_tensors(outputs, histograms),
            histograms=histograms,
            parameters=parameters,
            attention_LNTS=attention_LNTS,
        )

    def words(self) -> tuple[str, ...]:
        return structure_words(self.numbers)

    def tables(self) -> tuple[Table, ...]:
        return structure_tables(self.numbers)

    def figures(self) -> tuple[Picture, ...]:
        return structure_figures(
            self.tensors, self.histograms, self.parameters, self.attention_LNTS
        )


class OutputStatistics:
    """Statistics of one deductive output over rows: memory does not grow with rows.

    Attributes:
      tensor: the mean tensor [L,N,H,J].
      of_rows: statistics of the tensors of single rows, [L,N] each.
      entries: their distribution.
    """

    def __init__(self) -> None:
        self.tensor, self.entries = RunningStatistics(), EntryHistograms()
        self.of_rows: dict[str, RunningStatistics] = {}

    def add(self, x_LNHJ: np.ndarray, dag_LN: np.ndarray | None, decompose: bool) -> None:
        """Adds one row's tensor and its DAG loss."""
        self.tensor.add(x_LNHJ[None])
        self.entries.add(x_LNHJ)
        values = describe_matrices(x_LNHJ) if decompose else {}
        if dag_LN is not None:
            values["dag_loss"] = dag_LN
        for name, value_LN in values.items():
            self.of_rows.setdefault(name, RunningStatistics()).add(np.asarray(value_LN)[None])

    def numbers(self) -> dict[str, Any]:
        """For the numbers of the section."""
        return {
            "mean_tensor": _lists(describe_matrices(self.tensor.mean)),
            "of_rows": {
                name: _lists({"mean": x.mean, "min": x.min, "max": x.max})
                for name, x in self.of_rows.items()
            },
            "entries": _lists(self.entries.results()),
        }


def outputs_and_dag(
    config: ModelConfig, params: Params, tokens_BT: jax.Array
) -> tuple[DeductiveOutputs, dict[str, jax.Array]]:
    """Deductive outputs [L,B,N,H,J] of rows, and the DAG losses [L,B,N] of A_LM, A_P and G_LM; a
    pure function.
    """
    _, layers = apply(Decoder(config), params, Decoder.hidden, tokens_BT)
    tensors = dict(layers.deductive.items())
    dag = {name: matrix_dag_losses(x) for name, x in tensors.items() if name != "A"}
    return layers.deductive, dag


def matrix_dag_losses(x: jax.Array) -> jax.Array:
    """log(tr(exp(X * X)) / H) of each matrix of [..., H, H] (arXiv 2410.16703)."""
    return log_trace_expm(x**2)


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> Callable[..., Any]:
    return jax.jit(functools.partial(outputs_and_dag, quick_to_compile(config)))


def _row_statistics(
    model: LanguageModel, rows_RC: np.ndarray, spectrum_rows: int, settings: Settings
) -> dict[str, OutputStatistics]:
    outputs: dict[str, OutputStatistics] = {}
    done, outputs_of = 0, _jitted(model.config)
    for batch_BC, real in batches(rows_RC, settings.batch_size):
        with mesh_scope(model.mesh):
            deductive, dag = jax.device_get(outputs_of(model.params, batch_BC[:, :-1]))
        for b in range(real):
            for name, x_LBNHJ in deductive.items():
                dag_LN = dag[name][:, b] if name in dag else None
                statistics = outputs.setdefault(name, OutputStatistics())
                statistics.add(x_LBNHJ[:, b], dag_LN, done < spectrum_rows)
            done += 1
            settings.advance(1)
    return outputs


def _predefined_statistics(model: LanguageModel) -> OutputStatistics:
    statistics = OutputStatistics()
    x_LNHJ = np.asarray(predefined_or_identity(model))[:, 0]
    statistics.add(x_LNHJ, np.asarray(matrix_dag_losses(jnp.asarray(x_LNHJ))), decompose=True)
    return statistics


def _tensors(
    outputs: dict[str, OutputStatistics], histograms: dict[str, EntryHistograms]
) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for name, statistics in outputs.items():
        tensors[f"mean_{name}"] = statistics.tensor.mean.astype(np.float32)
        tensors[f"singular_values_{name}"] = singular_values(statistics.tensor.mean)
    for name, entries in histograms.items():
        tensors[f"linear_edges_{name}"] = entries.linear_edges
        tensors[f"linear_counts_{name}"] = entries.linear_counts
        tensors[f"positive_counts_{name}"] = entries.positive_counts
        tensors[f"negative_counts_{name}"] = entries.negative_counts
        tensors["log10_magnitude_edges"] = entries.log_edges
    return tensors


def _lists(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: np.asarray(x).tolist() for name, x in values.items()}
