"""Groups of parameters, and those that stay as they are from some step on."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from pldr_jax.config import ParameterGroup

Freeze: TypeAlias = Sequence[tuple[ParameterGroup, int]]
"""Groups, and the steps from which on they do not change."""

COUPLINGS = ("W", "b_W", "P", "a", "b_a")
NEVER = 2**31 - 1


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on the way to a parameter; its box, where it has one, is none of them."""
    return tuple(key.key for key in path if hasattr(key, "key"))


def groups_of(path: tuple[Any, ...]) -> tuple[ParameterGroup, ...]:
    """The groups that a parameter belongs to: none of the norms of the residual stream does."""
    names = names_of(path)
    if "plga" in names:
        couplings = names[-2] == "plga" and names[-1] in COUPLINGS
        return "generator", "couplings" if couplings else "metric_learner"
    if "attention" in names:
        return ("attention",)
    places: dict[str, ParameterGroup] = {"table": "embedding", "ffn": "ffn", "head": "head"}
    return tuple(group for name, group in places.items() if name in names)


def has_generator_rate(path: tuple[Any, ...]) -> bool:
    """Whether `Optimizer.generator_learning_rate` is a parameter's: the residual layers and the
    couplings have it. The LayerNorm on Q^T Q, though a part of the generator, does not, as in the
    trajectories that the authors' implementation was run for.
    """
    return "generator" in groups_of(path) and "density_norm" not in names_of(path)


def frozen_from(freeze: Freeze, path: tuple[Any, ...]) -> int:
    """The step from which on a parameter does not change; `NEVER` where none is given."""
    groups = groups_of(path)
    return min((step for group, step in freeze if group in groups), default=NEVER)


def keep_frozen(freeze: Freeze, step: jax.Array, changed: Any, kept: Any) -> Any:
    """`changed`, with the leaves of `kept` where a parameter is frozen at `step`.

    Args:
      step: updates made or left out before.
      changed, kept: trees of the parameters' structure.
    """

    def choose(path: tuple[Any, ...], new: jax.Array, old: jax.Array) -> jax.Array:
        start = frozen_from(freeze, path)
        if start in (0, NEVER):
            return new if start else old
        return jnp.where(step < start, new, old)

    return jax.tree.map_with_path(choose, changed, kept) if freeze else changed


def without_frozen(freeze: Freeze, step: jax.Array, tree: Any) -> Any:
    """Gradients or updates, 0 for what is frozen at `step`."""
    return keep_frozen(freeze, step, tree, jax.tree.map(jnp.zeros_like, tree)) if freeze else tree
