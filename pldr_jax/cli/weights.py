"""Weights of any checkpoint that `pldr_jax.load` opens, with the config they were trained by."""

from pathlib import Path
from typing import TYPE_CHECKING

from pldr_jax.config import ExperimentConfig
from pldr_jax.flags import config_from_dict

if TYPE_CHECKING:
    from pldr_jax.training.checkpoint import Weights


def read_any(folder: Path, step: int | None = None) -> tuple[ExperimentConfig, "Weights"]:
    """Config and weights; step 0 in the transformers layout, whose config has the model alone.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.
    """
    from pldr_jax.training.checkpoint import Weights, read_weights

    if (folder / "config.json").is_file():
        from pldr_jax.interop.transformers import read_checkpoint

        model, params, g_lm = read_checkpoint(folder)
        return ExperimentConfig(model=model), Weights(0, {}, params, g_lm)
    weights = read_weights(folder, step)
    return config_from_dict(weights.config_dict, str(folder)), weights
