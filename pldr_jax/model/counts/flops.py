"""Floating point operations of the model, counted from its matrix products.

XLA's own count takes the body of a scan once, however often it runs, so that it cannot be used for
scanned layers; unrolled, it agrees with this one (`tests/test_plan.py`). A product of [m,k] and
[k,n] is 2 m k n operations; element-wise work is left out, and attention counts all T x T pairs, as
is usual for model FLOP utilisation.
"""

from collections.abc import Callable

from pldr_jax.config import ModelConfig

BACKWARD = 2
"""Products of the backward pass for each one of the forward pass."""


def forward_flops(config: ModelConfig, length: int, segments: int = 1) -> dict[str, float]:
    """Operations of the forward pass of one row of `length` input tokens, by part of the model.

    `plga` is Q^T Q, the metric learner, the products with W and a, and q G_LM. The metric learner
    works on [N,H,H] once a row, whatever the length, or once for each of the `segments` that a row
    has places for; then the two products with q have all their places too.
    """
    L, N, H, D = config.num_layers, config.num_heads, config.head_dim, config.model_dim
    metric = 0 if config.g_source == "identity" else 2 * length * D * H  # q G_LM
    if config.g_source == "learned":
        metric += 2 * length * D * H + _residual_layers(config) + 2 * 2 * N * H**3
        metric *= segments  # a G_LM from outside serves all of them
    return {
        "projections": float(L * length * 8 * D * D),
        "attention": float(L * 4 * length * length * D),
        "plga": float(L * metric),
        "ffn": float(L * length * 6 * D * config.ffn_width),
        "head": float(length * 2 * D * config.vocab_size),
    }


def _residual_layers(config: ModelConfig) -> int:
    """Operations of the metric learner's residual layers on one Q^T Q in one decoder layer."""
    H, M = config.head_dim, config.metric_width
    units = config.num_residual_layers * config.num_gated_units
    return config.num_heads * H * units * 6 * H * M


def training_flops(config: ModelConfig, rows: int, length: int, segments: int = 1) -> float:
    """Operations of a training step on `rows` rows of `length` input tokens: the model's own,
    without what rematerialisation repeats.
    """
    return rows * (1 + BACKWARD) * sum(forward_flops(config, length, segments).values())


def repeated_flops(config: ModelConfig, rows: int, length: int, segments: int = 1) -> float:
    """Operations that the backward pass of such a step repeats: what `Model.remat` says, and, as
    part of any backward pass, the residual layers of the metric learner.
    """
    parts = forward_flops(config, length, segments)
    names = {"none": (), "dots": ("attention", "plga")}.get(
        config.remat, ("projections", "attention", "plga", "ffn")
    )
    always = 0
    if config.g_source == "learned":
        always = config.num_layers * segments * _residual_layers(config)
    return rows * (sum(parts[name] for name in names) + always)


def row_flops(config: ModelConfig) -> Callable[[int], float]:
    """What a training row of `context_length` tokens with places for K segments costs, as a
    function of K: operations of its forward pass.
    """
    return lambda segments: sum(forward_flops(config, config.context_length - 1, segments).values())
