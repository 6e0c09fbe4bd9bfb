"""Weights of any checkpoint that `pldr_jax.load` opens, with the config they were trained by, and
the text that this config holds out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_from_dict

if TYPE_CHECKING:
    from pldr_jax.data.mixture import TrainingText
    from pldr_jax.runs.checkpoint import Weights


def read_any(folder: Path, step: int | None = None) -> tuple[ExperimentConfig, "Weights"]:
    """Config and weights; step 0 in the transformers layout, whose config has the model alone.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.
    """
    from pldr_jax.runs.checkpoint import Weights, read_weights

    if (folder / "config.json").is_file():
        from pldr_jax.interop.transformers import read_checkpoint

        model, params, g_lm = read_checkpoint(folder)
        return ExperimentConfig(model=model), Weights(0, {}, params, g_lm)
    weights = read_weights(folder, step)
    return config_from_dict(weights.config_dict, str(folder)), weights


def held_out_text(
    folder: Path, config: ExperimentConfig, flag: str, log: Callable[[str], None]
) -> "TrainingText":
    """The text that a checkpoint was trained on, whose "validation" rows it has not seen.

    Args:
      folder: of the checkpoint.
      flag: the one that names another text.

    Raises:
      ConfigError: `folder` does not say what the text is, or it has another tokenizer now.
    """
    from pldr_jax.data.mixture import open_text

    if (folder / "config.json").is_file():
        raise ConfigError(f"{flag}: none was given, and {folder} does not say what is held out")
    text = open_text(config.data, config.model.vocab_size, log)
    path = folder / "tokenizer.model"
    if path.is_file() and path.read_bytes() != text.tokenizer.model_bytes:
        raise ConfigError(
            f"{folder}: has another tokenizer than Data.source gives now; give a {flag}"
        )
    return text
