"""Structure in words."""

from typing import Any

import numpy as np

SINGULAR = 1e6
"""Condition numbers from here on are called singular: solving with such a matrix in float32 leaves
less than one certain digit.
"""

RANK = "rank_0.001"
"""The numerical rank that the words go by, at a relative tolerance of 1e-3."""

LOW_RANK, FULL_RANK = 0.25, 0.75
"""Shares of H: a median rank of at most the first is low, from the second on full."""

SYMMETRIC, UNRELATED = 1e-3, 1.2
"""||X - X^T|| / ||X||: up to the first symmetric; from the second on hardly more so than
independent entries, which have sqrt(2) = 1.41.
"""

SPARSE = 0.5
"""Share of entries below 1e-3 of the largest magnitude from which a tensor is called sparse."""


def structure_words(numbers: dict[str, Any]) -> tuple[str, ...]:
    """Paragraphs, the verdict on G_LM first."""
    first = _matrix_words("G_LM", numbers)
    if not numbers["rows"]:
        source = "G_LM is predefined: this is the tensor itself, the same for every row, and there"
        return first, f"{source} is no A, A_LM or A_P."
    others = tuple(_matrix_words(name, numbers) for name in ("A_LM", "A_P", "A"))
    return first, _row_words(numbers), *others, _power_words(numbers)


def matrix_kind(name: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    """The words for the rank, symmetry and sparsity of a mean tensor; "not finite" alone of one
    that holds NaN or infinity.
    """
    mean = numbers["outputs"][name]["mean_tensor"]
    if not np.isfinite(mean["norm"]).all():
        return ("not finite",)
    rank = np.median(mean[RANK]) / numbers["head_dim"]
    asymmetry, small = np.median(mean["asymmetry"]), np.median(mean["small_0.001"])
    low, full = rank <= LOW_RANK, rank >= FULL_RANK
    symmetric, unrelated = asymmetry <= SYMMETRIC, asymmetry >= UNRELATED
    return (
        "of low rank" if low else "of full rank" if full else "of middle rank",
        "symmetric" if symmetric else "not symmetric" if unrelated else "partly symmetric",
        "sparse" if small >= SPARSE else "dense",
    )


def _matrix_words(name: str, numbers: dict[str, Any]) -> str:
    mean = numbers["outputs"][name]["mean_tensor"]
    if (words := matrix_kind(name, numbers)) == ("not finite",):
        finite = np.isfinite(mean["norm"])
        return f"{name} is not finite in {int((~finite).sum())} of {finite.size} heads."
    ranks_LN, condition_LN = np.array(mean[RANK]), np.array(mean["condition"])
    by_layer = ", ".join(f"{value:g}" for value in np.median(ranks_LN, axis=1))
    singular = int((condition_LN >= SINGULAR).sum())
    return (
        f"{name} is {', '.join(words)}. Median rank of the heads of each layer at a "
        f"relative 1e-3: {by_layer}, of {numbers['head_dim']}; {int((ranks_LN == 1).sum())} of "
        f"{ranks_LN.size} heads have rank 1, and {singular} are singular (condition number "
        f"{SINGULAR:.0e} or more). Effective rank {np.median(mean['effective_rank']):.1f}, "
        f"||X - X^T|| / ||X|| {np.median(mean['asymmetry']):.2f}, share of entries below 1e-3 of "
        f"the largest {np.median(mean['small_0.001']):.0%} (medians over heads)."
    )


def _row_words(numbers: dict[str, Any]) -> str:
    rank = numbers["outputs"]["G_LM"]["of_rows"][RANK]
    spread_LN = np.array(rank["max"]) - np.array(rank["min"])
    off_LN = np.array(rank["mean"]) - numbers["outputs"]["G_LM"]["mean_tensor"][RANK]
    if not np.isfinite(spread_LN).all():
        broken = int((~np.isfinite(spread_LN)).sum())
        return f"G_LM of single rows is not finite in {broken} of {spread_LN.size} heads."
    return (
        f"These are of the mean over {numbers['rows']} rows. Of {numbers['decomposed_rows']} rows "
        "decomposed one by one, the rank of G_LM changes with the row in "
        f"{int((spread_LN > 0).sum())} of {spread_LN.size} heads, by {spread_LN.max():.0f} at "
        "most; on average over rows it is off that of the mean tensor by "
        f"{np.abs(off_LN).max():.1f} at most."
    )


def _power_words(numbers: dict[str, Any]) -> str:
    powers, couplings = numbers["parameters"]["P"], numbers["parameters"]["a"]
    shares = [np.mean(x["negative"]) for x in (powers, couplings)]
    return (
        f"The learned powers P lie between {np.min(powers['min']):.3g} and "
        f"{np.max(powers['max']):.3g}, {shares[0]:.0%} of them negative; the couplings a between "
        f"{np.min(couplings['min']):.3g} and {np.max(couplings['max']):.3g}, {shares[1]:.0%} "
        "negative."
    )
