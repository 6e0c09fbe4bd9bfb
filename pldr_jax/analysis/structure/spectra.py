"""Spectra and shape of matrices: what a stack of H x H tensors looks like to linear algebra. Plain
NumPy, in float64.
"""

import numpy as np

RANK_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
"""Singular values above this share of the largest one count for the numerical rank."""

SPARSITY_TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-6)
"""Entries below this share of the largest magnitude count as small."""


def singular_values(x: np.ndarray) -> np.ndarray:
    """Of matrices [..., H, H], largest first, [..., H]; NaN where a matrix is not finite."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x).all((-2, -1))
    values = np.linalg.svd(np.where(finite[..., None, None], x, 0.0), compute_uv=False)
    return np.where(finite[..., None], values, np.nan)


def numerical_rank(values: np.ndarray, tolerance: float) -> np.ndarray:
    """How many singular values [..., H] are above `tolerance` times the largest; 0 of a zero
    matrix.
    """
    return (values > tolerance * values[..., :1]).sum(-1)


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
    return (x < tolerance * x.max((-2, -1), keepdims=True)).mean((-2, -1))


def describe(x: np.ndarray) -> dict[str, np.ndarray]:
    """Everything above of matrices [..., H, H], each [...]: `rank_<tolerance>`, `effective_rank`,
    `condition`, `asymmetry`, `diagonal_share`, `small_<tolerance>`, `norm` and `largest`.
    """
    values = singular_values(x)
    of = {f"rank_{t:g}": numerical_rank(values, t) for t in RANK_TOLERANCES}
    of |= {
        "effective_rank": effective_rank(values),
        "condition": condition_number(values),
        "asymmetry": asymmetry(x),
        "diagonal_share": diagonal_share(x),
    }
    of |= {f"small_{t:g}": small_share(x, t) for t in SPARSITY_TOLERANCES}
    magnitudes = np.abs(np.asarray(x, np.float64))
    return {
        **of,
        "norm": np.linalg.norm(magnitudes, axis=(-2, -1)),
        "largest": magnitudes.max((-2, -1)),
    }


class RowStatistics:
    """Mean, smallest and largest of named values over rows, in float64."""

    def __init__(self) -> None:
        self._sum: dict[str, np.ndarray] = {}
        self._low: dict[str, np.ndarray] = {}
        self._high: dict[str, np.ndarray] = {}
        self.rows = 0

    def add(self, values: dict[str, np.ndarray]) -> None:
        """Adds one row's values, the same names and shapes every time."""
        for name, value in values.items():
            x = np.asarray(value, np.float64)
            self._sum[name] = self._sum.get(name, 0.0) + x
            self._low[name] = np.minimum(self._low.get(name, x), x)
            self._high[name] = np.maximum(self._high.get(name, x), x)
        self.rows += 1

    def results(self) -> dict[str, dict[str, np.ndarray]]:
        """`mean`, `min` and `max` of each name."""
        return {
            name: {
                "mean": total / self.rows,
                "min": self._low[name],
                "max": self._high[name],
            }
            for name, total in self._sum.items()
        }
