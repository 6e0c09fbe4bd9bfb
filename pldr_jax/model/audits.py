"""Diagnostics of the deductive outputs, as pure functions of arrays.

Sources: arXiv 2609.34130 (training dynamics) and 2608.10288 (mathematical foundations), whose names
these functions have. Those of NumPy compute in float64; those of JAX in the dtype they are given.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Decoder, Params

FLAT = 0.1
"""A row map is flat where the median over rows of its largest singular value is below this."""

OPERATOR_INVARIANT = 0.01
"""G_LM is operator-invariant where the stabilised order parameter of two continuations of a prompt
is below this."""


def stabilised_order(x: Any, y: Any, axes: tuple[int, ...] | None = None) -> Any:
    """rms(x - y) / ((rms x + rms y) / 2), over `axes` or all: 0 of equal tensors, also of two
    zero ones; at most 2. Works on NumPy and JAX arrays.
    """
    difference, size_x, size_y = ((z * z).mean(axes) ** 0.5 for z in (x - y, x, y))
    size = (size_x + size_y) / 2
    return difference / (size + (size == 0))


def row_contrast(A: Any) -> Any:
    """Mean squared deviation of the rows of A [..., H, J] from their centroid over that of all
    entries from their mean, [...]: 0 where A is one row, repeated. Works on NumPy and JAX arrays.
    """
    rows = A - A.mean(-2, keepdims=True)
    entries = A - A.mean((-2, -1), keepdims=True)
    size = (entries * entries).mean((-2, -1))
    return (rows * rows).mean((-2, -1)) / (size + (size == 0))


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """theta_a of the H / 2 rotated pairs, radians a token, float64, falling."""
    half = config.head_dim // 2
    frequencies: np.ndarray = config.rope_theta ** (-np.arange(half) / half)
    return frequencies


def rope_basis(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """The complex eigenvectors of all RoPE rotations, columns [H,H], and their frequencies [H].

    For pair a they are (e_x - i e_y) / sqrt(2) with theta_a and its conjugate with -theta_a; x and
    y are the two places that the layout of the config rotates into each other.
    """
    theta, width = rope_frequencies(config), config.head_dim
    half = width // 2
    first = np.arange(0, width, 2) if config.rope_layout == "interleaved" else np.arange(half)
    second = first + (1 if config.rope_layout == "interleaved" else half)
    basis = np.zeros((width, width), complex)
    pair = np.arange(half)
    basis[first, pair] = basis[first, pair + half] = np.sqrt(0.5)
    basis[second, pair], basis[second, pair + half] = -1j * np.sqrt(0.5), 1j * np.sqrt(0.5)
    return basis, np.concatenate([theta, -theta])


def commutant_residual(config: ModelConfig, G_LM: np.ndarray) -> np.ndarray:
    """Share of the Frobenius norm of G_LM [..., H, J] that does not commute with the rotations of
    RoPE, [...]: of the entries, in the eigenbasis of the rotations, whose two frequencies differ.

    0: scores depend on relative position alone. 1: no part of G_LM commutes. 0 of a zero matrix.
    """
    basis, frequencies = rope_basis(config)
    squares = np.square(np.abs(basis.conj().T @ np.asarray(G_LM, np.float64) @ basis))
    differs = frequencies[:, None] != frequencies
    total = squares.sum((-2, -1))
    return np.sqrt((squares * differs).sum((-2, -1)) / np.where(total == 0, 1.0, total))


def twirl_damping(frequencies: np.ndarray, positions: int) -> np.ndarray:
    """Factor by which the mean over `positions` positions damps a component that turns by a
    frequency (radians a token, not 0): |sin(S w / 2)| / (S |sin(w / 2)|).
    """
    half = np.asarray(frequencies, np.float64) / 2
    return np.abs(np.sin(positions * half)) / (positions * np.abs(np.sin(half)))


def twirl_frequencies(config: ModelConfig) -> np.ndarray:
    """The frequencies at which the entries of G_LM turn with position, each by its name: 2 theta_a
    of a pair, and |theta_a - theta_b| and theta_a + theta_b of ordered pairs a, b.
    """
    theta = rope_frequencies(config)
    others = ~np.eye(len(theta), dtype=bool)
    apart, together = np.abs(theta[:, None] - theta), theta[:, None] + theta
    return np.concatenate([2 * theta, apart[others], together[others]])


def twirled(config: ModelConfig, G_LM: np.ndarray, positions: int) -> np.ndarray:
    """The mean of R(s)^T G_LM R(s) over positions s = 0 .. S - 1, [..., H, J] float64, R(s) being
    the rotation of RoPE: what is left of G_LM when both query and key move through S positions.
    """
    basis, frequencies = rope_basis(config)
    turns = np.exp(1j * np.arange(positions)[:, None] * frequencies)
    mean_factor = np.einsum("sp,sq->pq", turns.conj(), turns) / positions
    in_basis = basis.conj().T @ np.asarray(G_LM, np.float64) @ basis
    return np.real(basis @ (in_basis * mean_factor) @ basis.conj().T)


def decode_margins(logits: np.ndarray) -> np.ndarray:
    """Largest minus second logit, [...] of logits [..., V], float64. A perturbation of the logits
    by at most d each leaves the greedy token unchanged for certain where 2 d is smaller.
    """
    top = np.partition(np.asarray(logits, np.float64), -2, axis=-1)[..., -2:]
    return top[..., 1] - top[..., 0]


def centred_squares(x: Any, y: Any) -> tuple[Any, Any]:
    """Sums of squares of the difference of logits [..., V], and of x, both after their mean over
    the vocabulary is taken off, which no softmax sees: the root of their ratio is the centred
    relative RMS. Works on NumPy and JAX arrays.
    """
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return ((y - x) ** 2).sum(), (x**2).sum()


def row_map(plga: Params, row_H: jax.Array, epsilon: float) -> jax.Array:
    """phi: the residual layers of the metric learner, from one row of LayerNorm(Q^T Q) to one row
    of A, [H], in the dtype of the row.

    Args:
      plga: parameters of one layer's `plga`.
      epsilon: of the LayerNorms.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def linear(params: Params, x: jax.Array) -> jax.Array:
        return product(x, params["kernel"].astype(x.dtype)) + params["bias"].astype(x.dtype)

    def layer(a_H: jax.Array, params: Params) -> tuple[jax.Array, None]:
        y_H = a_H
        for unit in range(len(params) - 1):
            glu = params[f"unit_{unit}"]
            hidden = jax.nn.silu(linear(glu["w1"], y_H)) * linear(glu["w2"], y_H)
            y_H = linear(glu["w3"], hidden)
        y_H = a_H + y_H
        centred = y_H - y_H.mean()
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean() + epsilon)
        norm = {name: leaf.astype(y_H.dtype) for name, leaf in params["norm"].items()}
        return scaled * norm["scale"] + norm["bias"], None

    if "residual" not in plga:  # Model.num_residual_layers = 0
        return row_H
    return jax.lax.scan(layer, row_H, plga["residual"])[0]


def row_map_jacobians(
    config: ModelConfig, params: Params, rows_LRH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """phi of rows [L,R,H], and its Jacobians at them [L,R,H,J]; a pure function.

    Args:
      params: of a model with learned G_LM.
      rows_LRH: rows of LayerNorm(Q^T Q) of each layer.
    """

    def one(plga: Params, row_H: jax.Array) -> tuple[jax.Array, jax.Array]:
        phi = functools.partial(row_map, plga, epsilon=config.layer_norm_eps)
        return phi(row_H), jax.jacfwd(phi)(row_H)

    plga = params["layers"]["attention"]["plga"]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(plga, rows_LRH)


def largest_singular_values(config: ModelConfig, params: Params, rows_LRH: jax.Array) -> jax.Array:
    """Of the Jacobians of phi at rows [L,R,H], [L,R]; a pure function, cheap enough for every
    evaluation with a few rows.
    """
    jacobians_LRHJ = row_map_jacobians(config, params, rows_LRH)[1]
    return jnp.linalg.svd(jacobians_LRHJ, compute_uv=False)[..., 0]


def median_sigma(sigma_LR: Any) -> Any:
    """Median over rows of largest singular values [..., R], of an even number the lower of the
    middle two, as the authors take it. Works on NumPy and JAX arrays.
    """
    xp = jnp if isinstance(sigma_LR, jax.Array) else np
    return xp.sort(sigma_LR, axis=-1)[..., (sigma_LR.shape[-1] - 1) // 2]


def visited_rows(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    """LayerNorm(Q^T Q) of rows of tokens, [L,B,N,H,J]: what phi is applied to; a pure function."""
    _, state = Decoder(config).apply(
        {"params": params},
        tokens_BT,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "density_norm",
    )
    return _captured_rows(state)


def _captured_rows(state: Any) -> jax.Array:
    rows: jax.Array = state["intermediates"]["layers"]["attention"]["plga"]["density_norm"][
        "__call__"
    ][0]
    return rows


def quick_audits(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array | None = None,
    rows: int = 16,
) -> dict[str, jax.Array]:
    """The audits that are cheap enough for every evaluation, float32 scalars; a pure function.

    Args:
      config: of a model with learned G_LM.
      tokens_BT: two rows of tokens.
      length_B: real tokens of each, at least 1; None is all.
      rows: of LayerNorm(Q^T Q) of each layer, at even distances, at which phi is measured.

    Returns:
      "rowmap_sigma", the median over rows of the largest singular value of phi's Jacobian;
      "row_contrast" of A, the mean over layers and heads; "order_rms/A" and so on, the stabilised
      order parameter between the two rows.
    """
    decoder = Decoder(config)
    (_, layers), state = decoder.apply(
        {"params": params},
        tokens_BT,
        length_B=length_B,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name == "density_norm",
        method="hidden",
    )
    visited = _captured_rows(state)
    flat_LRH = visited.reshape(visited.shape[0], -1, config.head_dim)
    chosen = np.linspace(0, flat_LRH.shape[1] - 1, rows).round().astype(int)
    sigma_LR = largest_singular_values(config, params, flat_LRH[:, chosen])
    tensors = dict(layers.deductive.items())
    order = {f"order_rms/{name}": stabilised_order(x[:, 0], x[:, 1]) for name, x in tensors.items()}
    return {
        "rowmap_sigma": median_sigma(sigma_LR.ravel()),
        "row_contrast": row_contrast(tensors["A"]).mean(),
        **order,
    }


def contraction(rows_RH: np.ndarray, images_RH: np.ndarray) -> tuple[np.ndarray, float]:
    """|phi(r) - phi(r')| / |r - r'| of all pairs of different rows, and the diameter of the image:
    the largest |phi(r) - phi(r')|.
    """
    before, after = (
        np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(len(x), 1)]
        for x in (np.asarray(rows_RH, np.float64), np.asarray(images_RH, np.float64))
    )
    return after[before > 0] / before[before > 0], float(after.max(initial=0.0))
