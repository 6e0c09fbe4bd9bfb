"""Symmetry, sparsity and rank of a stack of matrices, in NumPy and float64."""

import numpy as np

from pldr_jax.model.low_rank import numerical_rank, singular_values

RANK_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Tolerances, relative to the largest singular value, of the numerical ranks that are reported."""

SPARSITY_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-6)
"""Entries below this share of the largest magnitude count as small."""


def effective_rank(values: np.ndarray) -> np.ndarray:
    """exp of the entropy of the singular values [..., H] as a distribution (Roy and Vetterli,
    2007): 1 for rank one, H for H equal ones; 0 of a zero matrix.
    """
    total = values.sum(-1, keepdims=True)
    p = values / np.where(total > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))


def condition_number(values: np.ndarray) -> np.ndarray:
    """Largest over smallest singular value; infinite where the smallest is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values[..., -1] == 0, np.inf, values[..., 0] / values[..., -1])


def asymmetry(x: np.ndarray) -> np.ndarray:
    """||X - X^T|| / ||X|| (Frobenius): 0 of a symmetric matrix, 2 of an antisymmetric one, sqrt(2)
    of independent entries of mean 0; 0 of a zero matrix.
    """
    x = np.asarray(x, np.float64)
    norm = np.linalg.norm(x, axis=(-2, -1))
    difference = np.linalg.norm(x - np.swapaxes(x, -2, -1), axis=(-2, -1))
    return difference / np.where(norm == 0, 1.0, norm)


def diagonal_share(x: np.ndarray) -> np.ndarray:
    """Share of the squared Frobenius norm that lies on the diagonal: 1 / H where the entries are
    all alike, 1 of a diagonal matrix.
    """
    x = np.square(np.asarray(x, np.float64))
    total = x.sum((-2, -1))
    return np.trace(x, axis1=-2, axis2=-1) / np.where(total == 0, 1.0, total)


def small_share(x: np.ndarray, tolerance: float) -> np.ndarray:
    """Share of the entries with a magnitude below `tolerance` times the matrix's largest."""
    x = np.abs(np.asarray(x, np.float64))
    largest = x.max((-2, -1), keepdims=True)
    share = (x < tolerance * largest).mean((-2, -1))
    return np.where(np.isnan(largest[..., 0, 0]), np.nan, share)


def describe_matrices(x: np.ndarray) -> dict[str, np.ndarray]:
    """Everything above of matrices [..., H, H], each [...]: `rank_<tolerance>`, `effective_rank`,
    `condition`, `asymmetry`, `diagonal_share`, `small_<tolerance>`, `norm` and `largest`; all NaN
    where a matrix is not finite.
    """
    x = np.asarray(x, np.float64)
    x = np.where(np.isfinite(x).all((-2, -1), keepdims=True), x, np.nan)
    values = singular_values(x)
    return {
        **{f"rank_{t:g}": numerical_rank(values, t) for t in RANK_TOLERANCES},
        "effective_rank": effective_rank(values),
        "condition": condition_number(values),
        "asymmetry": asymmetry(x),
        "diagonal_share": diagonal_share(x),
        **{f"small_{t:g}": small_share(x, t) for t in SPARSITY_TOLERANCES},
        "norm": np.linalg.norm(x, axis=(-2, -1)),
        "largest": np.abs(x).max((-2, -1)),
    }
