"""Learning rates by the number of updates made before."""

import jax
import jax.numpy as jnp
import optax

from pldr_jax.config import OptimizerConfig


def learning_rate_schedule(
    config: OptimizerConfig, total_steps: int, peak: float | None = None
) -> optax.Schedule:
    """The schedule of `Optimizer.schedule`, with the pulses.

    All but 'constant' rise linearly from 0: step s, counted from 0, has the rate of s, so that the
    very first update has rate 0. They reach `end_lr_fraction` of the peak at `decay_steps` and
    stay there. 'constant' rises as (s + 1) / warmup_steps.

    Args:
      total_steps: of the run.
      peak: None is `learning_rate`. Pulses are scaled as the peak is.
    """
    peak = config.learning_rate if peak is None else peak
    decay_steps = config.decay_steps or total_steps
    schedule = {
        "cosine": lambda: optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=decay_steps,
            end_value=config.end_lr_fraction * peak,
        ),
        "constant": lambda: (
            lambda step: (
                peak
                * jnp.minimum(
                    (jnp.asarray(step, jnp.float32) + 1) / max(config.warmup_steps, 1), 1.0
                )
            )
        ),
        "hold": lambda: _plateau(config, decay_steps, peak),
        "wsd": lambda: _plateau(config, decay_steps, peak),
    }[config.schedule]()
    return _with_pulses(schedule, config, peak) if config.pulses else schedule


def _plateau(config: OptimizerConfig, decay_steps: int, peak: float) -> optax.Schedule:
    """Rise, plateau, decay."""
    last = config.last_peak_step(decay_steps)

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        x = jnp.clip((step - last) / (decay_steps - last), 0.0, 1.0)
        if config.schedule == "hold":
            left = (1 + jnp.cos(jnp.pi * x)) / 2
        else:
            left = 1 - (x if config.decay_shape == "linear" else jnp.sqrt(x))
        return peak * rise * (config.end_lr_fraction + (1 - config.end_lr_fraction) * left)

    return schedule


def _with_pulses(schedule: optax.Schedule, config: OptimizerConfig, peak: float) -> optax.Schedule:
    def pulsed(step: jax.Array) -> jax.Array:
        rate = schedule(step)
        for start, steps, height in config.pulses:
            inside = (start <= step) & (step < start + steps)
            rate = jnp.where(inside, height * (peak / config.learning_rate), rate)
        return rate

    return pulsed
