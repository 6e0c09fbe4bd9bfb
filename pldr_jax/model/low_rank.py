"""G_LM of low rank: factors with which keys are cached as vectors of E numbers instead of H.

Where G_LM = U S V^T is nearly singular, scores q G_LM k^T / sqrt(H) of its first E singular vectors
are (q U S) (V^T k)^T / sqrt(H): the query meets U S, and the cache holds V^T k. Keys are rotated
(RoPE) before they meet V, so that nothing of the positions is lost; at E = H nothing is lost at
all.
"""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig

RANK_TOLERANCE = 1e-3
"""Singular values above this share of the largest count for the rank that reports quote."""
MAX_GROUPS = 4
"""Groups of heads in a layer, at most: each is one set of arrays, and costs its own operations."""


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


class HeadGroup(flax.struct.PyTreeNode):
    """Heads of one layer that keep the same rank.

    Attributes:
      query_NHE: U S of each head, float32.
      key_NHE: V of each head, float32; its columns are orthonormal.
      heads: which heads of the layer these are.
    """

    query_NHE: jax.Array
    key_NHE: jax.Array
    heads: tuple[int, ...] = flax.struct.field(pytree_node=False)


class LowRankG(flax.struct.PyTreeNode):
    """One G_LM for all rows, of limited rank in every head.

    Attributes:
      G_LM: the product of the factors [L,1,N,H,J], float32, for whole forward passes.
      layers: the factors; of each layer one or more groups, which share out its heads.
    """

    G_LM: jax.Array
    layers: tuple[tuple[HeadGroup, ...], ...]

    @property
    def ranks(self) -> np.ndarray:
        """E of every head, [L,N]."""
        ranks_LN = np.zeros((self.G_LM.shape[0], self.G_LM.shape[2]), np.int64)
        for layer, groups in enumerate(self.layers):
            for group in groups:
                ranks_LN[layer, list(group.heads)] = group.key_NHE.shape[-1]
        return ranks_LN


def smallest_ranks(values_LNH: np.ndarray, budget: float) -> np.ndarray:
    """The smallest rank r of every head, [L,N], at least 1, that keeps to an error budget.

    The error of leaving out all singular values but the r largest is, in the Frobenius norm and
    relative to G_LM, ||G - G_r|| / ||G|| = sqrt(sum of the squares left out / sum of all squares).

    Args:
      values_LNH: singular values, falling.
      budget: the largest error, 0 for none.
    """
    squares_LNH = np.square(np.asarray(values_LNH, np.float64))
    left_out_LNH = np.cumsum(squares_LNH[..., ::-1], axis=-1)[..., ::-1]
    ranks_LN = (left_out_LNH > budget**2 * left_out_LNH[..., :1]).sum(-1)
    return np.maximum(ranks_LN, 1)


def group_heads(
    ranks_N: np.ndarray, max_groups: int = MAX_GROUPS, shards: int = 1
) -> list[tuple[tuple[int, ...], int]]:
    """(heads, rank E) of each group: what costs the fewest cached numbers, each head keeping E, the
    largest rank of its group.

    Args:
      ranks_N: of the heads of one layer.
      max_groups: groups, at most.
      shards: devices that heads are split over; the size of every group is a multiple of it, unless
        the number of heads is not.
    """
    n = len(ranks_N)
    step = shards if n % shards == 0 else 1
    order = np.argsort(-np.asarray(ranks_N), kind="stable")
    ranks = [int(ranks_N[head]) for head in order]
    # Heads in the order of falling ranks; best[end]: cost, number and ends of the groups that the
    # first `end` of them make.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for _ in range(max_groups):
        longer = {
            end: min(
                (cost + (end - start) * ranks[start], count + 1, (*ends, end))
                for start, (cost, count, ends) in best.items()
                if start < end
            )
            for end in range(step, n + 1, step)
        }
        best |= {end: min(found, best.get(end, found)) for end, found in longer.items()}
    ends = best[n][2]
    return [
        (tuple(sorted(int(head) for head in order[start:end])), ranks[start])
        for start, end in itertools.pairwise(ends)
    ]


def factorize(
    g_lm: jax.Array | np.ndarray,
    budget: float,
    max_groups: int = MAX_GROUPS,
    shards: int = 1,
) -> LowRankG:
    """The factors of a G_LM within an error budget, from a singular value decomposition in float64
    on the host.

    Args:
      g_lm: [L,1,N,H,J], or [L,N,H,J].
      budget: the largest relative error of a head in the Frobenius norm (`smallest_ranks`); 0 keeps
        every rank that is there.
      max_groups, shards: of `group_heads`. A head of a group with a larger rank uses all of it.

    Raises:
      ConfigError: the budget is not in [0,1], G_LM is not one for all prompts, or not finite.
    """
    check_budget(budget)
    g_lm_LNHJ = np.asarray(jax.device_get(g_lm), np.float64)
    if g_lm_LNHJ.ndim == 5 and g_lm_LNHJ.shape[1] == 1:
        g_lm_LNHJ = g_lm_LNHJ[:, 0]
    if g_lm_LNHJ.ndim != 4:
        raise ConfigError(
            f"rank_budget: G_LM has shape {g_lm_LNHJ.shape}; one [L,N,H,H] for all prompts is "
            "needed"
        )
    if not np.isfinite(g_lm_LNHJ).all():
        raise ConfigError("rank_budget: G_LM has entries that are not finite and has no rank")
    u_LNHJ, values_LNH, vt_LNHJ = np.linalg.svd(g_lm_LNHJ)
    query_LNHJ, key_LNHJ = u_LNHJ * values_LNH[..., None, :], np.swapaxes(vt_LNHJ, -1, -2)
    kept_LNHJ = np.zeros_like(g_lm_LNHJ)
    layers = []
    for i, ranks_N in enumerate(smallest_ranks(values_LNH, budget)):
        groups = []
        for heads, rank in group_heads(ranks_N, max_groups, shards):
            query_NHE, key_NHE = (x[i, list(heads), :, :rank] for x in (query_LNHJ, key_LNHJ))
            kept_LNHJ[i, list(heads)] = np.einsum("NHE,NJE->NHJ", query_NHE, key_NHE)
            query, key = jnp.asarray(query_NHE, jnp.float32), jnp.asarray(key_NHE, jnp.float32)
            groups.append(HeadGroup(query, key, heads))
        layers.append(tuple(groups))
    return LowRankG(jnp.asarray(kept_LNHJ[:, None], jnp.float32), tuple(layers))


def check_budget(budget: float, field: str = "rank_budget") -> None:
    """ConfigError unless the budget is a relative error."""
    if not 0 <= budget <= 1:
        raise ConfigError(f"{field} = {budget}: must be in [0,1], a relative error of G_LM")


def no_shared_g_lm(config: ModelConfig) -> ConfigError:
    """What to raise where there is no G_LM to spend a rank budget on, with the remedy."""
    if config.g_source == "identity":
        return ConfigError("rank_budget: G_LM is the identity here, of full rank; leave it out")
    return ConfigError(
        "rank_budget: G_LM differs between prompts here; freeze the checkpoint "
        "(pldr-freeze), or let all prompts share one (Generation.g_mode = 'first' or 'frozen')"
    )
