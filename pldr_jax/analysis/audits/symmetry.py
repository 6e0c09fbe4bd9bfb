"""Symmetry: how far G_LM commutes with the rotations of RoPE, so that scores depend on relative
position alone.
"""

import dataclasses
from typing import Self

import numpy as np

from pldr_jax.analysis.batches import batches, check_finite, check_rows, deductive_tensors
from pldr_jax.analysis.figures import heat_map, picture
from pldr_jax.analysis.section import DEFAULTS, ModelSection, Picture, Settings, Table
from pldr_jax.analysis.statistics import RunningStatistics
from pldr_jax.api import LanguageModel
from pldr_jax.model.audits import (
    commutant_residual,
    rope_frequencies,
    twirl_damping,
    twirl_frequencies,
    twirled,
)
from pldr_jax.plots import new_figure

TWIRL_POSITIONS = (64, 256, 1024)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Symmetry(ModelSection):
    """Commutant residual of G_LM by layer and head, and what averaging over positions leaves."""

    key = "symmetry"
    title = "G_LM and relative position"

    @classmethod
    def measure(
        cls, model: LanguageModel, rows_RC: np.ndarray, settings: Settings = DEFAULTS
    ) -> Self:
        """The residual is that of the G_LM of each row, and the twirl that of their mean.

        Raises:
          ConfigError: rows that the model cannot take, or a G_LM that is not finite.
        """
        config = model.config
        check_rows(config, rows_RC)
        residual, g_lm = RunningStatistics(), RunningStatistics()
        for batch_BC, real in batches(rows_RC, settings.batch_size):
            G_LM = np.moveaxis(deductive_tensors(model, batch_BC[:, :-1])["G_LM"][:, :real], 1, 0)
            check_finite("entries of G_LM", G_LM)
            residual.add(commutant_residual(config, G_LM))
            g_lm.add(G_LM)
            settings.advance(real)
        frequencies = twirl_frequencies(config)
        slowest = twirl_damping(2 * rope_frequencies(config)[-1:], TWIRL_POSITIONS[-1])
        norm = np.linalg.norm(g_lm.mean, axis=(-2, -1))
        return cls(
            numbers={
                "rows": len(rows_RC),
                "commutant_residual": residual.mean.tolist(),
                "median": float(np.median(residual.mean)),
                "twirl": {
                    "frequencies": len(frequencies),
                    "largest_inverse_sine": float((1 / np.abs(np.sin(frequencies / 2))).max()),
                    "slowest_in_plane": float(slowest[0]),
                    "median_damping": {
                        str(s): float(np.median(twirl_damping(frequencies, s)))
                        for s in TWIRL_POSITIONS
                    },
                    "norm_left": {
                        str(s): float(np.median(_norm_left(twirled(config, g_lm.mean, s), norm)))
                        for s in TWIRL_POSITIONS
                    },
                },
            },
            tensors={"commutant_residual": residual.mean},
        )

    def words(self) -> tuple[str, ...]:
        residual_LN = np.asarray(self.numbers["commutant_residual"])
        left = self.numbers["twirl"]["norm_left"]
        return (
            "The commutant residual of G_LM, the share of its norm that makes scores depend on "
            f"absolute position, is {self.numbers['median']:.3g} in the median over the heads, "
            f"{residual_LN.min():.3g} at the lowest and {residual_LN.max():.3g} at the highest: 0 "
            "commutes with every rotation of RoPE, 1 has no such part.",
            "Averaged over positions, what is left of the norm of the mean G_LM is "
            + ", ".join(f"{share:.3g} over {s}" for s, share in left.items())
            + " of them (medians over the heads).",
        )

    def tables(self) -> tuple[Table, ...]:
        residual_LN = np.asarray(self.numbers["commutant_residual"])
        rows = tuple(
            (i, *map(float, (x.min(), np.median(x), x.max()))) for i, x in enumerate(residual_LN)
        )
        twirl = self.numbers["twirl"]
        damping = tuple(
            (int(s), twirl["median_damping"][s], twirl["norm_left"][s])
            for s in twirl["median_damping"]
        )
        return (
            Table("Commutant residual", ("layer", "lowest", "median", "highest"), rows),
            Table(
                "Twirl: the mean over positions",
                ("positions", "damping, median over frequencies", "norm of G_LM left, median"),
                damping,
            ),
        )

    def figures(self) -> tuple[Picture, ...]:
        residual_LN = self.tensors["commutant_residual"]
        figure, axes = new_figure(1, 1, 5.0, 3.0)
        axis = axes[0, 0]
        figure.colorbar(heat_map(axis, residual_LN, center=False), ax=axis)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        return (picture("symmetry_commutant", "Commutant residual of G_LM.", figure),)


def _norm_left(G_LM: np.ndarray, norm_LN: np.ndarray) -> np.ndarray:
    return np.linalg.norm(G_LM, axis=(-2, -1)) / np.where(norm_LN == 0, 1.0, norm_LN)
