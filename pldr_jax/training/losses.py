"""Losses: cross-entropy of the next token, and the DAG regulariser of the deductive outputs."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import LossConfig
from pldr_jax.data.rows import PAD_ID as PAD_ID
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.reductions import chosen, most_probable

TAYLOR_TERMS = 8
SCALED_NORM = 0.5
"""The matrix exponential is summed to TAYLOR_TERMS terms where the norm is at most SCALED_NORM:
exact in float32.
"""
MAX_SQUARINGS = 150
"""More than a matrix of finite float32 entries needs."""


class TokenLoss(flax.struct.PyTreeNode):
    """Sums over the targets that are not padding, so that batches of any size add up."""

    loss_sum: jax.Array
    correct: jax.Array
    count: jax.Array

    @property
    def loss(self) -> jax.Array:
        """Mean cross-entropy, nats a token."""
        return self.loss_sum / jnp.maximum(self.count, 1)

    @property
    def accuracy(self) -> jax.Array:
        """Share of targets that are the most probable token."""
        return self.correct / jnp.maximum(self.count, 1)


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array) -> TokenLoss:
    """Cross-entropy and accuracy against the targets, those equal to `PAD_ID` left out. With logits
    that are not finite a prediction is never correct.
    """
    counted_BT = (targets_BT != PAD_ID).astype(jnp.float32)
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - chosen(logits_BTV, targets_BT)
    correct_BT = (most_probable(logits_BTV) == targets_BT) & jnp.isfinite(nats_BT)
    correct_BT = correct_BT * counted_BT
    return TokenLoss((nats_BT * counted_BT).sum(), correct_BT.sum(), counted_BT.sum())


def dag_losses(
    deductive: DeductiveOutputs, real_B: jax.Array | None = None
) -> dict[str, jax.Array]:
    """DAG loss of A_LM, A_P and G_LM (arXiv 2410.16703): mean over layers, batch and heads; {}
    with a predefined G_LM.

    real_B: which entries of the batch axis count; None is all.
    """
    if deductive.A_LM is None:
        return {}
    return {name: dag_loss(x, real_B) for name, x in deductive.items() if name != "A"}


def dag_loss(x: jax.Array, real_B: jax.Array | None = None) -> jax.Array:
    """Mean of |log(tr(exp(X * X)) / H)| over all leading axes of X [..., H, H], * being element by
    element; with `real_B`, of X [L,B,N,H,H] over the entries B where it is true.

    It is 0 where X is the adjacency matrix of a directed acyclic graph, but for rounding (4e-5 at
    entries of 40, whose squares are scaled down and squared up again). Finite, with a finite
    gradient, wherever the value itself fits float32, also where the matrix exponential
    overflows.
    """
    # tr(exp(M)) >= H for a matrix of non-negative entries, so the logarithm needs no absolute
    # value.
    values = log_trace_expm(jnp.square(x.astype(jnp.float32)))
    if real_B is None:
        return values.mean()
    return (values.mean((0, 2)) * real_B).sum() / jnp.maximum(real_B.sum(), 1)


@jax.custom_vjp
def log_trace_expm(m: jax.Array) -> jax.Array:
    """log(tr(exp(M)) / H) of matrices M [..., H, H] of non-negative entries, without overflow:
    infinite where M has an infinite entry or the value does not fit float32, NaN where M has NaN.
    """
    return _log_trace_expm(m)[0]


def _log_trace_expm(m: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Scaling and squaring with the exponential kept as e^s (d I + F).

    F holds exp(M / 2^k) - I at first, so that nothing cancels where M is small; every term is
    non-negative, so that nothing cancels anywhere; and each squaring is divided by its largest
    entry, whose logarithm goes to s.
    """
    size = m.shape[-1]
    limit = m.max((-2, -1))  # what the value is where it is not finite
    m = jnp.where(jnp.isfinite(limit)[..., None, None], m, 0)
    norm = jnp.max(m.sum(-1))
    squarings = jnp.ceil(jnp.log2(jnp.maximum(norm, 1e-30) / SCALED_NORM))
    squarings = jnp.clip(squarings, 0, MAX_SQUARINGS).astype(jnp.int32)
    half = squarings // 2  # in two factors, as 2^-150 is 0 in float32
    scaled = m * jnp.exp2(-half.astype(jnp.float32))
    scaled = scaled * jnp.exp2((half - squarings).astype(jnp.float32))
    term = f = scaled
    for n in range(2, TAYLOR_TERMS + 1):
        term = _matmul(term, scaled) / n
        f = f + term

    def square(_: Any, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        f, d, s = state
        f, d = 2 * d * f + _matmul(f, f), d * d
        largest = jnp.maximum(jnp.max(f, axis=(-2, -1), keepdims=True), d)
        return f / largest, d / largest, 2 * s + jnp.log(largest)

    ones = jnp.ones_like(m[..., :1, :1])
    f, d, s = jax.lax.fori_loop(0, squarings, square, (f, ones, jnp.zeros_like(ones)))
    trace = jnp.trace(f, axis1=-2, axis2=-1)
    d, s = d[..., 0, 0], s[..., 0, 0]
    # log((d H + tr F) / H) + s; where no scaling was needed (d = 1, s = 0) log1p keeps small
    # values exact.
    value = (
        jnp.where(
            d > 0.5,
            jnp.log(jnp.maximum(d, 0.5)) + jnp.log1p(trace / size / jnp.maximum(d, 0.5)),
            jnp.log(d + trace / size),
        )
        + s
    )
    finite = jnp.isfinite(limit)
    return jnp.where(finite, value, limit), (jnp.where(finite[..., None, None], f, jnp.nan), d)


def _forward(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    value, (f, d) = _log_trace_expm(m)
    exponential = f + d[..., None, None] * jnp.eye(m.shape[-1], dtype=m.dtype)
    trace = jnp.trace(exponential, axis1=-2, axis2=-1)[..., None, None]
    return value, jnp.swapaxes(exponential, -1, -2) / trace


def _backward(gradient: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    # d log tr exp(M) / dM = exp(M)^T / tr exp(M): the scale e^s cancels.
    return (gradient * cotangent[..., None, None],)


log_trace_expm.defvjp(_forward, _backward)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dag_schedule(config: LossConfig, step: jax.Array | int) -> jax.Array:
    """Factor of the DAG coefficients at a step, counted from 0: rises from 0 to 1 over
    `Loss.dag_warmup_steps`, and is 0 from `Loss.dag_until_step` on.
    """
    step = jnp.asarray(step, jnp.float32)
    rising = jnp.minimum(step / config.dag_warmup_steps, 1.0) if config.dag_warmup_steps else 1.0
    until = config.dag_until_step
    return jnp.where(step < (jnp.inf if until is None else until), rising, 0.0)


def regularizer(config: LossConfig, dag: dict[str, jax.Array]) -> jax.Array:
    """The weighted sum of the DAG losses that is added to the cross-entropy."""
    weights = {"A_LM": config.dag_a_lm, "A_P": config.dag_a_p, "G_LM": config.dag_g_lm}
    return sum((weights[name] * value for name, value in dag.items()), start=jnp.float32(0))
