"""Determinants of G_LM: how large they are, and in how many decimals those of two runs agree.

Computed on logarithms: no float can hold the determinant of a nearly singular 64 x 64 matrix.
"""

from typing import Any

import numpy as np

from pldr_jax.analysis.statistics import RunningStatistics

_LN10 = np.log(10.0)


class Determinants:
    """Running statistics of the determinants of sequences, by layer and head."""

    def __init__(self) -> None:
        self._logs, self._positive = RunningStatistics(), RunningStatistics()

    def add(self, x_LBNHJ: np.ndarray) -> None:
        """Adds the sequences of one batch."""
        sign_LBN, log_LBN = log_determinants(x_LBNHJ)
        self._logs.add(np.moveaxis(log_LBN, 1, 0))
        self._positive.add(np.moveaxis(np.where(np.isnan(sign_LBN), np.nan, sign_LBN > 0), 1, 0))

    def results(self) -> dict[str, Any]:
        """`log10_abs` (mean of log10 |det|), `log10_std` (its standard deviation between sequences)
        and `positive` (share of determinants above 0), each [L][N].
        """
        return {
            "log10_abs": (self._logs.mean / _LN10).tolist(),
            "log10_std": (self._logs.std / _LN10).tolist(),
            "positive": self._positive.mean.tolist(),
        }


class DeterminantAgreement:
    """The largest differences between the determinants of two runs, by layer and head."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._absolute_LN: np.ndarray = np.full((), -np.inf)
        self._relative_LN: np.ndarray = np.full((), -np.inf)

    def add(self, x_LBNHJ: np.ndarray) -> None:
        """Adds sequences of which each makes a pair with the next one."""
        before = [] if self._last is None else [self._last]
        chain = np.concatenate([*before, x_LBNHJ], axis=1)
        self._last = chain[:, -1:]
        self.add_pairs(chain[:, :-1], chain[:, 1:])

    def add_pairs(self, x_LBNHJ: np.ndarray, y_LBNHJ: np.ndarray) -> None:
        """Adds pairs of sequences, x and y of each row."""
        if not x_LBNHJ.shape[1]:
            return
        absolute, relative = log10_difference(x_LBNHJ, y_LBNHJ)
        self._absolute_LN = np.maximum(self._absolute_LN, absolute.max(1))
        self._relative_LN = np.maximum(self._relative_LN, relative.max(1))

    def results(self) -> dict[str, Any]:
        """`decimals` after the point in which all pairs agree, and `digits`: the same of the ratio
        of the two, each [L][N]; infinite where they are the same number, NaN where one is not
        finite.
        """
        decimals, digits = -self._absolute_LN, -self._relative_LN
        return {"decimals": decimals.tolist(), "digits": digits.tolist()}


def log_determinants(x_LBNHJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sign and ln |det|, each [L,B,N], in float64; NaN of a matrix that is not finite."""
    x = np.asarray(x_LBNHJ, np.float64)
    finite = np.asarray(np.isfinite(x).all((-2, -1)))
    sign, log = np.linalg.slogdet(np.where(finite[..., None, None], x, 0.0))
    return np.where(finite, sign, np.nan), np.where(finite, log, np.nan)


def log10_difference(x_LBNHJ: np.ndarray, y_LBNHJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log10 |det x - det y|, and of that over the larger of |det x| and |det y|; [L,B,N] each."""
    (x_sign, x_log), (y_sign, y_log) = log_determinants(x_LBNHJ), log_determinants(y_LBNHJ)
    largest = np.maximum(x_log, y_log)
    scale = np.where(np.isfinite(largest), largest, 0.0)  # both are 0: so is the difference
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.log(np.abs(x_sign * np.exp(x_log - scale) - y_sign * np.exp(y_log - scale)))
    return (relative + scale) / _LN10, relative / _LN10
