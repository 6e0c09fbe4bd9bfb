"""The optimiser: AdamW with warm-up and cosine decay, as the published runs used it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from pldr_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, cosine to `end_lr_fraction` of the peak at
    `decay_steps`, constant afterwards.

    Step s, counted from 0, uses schedule(s): the very first update has learning rate 0.
    """
    decay_steps = config.decay_steps or total_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=decay_steps,
        end_value=config.end_lr_fraction * config.learning_rate,
    )


def build_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW with the schedule. The decay is decoupled and multiplied by the
    learning rate.
    """
    clip = {
        "value": optax.clip(config.clip_threshold),
        "norm": optax.clip_by_global_norm(config.clip_threshold),
        "none": optax.identity(),
    }[config.clip]
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=None if config.decay_mask == "all" else decayed_matrices,
    )
    return optax.chain(clip, adamw)


def next_learning_rate(config: OptimizerConfig, total_steps: int, opt_state: Any) -> jax.Array:
    """The learning rate of the next update: it follows the updates that were made, which are fewer
    than the steps where some were left out.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    (made,) = (node.count for node in nodes if is_schedule(node))
    return jnp.asarray(learning_rate_schedule(config, total_steps)(made), jnp.float32)


def decayed_matrices(params: Any) -> Any:
    """True for the parameters that `decay_mask = 'matrices'` decays: all but biases (b_W and b_a
    too) and norms.
    """

    def is_matrix(path: tuple[Any, ...], _: jax.Array) -> bool:
        names = [key.key for key in path if hasattr(key, "key")]
        return names[-1] not in ("bias", "scale", "b_W", "b_a")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of squares of all leaves, float32."""
    return jnp.asarray(optax.tree.norm(tree), jnp.float32)
