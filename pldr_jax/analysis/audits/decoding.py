"""Decoding: which greedy tokens rounding cannot change, and whether padding reaches real tokens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.analysis.batches import batches, check_finite, check_rows, quick_to_compile
from pldr_jax.analysis.figures import picture
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.model.audits import decode_margins
from pldr_jax.model.decoder import Params, forward
from pldr_jax.partition import mesh_scope
from pldr_jax.plots import COLORS, new_figure

PADDING = 4
"""Tokens of padding in the probe; rows that leave no place for them in the context are cut."""

PERTURBATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Of the logits, for which the share of certain greedy tokens is stated."""

QUANTILES_OF_MARGINS = (0.001, 0.01, 0.1, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(ModelSection):
    """Margins of greedy decoding, and the padding probe."""

    key = "decoding"
    title = "Margins and padding"

    @classmethod
    def measure(
        cls, model: LanguageModel, rows_RC: np.ndarray, settings: Settings = DEFAULTS
    ) -> Self:
        """Logits of the rows without padding, and with two different paddings behind them.

        Raises:
          ConfigError: rows that the model cannot take, or logits that are not finite.
        """
        check_rows(model.config, rows_RC)
        length = max(1, min(rows_RC.shape[1] - 1, model.config.context_length - PADDING))
        logits_of, margins = _jitted(model.config), []
        between, against_none, largest = 0.0, 0.0, 0.0
        for batch_BC, real in batches(rows_RC, settings.batch_size):
            tokens_BT = batch_BC[:, :length]
            with mesh_scope(model.mesh):
                alone, zeros, other = (
                    np.asarray(logits_of(model.params, tokens, model.g_lm, length))[:real, :length]
                    for tokens in (
                        tokens_BT,
                        _padded(tokens_BT, 0),
                        _padded(tokens_BT, model.config.vocab_size - 1),
                    )
                )
            check_finite("logits of held-out rows", alone)
            between = max(between, float(np.max(np.abs(zeros - other))))
            against_none = max(against_none, float(np.max(np.abs(zeros - alone))))
            largest = max(largest, float(np.max(np.abs(alone))))
            margins.append(decode_margins(alone))
            settings.advance(real)
        margin = np.concatenate(margins).ravel()
        return cls(
            numbers={
                "tokens": margin.size,
                "margin": {str(q): float(np.quantile(margin, q)) for q in QUANTILES_OF_MARGINS},
                "certain": {f"{d:g}": float((margin > 2 * d).mean()) for d in PERTURBATIONS},
                "padding": {
                    "between_paddings": between,
                    "with_and_without": against_none,
                    "largest_logit": largest,
                },
            },
            tensors={"margin": np.concatenate(margins)},
        )

    def words(self) -> tuple[str, ...]:
        probe, certain = self.numbers["padding"], self.numbers["certain"]
        verdict = (
            "Padding does not reach real tokens"
            if probe["between_paddings"] == 0
            else "Padding reaches real tokens"
        )
        return (
            f"{verdict}: their logits differ by {probe['between_paddings']:.1e} between two "
            f"contents of {PADDING} tokens of padding, and by {probe['with_and_without']:.1e} "
            f"between padding and none, which is rounding of other shapes (largest logit "
            f"{probe['largest_logit']:.3g}).",
            f"Of {self.numbers['tokens']} greedy tokens, {certain['0.0001']:.2%} are certain to be "
            f"the same under a perturbation of every logit by 1e-4, {certain['0.01']:.2%} by 1e-2.",
        )

    def tables(self) -> tuple[Table, ...]:
        return (
            Table(
                "Greedy tokens that a perturbation of the logits cannot change",
                ("perturbation of each logit", "share of the tokens"),
                tuple(self.numbers["certain"].items()),
            ),
            Table(
                "Largest minus second logit",
                ("quantile", "margin"),
                tuple(self.numbers["margin"].items()),
            ),
        )

    def figures(self) -> tuple[Picture, ...]:
        figure, axes = new_figure(1, 1, 6.0, 3.2)
        axis = axes[0, 0]
        margin = np.sort(self.tensors["margin"].ravel())
        axis.plot(np.maximum(margin, 1e-8), np.linspace(0, 1, len(margin)), color=COLORS[0])
        axis.set_xscale("log")
        axis.set_xlabel("largest minus second logit")
        axis.set_ylabel("share of tokens with a smaller margin")
        return (
            picture("decoding_margins", "Margins of greedy decoding on held-out rows.", figure),
        )


def _padded(tokens_BT: np.ndarray, token: int) -> np.ndarray:
    return np.pad(tokens_BT, ((0, 0), (0, PADDING)), constant_values=token)


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> Callable[..., Any]:
    quick = quick_to_compile(config)

    def logits(params: Params, tokens_BT: jax.Array, g_lm: Any, real: int) -> jax.Array:
        length_B = jnp.full(tokens_BT.shape[:1], real, jnp.int32)
        return forward(quick, params, tokens_BT, g_lm, length_B).logits

    return jax.jit(logits, static_argnums=3)
