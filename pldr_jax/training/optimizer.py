"""The optimiser: what becomes of gradients, and what it remembers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from pldr_jax.config import ExperimentConfig, OptimizerConfig
from pldr_jax.model.decoder import Params
from pldr_jax.training.laws.groups import (
    Freeze,
    frozen_from,
    groups_of,
    has_generator_rate,
    keep_frozen,
    names_of,
    without_frozen,
)
from pldr_jax.training.laws.schedule import learning_rate_schedule

MUON_RMS = 0.2
"""Root mean square of a Muon update at rate 1, which is that of AdamW: its rates fit (arXiv
2502.16982).
"""


class Averaged(NamedTuple):
    """State of the optimiser where `Optimizer.average_decay` is set.

    Attributes:
      optimizer: state of everything else.
      average: moving average of the parameters.
    """

    optimizer: Any
    average: Params


def build_optimizer(
    config: OptimizerConfig, total_steps: int, freeze: Freeze = ()
) -> optax.GradientTransformation:
    """Clipping, then the update rule with the schedule. The decay is decoupled and multiplied by
    the learning rate.

    Args:
      total_steps: of the run.
      freeze: parameters frozen from step 0 have no optimiser state.
    """
    clip = {
        "value": optax.clip(config.clip_threshold),
        "norm": optax.clip_by_global_norm(config.clip_threshold),
        "none": optax.identity(),
    }[config.clip]
    rates, decays = {"body": config.learning_rate}, {"": config.weight_decay}
    if config.generator_learning_rate is not None:
        rates["generator"] = config.generator_learning_rate
    if config.metric_learner_weight_decay is not None:
        decays["metric_learner"] = config.metric_learner_weight_decay
    rules = {
        rate + decay: _rule(config, total_steps, rates[rate], decays[decay])
        for rate in rates
        for decay in decays
    }
    if len(rules) == 1 and not any(step == 0 for _, step in freeze):
        return optax.chain(clip, rules["body"])
    rules["frozen"] = optax.set_to_zero()

    def label(path: tuple[Any, ...], _: Any) -> str:
        if frozen_from(freeze, path) == 0:
            return "frozen"
        rate = "generator" if "generator" in rates and has_generator_rate(path) else "body"
        learner = "metric_learner"
        return rate + (learner if learner in decays and learner in groups_of(path) else "")

    def labels(params: Params) -> Any:
        return jax.tree.map_with_path(label, params)

    return optax.chain(clip, optax.partition(rules, labels))


def _rule(
    config: OptimizerConfig, total_steps: int, peak: float, weight_decay: float
) -> optax.GradientTransformation:
    """From gradients to updates, with one learning rate and weight decay."""
    beta1, beta2 = config.beta1, config.beta2
    direction = {
        "adamw": lambda: optax.scale_by_adam(beta1, beta2, config.eps),
        "sgd": lambda: optax.trace(beta1),
        "muon": lambda: optax.chain(
            optax.contrib.muon(
                1.0,
                beta=beta1,
                adam_b1=beta1,
                adam_b2=beta2,
                eps=config.eps,
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=MUON_RMS,
            ),
            optax.scale(-1.0),  # it goes downhill by itself
        ),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        ),
        "lion": lambda: optax.scale_by_lion(beta1, beta2),
    }[config.name]()
    mask = None if config.decay_mask == "all" else decayed_matrices
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps, peak)),
    )


def matrix_axes(params: Params) -> Any:
    """Which axes of a parameter of the layers are the inputs and outputs of a matrix, the others
    counting matrices; None for everything that is no matrix, and for embedding and head.
    """

    def axes(path: tuple[Any, ...], _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = names_of(path)
        coupling = names[-2] == "plga" and names[-1] in ("W", "a")
        if names[0] != "layers" or not (coupling or names[-1] == "kernel"):
            return None
        if names[-2] in ("q", "k", "v"):  # [L,D,N,H]
            return optax.contrib.MuonDimensionNumbers((-3,), (-2, -1))
        if names[-2] == "out":  # [L,N,H,D]
            return optax.contrib.MuonDimensionNumbers((-3, -2), (-1,))
        return optax.contrib.MuonDimensionNumbers((-2,), (-1,))

    return jax.tree.map_with_path(axes, params)


def decayed_matrices(params: Any) -> Any:
    """True for the parameters that `decay_mask = 'matrices'` decays: all but biases (b_W and b_a
    too) and norms.
    """
    return jax.tree.map_with_path(
        lambda path, _: names_of(path)[-1] not in ("bias", "scale", "b_W", "b_a"), params
    )


def initial_state(config: ExperimentConfig, params: Params) -> Any:
    """The optimiser's state before the first update."""
    optimizer = build_optimizer(
        config.optimizer, config.training.steps, config.training.freeze
    ).init(params)
    if config.optimizer.average_decay is None:
        return optimizer
    return Averaged(optimizer, jax.tree.map(jnp.copy, params))


def update(
    config: ExperimentConfig, grads: Params, opt_state: Any, params: Params, step: jax.Array
) -> tuple[Params, Any, Params]:
    """One update: (parameters, state of the optimiser, what was added to the parameters).

    A frozen parameter keeps its bits.

    Args:
      grads: without those of frozen parameters.
      step: updates made or left out before.
    """
    freeze, decay = config.training.freeze, config.optimizer.average_decay
    optimizer = build_optimizer(config.optimizer, config.training.steps, freeze)
    inner = opt_state.optimizer if isinstance(opt_state, Averaged) else opt_state
    updates, inner = optimizer.update(grads, inner, params)
    updates = without_frozen(freeze, step, updates)
    params = keep_frozen(freeze, step, optax.apply_updates(params, updates), params)
    if decay is None:
        return params, inner, updates
    # Early averages are of what there is: else the initial weights would weigh most for long.
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    average = jax.tree.map(lambda x, new: new + kept * (x - new), opt_state.average, params)
    return params, Averaged(inner, average), updates


def learning_rates(config: ExperimentConfig, opt_state: Any) -> dict[str, jax.Array]:
    """The rates of the next update, as metrics. They follow the updates that were made, which are
    fewer than the steps where some were left out.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule)
    made = next(node.count for node in nodes if is_schedule(node))
    optimizer, steps = config.optimizer, config.training.steps
    peaks = {"train/learning_rate": optimizer.learning_rate}
    if optimizer.generator_learning_rate is not None:
        peaks["train/generator_learning_rate"] = optimizer.generator_learning_rate
    return {
        name: jnp.asarray(learning_rate_schedule(optimizer, steps, peak)(made), jnp.float32)
        for name, peak in peaks.items()
    }


def global_norm(tree: Any) -> jax.Array:
    """Square root of the sum of squares of all leaves, float32."""
    return jnp.asarray(optax.tree.norm(tree), jnp.float32)
