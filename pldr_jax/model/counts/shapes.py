"""Shapes, counts and places of a model's parameters, without making them."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Params, init_params
from pldr_jax.partition import shardings


@functools.cache
def abstract_params(config: ModelConfig) -> Any:
    """The parameter tree as shapes, each boxed with its logical axes."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def param_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter."""
    import flax.linen as nn

    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_params(config)))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def count_params(config: ModelConfig) -> int:
    """Trained parameters of the model."""
    return sum(math.prod(shape) for shape in param_shapes(config).values())


def param_shardings(config: ModelConfig, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter, split as `pldr_jax/partition.py` says."""
    return shardings(abstract_params(config), mesh)


def place_params(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """The parameters on a mesh, of all of the model or of some of its modules; those that lie there
    already are not copied.
    """
    places = param_shardings(config, mesh)
    return jax.device_put(params, {name: places[name] for name in params})
