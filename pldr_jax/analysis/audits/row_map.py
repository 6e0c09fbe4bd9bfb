"""The row map: what the metric learner makes of single rows of LayerNorm(Q^T Q), and how far the
rows of A differ.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from pldr_jax.analysis.batches import (
    batches,
    check_finite,
    check_rows,
    deductive_tensors,
    quick_to_compile,
)
from pldr_jax.analysis.figures import heat_map, picture
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.model.audits import (
    FLAT,
    contraction,
    median_sigma,
    row_contrast,
    row_map_jacobians,
    visited_rows,
)
from pldr_jax.partition import mesh_scope
from pldr_jax.plots import COLORS, new_figure

VISITED_ROWS = 256
"""Rows of LayerNorm(Q^T Q) of each layer at which the map is measured, at most, by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowMap(ModelSection):
    """Jacobian, contraction and image of the row map phi, and the row contrast of A."""

    key = "row_map"
    title = "Row map of the metric learner"

    @classmethod
    def measure(
        cls,
        model: LanguageModel,
        rows_RC: np.ndarray,
        settings: Settings = DEFAULTS,
        visited: int = VISITED_ROWS,
    ) -> Self:
        """Measures phi at rows that held-out text visits, chosen at random.

        Args:
          visited: rows of LayerNorm(Q^T Q) of each layer, at most; all pairs of them are compared.

        Raises:
          ConfigError: rows that the model cannot take, or a row map that is not finite.
        """
        check_rows(model.config, rows_RC)
        if model.config.g_source != "learned":
            settings.advance(len(rows_RC))
            return cls(numbers={"by_construction": True})
        inputs, images = _jitted(model.config)
        pool: list[np.ndarray] = []
        contrast = RunningStatistics()
        share = max(1, visited // len(rows_RC))  # of each row of text
        for batch_BC, real in batches(rows_RC, settings.batch_size):
            tokens_BT = batch_BC[:, :-1]
            with mesh_scope(model.mesh):
                rows_LBNHJ = np.asarray(inputs(model.params, tokens_BT))[:, :real]
            for rows_LNHJ in np.moveaxis(rows_LBNHJ, 1, 0):
                flat = rows_LNHJ.reshape(len(rows_LNHJ), -1, model.config.head_dim)
                order = np.random.default_rng(len(pool)).permutation(flat.shape[1])
                pool.append(flat[:, order[:share]])
            A_LBNHJ = deductive_tensors(model, tokens_BT)["A"][:, :real].astype(np.float64)
            contrast.add(np.moveaxis(row_contrast(A_LBNHJ), 1, 0))
            settings.advance(real)
        rows_LRH = np.concatenate(pool, axis=1)[:, :visited]
        with mesh_scope(model.mesh):
            phi_LRH, jacobians_LRHJ = jax.device_get(images(model.params, rows_LRH))
        check_finite("rows of A", jacobians_LRHJ)
        values_LRH = np.linalg.svd(np.asarray(jacobians_LRHJ, np.float64), compute_uv=False)
        pairs = [contraction(rows, phi) for rows, phi in zip(rows_LRH, phi_LRH, strict=True)]
        sigma_LR, median = values_LRH[..., 0], float(median_sigma(values_LRH[..., 0].ravel()))
        return cls(
            numbers={
                "verdict": "flat" if median < FLAT else "not flat",
                "by_construction": False,
                "rows": rows_LRH.shape[1],
                "sigma": median,
                "sigma_by_layer": {
                    "median": median_sigma(sigma_LR).tolist(),
                    "max": sigma_LR.max(1).tolist(),
                },
                "contraction": {
                    "median": [float(np.median(ratios)) for ratios, _ in pairs],
                    "max": [float(ratios.max(initial=0.0)) for ratios, _ in pairs],
                },
                "diameter": [diameter for _, diameter in pairs],
                "row_contrast": contrast.mean.tolist(),
            },
            tensors={"singular_values": values_LRH},
        )

    def words(self) -> tuple[str, ...]:
        numbers = self.numbers
        if numbers["by_construction"]:
            return ("This model has no metric learner: there is no row map.",)
        contrast_LN = np.asarray(numbers["row_contrast"])
        return (
            f"The row map is {numbers['verdict']}: the median over {numbers['rows']} rows of each "
            "layer of the largest singular value of its Jacobian is "
            f"{numbers['sigma']:.3g} (flat below {FLAT:g}).",
            "Pairs of rows are brought closer to or further from each other by a factor of "
            f"{np.median(numbers['contraction']['median']):.2g} in the median and of "
            f"{np.max(numbers['contraction']['max']):.2g} at most; images lie within "
            f"{np.max(numbers['diameter']):.2g} of each other.",
            f"The row contrast of A is {contrast_LN.min():.2g} to {contrast_LN.max():.2g} over the "
            "heads, on average over texts; 0 is one row, repeated.",
        )

    def tables(self) -> tuple[Table, ...]:
        numbers = self.numbers
        if numbers["by_construction"]:
            return ()
        sigma, ratio = numbers["sigma_by_layer"], numbers["contraction"]
        contrast = numbers["row_contrast"]
        columns = (sigma["median"], sigma["max"], ratio["median"], ratio["max"])
        rows = zip(
            *columns, numbers["diameter"], map(min, contrast), map(max, contrast), strict=True
        )
        headings = (
            "layer", "largest singular value, median", "max", "contraction, median", "max",
            "diameter of the image", "row contrast of A, lowest", "highest",
        )  # fmt: skip
        return (
            Table("Row map by layer", headings, tuple((i, *row) for i, row in enumerate(rows))),
        )

    def figures(self) -> tuple[Picture, ...]:
        if self.numbers["by_construction"]:
            return ()
        figure, axes = new_figure(1, 2, 9.0, 3.4)
        spectra, heads = axes[0]
        for layer, values_RH in enumerate(self.tensors["singular_values"]):
            place = np.arange(1, values_RH.shape[1] + 1)
            median = np.maximum(np.median(values_RH, axis=0), 1e-12)
            color = COLORS[layer % len(COLORS)]
            spectra.semilogy(place, median, color=color, label=f"layer {layer}")
        spectra.set_xlabel("singular value")
        spectra.set_title("Jacobian of the row map, median over rows", fontsize=9)
        spectra.legend(fontsize=8)
        contrast_LN = np.asarray(self.numbers["row_contrast"])
        figure.colorbar(heat_map(heads, contrast_LN, "row contrast of A", center=False), ax=heads)
        heads.set_xlabel("head")
        heads.set_ylabel("layer")
        caption = "How the metric learner maps rows, and how far the rows of A differ in each head."
        return (picture("row_map", caption, figure),)


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    quick = quick_to_compile(config)
    return (
        jax.jit(functools.partial(visited_rows, quick)),
        jax.jit(functools.partial(row_map_jacobians, quick)),
    )
