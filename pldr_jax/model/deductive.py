"""The deductive outputs of power law graph attention, and G_LM from other places than its
network.
"""

from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.partition import on_every_device


class DeductiveOutputs(flax.struct.PyTreeNode):
    """What PLGA derives from Q^T Q (arXiv 2107.02039; pldr_jax/model/plga.py has the equations).

    Each is [B,N,H,J] out of one layer and [L,B,N,H,J] out of the decoder, float32. With a G_LM
    from outside, only `G_LM` is set and its batch axis is 1 where one tensor serves every row.
    """

    A: jax.Array | None = None
    """Metric tensor before the positive map: what the metric learner makes of Q^T Q."""
    A_LM: jax.Array | None = None
    """Metric tensor, strictly positive."""
    A_P: jax.Array | None = None
    """Potential tensor, A_LM to the learned powers P."""
    G_LM: jax.Array | None = None
    """Energy-curvature tensor, between Q and K^T."""

    def items(self) -> list[tuple[str, jax.Array]]:
        """(name, tensor) of those that are set."""
        named = {"A": self.A, "A_LM": self.A_LM, "A_P": self.A_P, "G_LM": self.G_LM}
        return [(name, tensor) for name, tensor in named.items() if tensor is not None]


def g_lm_shape(config: ModelConfig, batch: int = 1) -> tuple[int, int, int, int, int]:
    """[L,B,N,H,J] of a G_LM for every layer."""
    return (config.num_layers, batch, config.num_heads, config.head_dim, config.head_dim)


def identity_g_lm(config: ModelConfig) -> jax.Array:
    """G_LM [L,1,N,H,J] that makes the model ordinary scaled dot-product attention."""
    return jnp.broadcast_to(jnp.eye(config.head_dim, dtype=jnp.float32), g_lm_shape(config))


def random_g_lm(config: ModelConfig, seed: int) -> jax.Array:
    """G_LM [L,1,N,H,J] of independent standard normal entries."""
    return jax.random.normal(jax.random.key(seed), g_lm_shape(config), jnp.float32)


def read_g_lm(path: str | Path, config: ModelConfig, field: str = "Model.g_file") -> jax.Array:
    """G_LM [L,1,N,H,J] from an npz, npy or safetensors file holding it as [L,N,H,J] or [L,1,N,H,J].

    A file with several tensors must name it `G_LM`.

    Raises:
      ConfigError: no such file, not such a file, or another shape than the model's.
    """
    tensor = read_tensor(path, field)
    shape = g_lm_shape(config)
    if tensor.shape == shape[:1] + shape[2:]:
        tensor = tensor[:, None]
    if tensor.shape != shape:
        raise ConfigError(
            f"{field} = {str(path)!r}: G_LM has shape {tensor.shape}, this model needs "
            f"{shape[:1] + shape[2:]} [L,N,H,H]"
        )
    return jnp.asarray(tensor, jnp.float32)


def read_tensor(path: str | Path, field: str = "g_file") -> np.ndarray:
    """The tensor `G_LM` of an npz, npy or safetensors file, or its only one, of any shape.

    Raises:
      ConfigError: no such file, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{field} = {str(path)!r}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            tensors = load_file(path)
        elif path.suffix == ".npy":
            tensors = {"G_LM": np.load(path, allow_pickle=False)}
        else:
            tensors = dict(np.load(path, allow_pickle=False))
    except Exception as error:
        raise ConfigError(
            f"{field} = {str(path)!r}: cannot be read as npz, npy or safetensors ({error})"
        ) from error
    if "G_LM" not in tensors and len(tensors) != 1:
        raise ConfigError(f"{field} = {str(path)!r}: holds {sorted(tensors)}, none named G_LM")
    return np.asarray(tensors.get("G_LM", next(iter(tensors.values()))))


def predefined_g_lm(config: ModelConfig) -> jax.Array | None:
    """The G_LM [L,1,N,H,J] that `Model.g_source` asks for; None where it is learned, or is the
    identity.

    Raises:
      ConfigError: `Model.g_source` is "external" and `Model.g_file` is None, as in the config of a
        checkpoint that holds its G_LM; or the file cannot be used.
    """
    if config.g_source == "random":
        return random_g_lm(config, config.g_seed)
    if config.g_source == "external":
        if config.g_file is None:
            config.fail("g_file", "g_source = 'external' needs the file that holds G_LM")
        return read_g_lm(config.g_file, config)
    return None


def given_g_lm(
    config: ModelConfig, g_lm: jax.Array | np.ndarray | None, mesh: Mesh | None
) -> jax.Array | None:
    """A G_LM that a user gives, [L,N,H,J] or [L,B,N,H,J], as [L,B,N,H,J] on every device; None
    stays None.

    Raises:
      ConfigError: it has another shape.
    """
    if g_lm is None:
        return None
    layers, head = config.num_layers, (config.num_heads, config.head_dim, config.head_dim)
    if g_lm.shape == (layers, *head):
        g_lm = g_lm[:, None]
    if g_lm.ndim != 5 or g_lm.shape[0] != layers or g_lm.shape[2:] != head:
        raise ConfigError(
            f"g_lm: has shape {g_lm.shape}, this model needs {(layers, *head)} [L,N,H,H]"
        )
    return on_every_device(jnp.asarray(g_lm, jnp.float32), mesh)
