"""Power law graph attention: the deep network from Q^T Q to G_LM.

Equations (arXiv 2107.02039 and 2410.16703; symbols as there, letters as in
`pldr_jax/model/__init__.py`):

    A     = ResidualLayers(LayerNorm(Q^T Q))                  metric learner, [B,N,H,J]
    A_LM  = iSwiGLU(W A + b_W) + 1e-9                         metric tensor, strictly positive
    A_P   = A_LM ** P                                         potential tensor, element by element
    G_LM  = a A_P + b_a                                       energy-curvature tensor

A_LM goes down to 1e-9 and its largest entries reach thousands, so that gradients of A_LM ** P
reach 1e11: Q^T Q is summed, and the LayerNorms, the powers and everything after them are computed,
in float32 whatever the compute dtype.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.layers import (
    GLU,
    Initializer,
    full_product_operand,
    glorot_uniform,
    layer_norm,
    logical,
)
from pldr_jax.model.segments import Segments
from pldr_jax.partition import constrain, divided, in_use

A_LM_FLOOR = 1e-9


def iswiglu(x: jax.Array) -> jax.Array:
    """x * silu(x) = x^2 sigmoid(x), which is never negative."""
    return x * nn.silu(x)


def per_head_glorot_normal(num_heads: int, head_dim: int) -> Initializer:
    """Normal, not truncated, with the fans the authors' framework counts for an array [N,H,H].

    That framework takes fan_in = H * H and fan_out = N * H, so std = sqrt(2 / (H^2 + N H)):
    0.02002 for 14 x 64 x 64, not what jax.nn.initializers.glorot_normal gives for this shape.
    """
    std = math.sqrt(2.0 / (head_dim * head_dim + num_heads * head_dim))
    return nn.initializers.normal(std)


def coupling_init(config: ModelConfig) -> Initializer:
    """Of W, P and a, as `Model.init` says. `native_port` is uniform with the same standard
    deviation as `legacy`; `normalized` is what that is at two heads, whatever their number.
    """
    N, H = config.num_heads, config.head_dim
    if config.init == "legacy":
        return per_head_glorot_normal(N, H)
    scale = math.sqrt((H + N) / (H + 2)) if config.init == "normalized" else 1.0
    return glorot_uniform(H * H, N * H, scale)


def density_matrix(
    q_BTNH: jax.Array, summed_BT: jax.Array | None = None, precision: str | None = None
) -> jax.Array:
    """Q^T Q [B,N,H,J] in float32, over the tokens where `summed_BT` is true (all, if None).

    The sum runs over every token, later ones included: what a position attends with depends on its
    future, unless training has made G_LM the same for every input. Padding has to be left out
    here, not only in the softmax.
    """
    if summed_BT is not None:
        q_BTNH = jnp.where(summed_BT[:, :, None, None], q_BTNH, 0)
    q = full_product_operand(q_BTNH)
    density_BNHJ = jnp.einsum(
        "BTNH,BTNJ->BNHJ", q, q, precision=precision, preferred_element_type=jnp.float32
    )
    return by_rows(density_BNHJ)


def by_rows(A: jax.Array) -> jax.Array:
    """A [B,N,H,J], or [B * N * H,J], split over the batch axes of a mesh and its heads over tensor.

    Said wherever A enters or leaves a loop: the compiler would else split its last axis as the
    weights are, and hold the whole batch on every device.
    """
    return constrain(A, "batch", *("heads", None, None) if A.ndim == 4 else (None,))


class ResidualLayer(nn.Module):
    """`LayerNorm(A + GLU_U(... GLU_1(A)))` on the last axis, shared by all heads."""

    config: ModelConfig

    @nn.compact
    def __call__(self, A_BNHJ: jax.Array) -> jax.Array:
        """A to A, [B,N,H,J] float32."""
        dtype = jnp.dtype(self.config.dtype)
        y_BNHJ = A_BNHJ = by_rows(A_BNHJ)
        for unit in range(self.config.num_gated_units):
            y_BNHJ = GLU(
                self.config.head_dim,
                self.config.metric_width,
                ("metric_in", "metric_hidden"),
                dtype,
                self.config.plga_precision,
                name=f"unit_{unit}",
            )(y_BNHJ)
        norm = layer_norm(self.config.layer_norm_eps, name="norm")
        return by_rows(norm(A_BNHJ + y_BNHJ.astype(jnp.float32)))


def _residual_step(layer: ResidualLayer, A_BNHJ: jax.Array, _: None) -> tuple[jax.Array, None]:
    return layer(A_BNHJ), None


def residual_unroll(config: ModelConfig) -> int:
    """Residual layers in one iteration of their loop: all where the scans are unrolled, but one on
    a CPU, whose step is no faster unrolled and takes twice as long to compile.
    """
    one_by_one = not config.unroll or jax.default_backend() == "cpu"
    return 1 if one_by_one else config.num_residual_layers


class PowerLawGraphAttention(nn.Module):
    """Q -> (A, A_LM, A_P, G_LM). Its parameters are all in this module's scope, `plga`.

    Parameters: `density_norm` and, stacked [R, ...], `residual`, on the last axis and shared by
    all heads; `W`, `b_W`, `P`, `a`, `b_a`, each [N,H,J], of each head.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        self.density_norm = layer_norm(config.layer_norm_eps)
        self.residual = ResidualLayer(config)
        shape = (config.num_heads, config.head_dim, config.head_dim)
        axes = ("heads", "metric_in", "head_dim")
        weight = logical(coupling_init(config), *axes)
        zeros = logical(nn.initializers.zeros, *axes)
        self.W, self.b_W = self.param("W", weight, shape), self.param("b_W", zeros, shape)
        self.P = self.param("P", weight, shape)
        self.a, self.b_a = self.param("a", weight, shape), self.param("b_a", zeros, shape)

    def __call__(
        self,
        q_BTNH: jax.Array,
        summed_BT: jax.Array | None = None,
        segments: Segments | None = None,
    ) -> DeductiveOutputs:
        """All deductive outputs of one layer, from its queries after RoPE and the mask of real
        tokens; with segments, those of each segment, [B * K,N,H,J].
        """
        precision = self.config.plga_precision
        with jax.named_scope("metric_learner"):
            if segments is None:
                density_BNHJ = density_matrix(q_BTNH, summed_BT, precision)
            else:
                density_BNHJ = segments.density_matrix(q_BTNH, precision)
            A_BNHJ = self.metric_tensor(density_BNHJ)
        with jax.named_scope("power_law"):
            return self.energy_curvature(A_BNHJ)

    def metric_tensor(self, density_BNHJ: jax.Array) -> jax.Array:
        """A [B,N,H,J] from Q^T Q: the residual layers, scanned with one set of stacked
        parameters.
        """
        A_BNHJ = by_rows(self.density_norm(density_BNHJ))
        if self.config.num_residual_layers == 0:
            return A_BNHJ
        step: Any = _residual_step
        if self.config.remat_plga:  # what a residual layer saves is 20 times its input
            step = nn.remat(_residual_step, prevent_cse=self.config.unroll)
        scan = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_residual_layers,
            unroll=residual_unroll(self.config),
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=self.is_initializing(),  # as in the decoder
        )
        shape = A_BNHJ.shape
        if not divided("heads", shape[1]):
            # One matrix of B N H rows; see Linear. Divided heads cannot be joined with B.
            A_BNHJ = A_BNHJ.reshape(-1, shape[-1])
        A_BNHJ, _ = scan(self.residual, A_BNHJ, None)
        return by_rows(A_BNHJ.reshape(shape))

    def energy_curvature(self, A_BNHJ: jax.Array) -> DeductiveOutputs:
        """A_LM, A_P and G_LM from A: the last three steps, all float32."""
        A_BNHJ, precision = by_rows(A_BNHJ.astype(jnp.float32)), self.config.plga_precision
        W, b_W, P, a, b_a = (
            in_use(x, ("heads", "metric_in", "head_dim"), jnp.float32)
            for x in (self.W, self.b_W, self.P, self.a, self.b_a)
        )
        A_LM = by_rows(iswiglu(_per_head(W, A_BNHJ, precision) + b_W) + A_LM_FLOOR)
        A_P, G_LM = curvature(A_LM, P, a, b_a, precision)
        return DeductiveOutputs(A=A_BNHJ, A_LM=A_LM, A_P=A_P, G_LM=G_LM)


def curvature(
    A_LM: jax.Array,
    P_NHJ: jax.Array,
    a_NHJ: jax.Array,
    b_a_NHJ: jax.Array,
    precision: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A_P = A_LM ** P and G_LM = a A_P + b_a, [B,N,H,J], from A_LM [B,N,H,J] and the parameters of
    one layer.
    """
    # exp(P log A_LM) is A_LM ** P for a positive base, and costs half of it.
    A_P = jnp.exp(P_NHJ * jnp.log(A_LM))
    return A_P, _per_head(a_NHJ, A_P, precision) + b_a_NHJ


def _per_head(w_NHI: Any, x_BNIJ: jax.Array, precision: str | None) -> jax.Array:
    return jnp.einsum(
        "NHI,BNIJ->BNHJ", w_NHI, x_BNIJ, precision=precision, preferred_element_type=jnp.float32
    )
