"""Fine-tuning: a state that begins with the weights of a checkpoint, and nothing else of it."""

import dataclasses

import jax
from jax.sharding import Mesh

from pldr_jax.config import HOW_COMPUTED, ConfigError, ExperimentConfig
from pldr_jax.config.load import describe_differences
from pldr_jax.model.decoder import Params
from pldr_jax.training.step import TrainState, abstract_state, create_state

MAY_DIFFER = ("context_length", *HOW_COMPUTED)
"""Fields of `ModelConfig` that no weight depends on."""


@dataclasses.dataclass(frozen=True)
class InitialWeights:
    """Weights to begin with.

    Attributes:
      params: of the model that is trained.
      g_lm: its predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
    """

    params: Params
    g_lm: jax.Array | None


def check_same_model(where: str, checkpoint: ExperimentConfig, config: ExperimentConfig) -> None:
    """ConfigError, one line, if weights of the checkpoint do not fit the config."""
    allowed = {f"Model.{name}:" for name in MAY_DIFFER}
    changed = [
        difference
        for difference in describe_differences(checkpoint, config, ["Model"])
        if difference.split(" ")[0] not in allowed
    ]
    if changed:
        raise ConfigError(
            f"--init_from={where}: is another model ({'; '.join(changed)}); leave out what the "
            "checkpoint says, or take another one"
        )


def state_from(config: ExperimentConfig, mesh: Mesh, initial: InitialWeights) -> TrainState:
    """A new state, its optimiser at step 0, with the given weights laid out on the mesh."""
    state = create_state(config, mesh, initial.g_lm)
    target = abstract_state(config, mesh, initial.g_lm)
    params = jax.tree.map(
        lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), initial.params, target.params
    )
    return state.replace(params=params)
