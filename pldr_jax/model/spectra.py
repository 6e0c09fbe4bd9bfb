"""Singular values and the numerical rank of matrices, in NumPy and float64."""

import numpy as np

RANK_TOLERANCE = 1e-3
"""Singular values above this share of the largest count for the rank that reports quote."""


def singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values of matrices [..., H, J], largest first; NaN where a matrix is not finite."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x).all((-2, -1))
    values = np.linalg.svd(np.where(finite[..., None, None], x, 0.0), compute_uv=False)
    return np.where(finite[..., None], values, np.nan)


def numerical_rank(values: np.ndarray, tolerance: float = RANK_TOLERANCE) -> np.ndarray:
    """How many singular values [..., H] are above `tolerance` times the largest: 0 of a zero
    matrix. Integers, unless some matrix is not finite: its rank is NaN.
    """
    rank = (values > tolerance * values[..., :1]).sum(-1)
    broken = np.isnan(values).any(-1)
    return np.where(broken, np.nan, rank) if broken.any() else rank
