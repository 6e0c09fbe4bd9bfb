"""The two training laws whose trajectories are part of the package's goldens."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import (
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.model.decoder import Params
from pldr_jax.training.optimizer import initial_state
from pldr_jax.training.step import TrainState, train_step

LAWS = ("onepass", "hold")
RATES = ("train/generator_learning_rate", "train/learning_rate")


class Trajectory(NamedTuple):
    """What a law makes of some batches.

    Attributes:
      losses: nats a target, of each step.
      rates: of each step, a list of the groups' rates.
      params: after the last step.
    """

    losses: list[float]
    rates: list[list[float]]
    params: Params


def law_config(name: str, model: ModelConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """The config of a law of the goldens, whose values are those of `golden.json`."""
    hold = values["hold"]
    onepass = OptimizerConfig(
        learning_rate=3e-4,
        generator_learning_rate=3e-4 * values["generator_gain"],
        schedule="constant",
        warmup_steps=0,
        eps=1e-8,
        weight_decay=0.01,
        clip="norm",
    )
    held = OptimizerConfig(
        learning_rate=hold["rate"],
        schedule="hold",
        warmup_steps=hold["warmup"],
        hold_until=hold["hold_until"],
        decay_steps=hold["total"],
        end_lr_fraction=hold["alpha"],
        eps=1e-5,
        weight_decay=0.1,
    )
    return ExperimentConfig(
        model=model,
        loss=LossConfig(targets="last" if name == "onepass" else "all"),
        optimizer=onepass if name == "onepass" else held,
        training=TrainingConfig(steps=12),
    )


def trajectory(config: ExperimentConfig, params: Params, batches: np.ndarray) -> Trajectory:
    """Trains on the batches [steps,B,C], in their order."""
    state = TrainState(jnp.int32(0), params, initial_state(config, params), None)
    step = jax.jit(functools.partial(train_step, config))
    losses, rates = [], []
    for rows in batches.astype(np.int32):
        state, metrics = step(state, rows)
        losses.append(float(metrics["train/loss"]))
        rates.append([float(metrics[name]) for name in RATES if name in metrics])
    return Trajectory(losses, rates, state.params)
