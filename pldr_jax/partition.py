"""Where arrays live: one mesh builder, one table of logical axes, one rule for axes that do not
divide.

Parameters and activations name their axes (`"embed"`, `"heads"`); `RULES` says which mesh axes
each name is split over. An axis whose size does not divide by its mesh axes is split over the
longest prefix of them that divides, and else is
whole on every device: 14 heads over 4 tensor devices stay whole, F = 2389 (a prime) always does.
"""

import math
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import flax.linen as nn
import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pldr_jax.config import ConfigError, MeshConfig

Names: TypeAlias = tuple[str | None, ...]
"""A logical axis of `RULES`, or None, for each axis of an array."""

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),  # B
    "length": (),  # T: Q^T Q sums over it
    "activation_embed": (),  # D of an activation
    # parameters, and the activations that follow them
    "vocab": ("tensor",),  # V
    "embed": ("fsdp",),  # D of a parameter
    "joined": (),  # products that read the same rows, side by side
    "heads": ("tensor",),  # N: every PLGA parameter is per head
    "head_dim": (),  # H
    "ffn": ("tensor",),  # F
    "metric_in": ("fsdp",),  # H, the input axis of the metric learner, W, P and a
    "metric_hidden": (),  # M
    "norm": (),  # scales and biases of LayerNorms: small
    "layers": (),  # L, and R inside it: scanned over
}
"""Logical axis -> the mesh axes it is split over, in order."""


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A `(data, fsdp, tensor)` mesh over all devices (or `devices`).

    Raises:
      ConfigError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            "Mesh.data x Mesh.fsdp x Mesh.tensor = "
            f"{config.data} x {config.fsdp} x {config.tensor}: "
            f"must make {len(devices)}, the number of devices (one axis may be -1, for the rest)"
        )
    # In the order of the torus, where there is one. Linen's logical axes need Auto.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=auto, devices=devices)
    except NotImplementedError:  # an axis of the torus has to be shared
        grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=auto)


def mesh_of_all_devices() -> Mesh | None:
    """A mesh that splits parameters over whatever devices there are; None where there is one."""
    return build_mesh(MeshConfig(data=1, fsdp=-1)) if jax.device_count() > 1 else None


def partition_spec(
    shape: Sequence[int], names: Sequence[str | None], axis_sizes: dict[str, int]
) -> PartitionSpec:
    """The PartitionSpec of an array from its logical axis names.

    Args:
      shape: the array's shape.
      names: a logical axis of `RULES`, or None, for each axis of the array.
      axis_sizes: devices along each mesh axis.

    Raises:
      ValueError: an unknown name, a wrong number of names, or two axes claiming one mesh axis.
    """
    if len(shape) != len(names):
        raise ValueError(
            f"{len(names)} axis names {tuple(names)} for an array of shape {tuple(shape)}"
        )
    spec: list[Any] = []
    claimed: dict[str, str] = {}
    for size, name in zip(shape, names, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(
                f"unknown logical axis {name!r}; the table in partition.py has {', '.join(RULES)}"
            )
        wanted = RULES[name] if name is not None else ()
        for axis in wanted:
            if axis in claimed:
                raise ValueError(
                    f"axes {claimed[axis]!r} and {name!r} of {tuple(names)} "
                    f"both claim mesh axis {axis!r}"
                )
            claimed[axis] = str(name)
        while wanted and size % math.prod(axis_sizes[axis] for axis in wanted):
            wanted = wanted[:-1]
        spec.append(None if not wanted else wanted[0] if len(wanted) == 1 else wanted)
    return PartitionSpec(*spec)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of a tree of shapes whose parameters are boxed with their logical axes; the
    rest is replicated.
    """
    sizes = dict(mesh.shape)

    def of_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        # An optimiser may keep nothing of a parameter, or something of another shape.
        value = leaf.value
        if not hasattr(value, "shape"):
            return value
        if len(value.shape) != len(leaf.names):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, partition_spec(value.shape, leaf.names, sizes))

    return jax.tree.map(
        of_leaf, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array `[B, ...]`: batch over the data and fsdp axes."""
    names = ("batch",) + (None,) * (len(shape) - 1)
    return NamedSharding(mesh, partition_spec(shape, names, dict(mesh.shape)))


def on_every_device(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The array, whole on every device of the mesh; without a mesh, `x` itself."""
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


def process_part(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of a global batch this process feeds, and how many parts there are.

    Processes whose devices differ along the tensor axis alone hold the same rows, and feed the same
    part.

    Raises:
      ConfigError: the rows of two processes overlap, or are not as many.
    """
    sharding = batch_sharding(mesh, (batch_size,))
    places: Mapping[Any, Any] = sharding.devices_indices_map((batch_size,))
    rows: dict[int, set[int]] = {}
    for device, (part,) in places.items():
        rows.setdefault(device.process_index, set()).update(range(batch_size)[part])
    return part_of(rows, jax.process_index())


def part_of(rows: Mapping[int, Set[int]], process: int) -> tuple[int, int]:
    """The same, from the rows of a global batch that each process holds.

    Raises:
      ConfigError: the rows of two processes overlap, or are not as many.
    """
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    held = [row for part in parts for row in part]
    if len(set(held)) < len(held) or len(set(map(len, parts))) > 1:
        raise ConfigError(
            "Mesh: gives two processes rows of which only some are the same; choose Mesh.tensor so "
            "that it divides, or is a multiple of, the devices of a process"
        )
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def mesh_scope(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The scope in which `constrain` knows the mesh; None is a single device, without one."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def divided(name: str, size: int) -> bool:
    """Whether an axis of that logical name and size is split on the mesh in scope."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    parts = partition_spec((size,), (name,), {axis: sizes.get(axis, 1) for axis in MESH_AXES})[0]
    axes = (parts,) if isinstance(parts, str) else parts or ()
    return math.prod(sizes.get(axis, 1) for axis in axes) > 1


def in_use(parameter: jax.Array, names: Names, dtype: Any) -> jax.Array:
    """A parameter as a product takes it: in the compute dtype, gathered over fsdp, still split over
    tensor. The cast comes first, so that half as many bytes travel; the gradient goes back to where
    the parameter lies.
    """
    if parameter.dtype != dtype:
        parameter = constrain(parameter.astype(dtype), *names)
    return constrain(
        parameter, *(None if "fsdp" in RULES.get(name or "", ()) else name for name in names)
    )


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: a backward pass gathers parameters again. Kept, those of all
    layers would be whole on every device.
    """
    return primitive.name not in ("sharding_constraint", "reshape")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay `x` out by its logical axes on the mesh in scope; without a mesh,
    `x` itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, names, dict(mesh.shape)))
