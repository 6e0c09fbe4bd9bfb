"""Meshes, logical axes, and the same training step on every mesh of eight simulated devices."""

import collections
import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import GOLDENS
from helpers import REPOSITORY
from jax.sharding import PartitionSpec

from pldr_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.config.load import load_config
from pldr_jax.model.counts.shapes import abstract_params
from pldr_jax.partition import (
    RULES,
    batch_sharding,
    build_mesh,
    divided,
    part_of,
    partition_spec,
    process_part,
    shardings,
)
from pldr_jax.training.step import TrainState, abstract_state, create_state, jit_train_step

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=64,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=12,
        unroll=False,
    ),
    # With a large eps the update is smooth in the gradient; a small one divides noise by noise.
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2),
    data=DataConfig(batch_size=8),
    training=TrainingConfig(steps=10),
)
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def born(mesh_config: MeshConfig, devices: int) -> TrainState:
    mesh = build_mesh(mesh_config, jax.devices()[:devices])
    return create_state(CONFIG, mesh)


@functools.cache
def some_steps(mesh_config: MeshConfig, devices: int) -> tuple[TrainState, dict[str, float]]:
    """The state after three steps from the same initial state, and the last one's metrics."""
    mesh = build_mesh(mesh_config, jax.devices()[:devices])
    rows = np.random.default_rng(0).integers(1, 64, (8, 12)).astype(np.int32)
    whole = jax.tree.map(np.array, born(MeshConfig(1, 1, 1), 1))
    # Away from A_LM = 0, where rounding decides gradients (test_parity.py).
    whole.params["layers"]["attention"]["plga"]["b_W"][:] = 2.0
    with jax.set_mesh(mesh):
        layout = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, mesh))
        state = jax.device_put(whole, layout)
        rows = jax.device_put(rows, batch_sharding(mesh, rows.shape))
        lowered = jit_train_step(CONFIG, mesh, state).lower(state, rows)
        step = lowered.compile({"xla_backend_optimization_level": 0})
        for _ in range(3):
            state, metrics = step(state, rows)
    return state, {name: float(value) for name, value in metrics.items()}


def test_eight_devices_are_simulated() -> None:
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_three_steps_are_the_same_on_every_mesh(sizes: tuple[int, int, int]) -> None:
    before = born(MeshConfig(1, 1, 1), 1)
    whole, whole_metrics = some_steps(MeshConfig(1, 1, 1), 1)
    after, metrics = some_steps(MeshConfig(*sizes), 8)
    assert metrics["train/learning_rate"] == pytest.approx(whole_metrics["train/learning_rate"])
    assert metrics["train/loss"] == pytest.approx(whole_metrics["train/loss"], abs=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(whole_metrics["train/grad_norm"], rel=1e-3)

    def compare(path: Any, expected: Any, actual: Any, start: Any) -> None:
        name = jax.tree_util.keystr(path)
        if not name.endswith("['b_W']"):
            assert np.abs(np.asarray(expected) - np.asarray(start)).max() > 1e-4, f"{name}: at rest"
        assert np.abs(np.asarray(actual) - np.asarray(expected)).max() < 1e-5, name

    jax.tree_util.tree_map_with_path(compare, whole.params, after.params, before.params)


def spec_of(state: TrainState, *path: str) -> PartitionSpec:
    leaf: Any = state.params
    for name in path:
        leaf = leaf[name]
    return leaf.sharding.spec


def padded(spec: PartitionSpec, axes: int) -> tuple[Any, ...]:
    return tuple(spec) + (None,) * (axes - len(spec))


def test_the_state_is_born_sharded() -> None:
    state, mesh = born(MeshConfig(2, 2, 2), 8), build_mesh(MeshConfig(2, 2, 2))
    # [L, D, N, H]: fsdp splits the model width, tensor the heads.
    query = state.params["layers"]["attention"]["q"]["kernel"]
    assert padded(query.sharding.spec, 4) == (None, "fsdp", "tensor", None)
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 8, 1, 8)}
    assert padded(spec_of(state, "head", "kernel"), 2) == ("fsdp", "tensor")
    assert padded(spec_of(state, "layers", "attention", "plga", "W"), 4) == (
        None, "tensor", "fsdp", None,
    )  # fmt: skip
    assert padded(spec_of(state, "embedding", "norm", "scale"), 1) == (None,)
    # Both moments of the optimiser lie as the parameters do.
    specs = [
        leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['attention']['q']['kernel']")
    ]
    assert specs == [query.sharding.spec] * 2
    abstract = abstract_state(CONFIG, mesh)
    for target, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert target.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        assert (target.shape, target.dtype) == (leaf.shape, leaf.dtype)
    # The numbers do not depend on the mesh.
    whole = born(MeshConfig(1, 1, 1), 1)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


def test_a_step_keeps_the_shardings() -> None:
    after = some_steps(MeshConfig(2, 2, 2), 8)[0]
    query = after.params["layers"]["attention"]["q"]["kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 8, 1, 8)}


def test_axes_that_do_not_divide_stay_whole() -> None:
    params = some_steps(MeshConfig(1, 1, 8), 8)[0].params
    # 2 heads and F = 42 over 8 devices; the vocabulary of 64 divides.
    for leaf, shape in {
        "q": (params["layers"]["attention"]["q"]["kernel"], (2, 16, 2, 8)),
        "w1": (params["layers"]["ffn"]["w1"]["kernel"], (2, 16, 42)),
        "head": (params["head"]["kernel"], (16, 8)),
    }.values():
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}
    sizes = {"data": 4, "fsdp": 2, "tensor": 4}
    assert partition_spec((14, 64), ("heads", "head_dim"), sizes) == PartitionSpec(None, None)
    # Of several mesh axes, the longest prefix that divides.
    assert partition_spec((8, 3), ("batch", None), sizes) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec((12, 3), ("batch", None), sizes) == PartitionSpec("data", None)
    assert partition_spec((3, 3), ("batch", None), sizes) == PartitionSpec(None, None)


def test_two_axes_cannot_claim_one_mesh_axis() -> None:
    with pytest.raises(ValueError, match="'heads' and 'vocab' .* both claim mesh axis 'tensor'"):
        partition_spec((2, 64), ("heads", "vocab"), SIZES)
    with pytest.raises(ValueError, match="'batch' and 'embed' .* both claim mesh axis 'fsdp'"):
        partition_spec((2, 64), ("batch", "embed"), SIZES)


def test_unknown_and_miscounted_axes() -> None:
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        partition_spec((2,), ("head",), SIZES)
    with pytest.raises(ValueError, match="2 axis names .* shape \\(2,\\)"):
        partition_spec((2,), ("heads", "embed"), SIZES)


def test_rules_name_mesh_axes() -> None:
    assert {axis for axes in RULES.values() for axis in axes} == {"data", "fsdp", "tensor"}


def test_mesh_sizes() -> None:
    assert dict(build_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(build_mesh(MeshConfig(2, -1, 2)).shape) == SIZES
    assert dict(build_mesh(MeshConfig(), jax.devices()[:1]).shape)["data"] == 1
    for sizes in [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (16, 1, 1)]:
        with pytest.raises(ConfigError, match="^Mesh.data x .*: must make 8, the number") as error:
            build_mesh(MeshConfig(*sizes))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="^Mesh = .*only one axis can be -1"):
        MeshConfig(-1, -1, 1)
    with pytest.raises(ConfigError, match="^Mesh.tensor = 0"):
        dataclasses.replace(MeshConfig(), tensor=0)


def table_110m(sizes: tuple[int, int, int]) -> list[tuple[str, tuple[int, ...], PartitionSpec]]:
    """Name, shape and PartitionSpec of every parameter of the published model; nothing is made."""
    boxed = abstract_params(load_config([REPOSITORY / "configs" / "pldr_110m.gin"], []).model)
    placed = jax.tree.leaves(shardings(boxed, build_mesh(MeshConfig(*sizes))))
    leaves = jax.tree.leaves_with_path(nn.unbox(boxed))
    return [
        ("/".join(key.key for key in path), leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(leaves, placed, strict=True)
    ]


def test_where_each_parameter_of_the_published_model_lies() -> None:
    lines = []
    for name, shape, spec in table_110m((2, 2, 2)):
        axes = [axis or "-" for axis in padded(spec, len(shape))]
        lines.append(f"{name:60s} {'x'.join(map(str, shape)):22s} {' '.join(axes)}")
    assert lines == (GOLDENS / "partition_110m_2x2x2.txt").read_text().splitlines()


def test_no_large_parameter_is_whole_everywhere_under_fsdp() -> None:
    for name, shape, spec in table_110m((1, 8, 1)):
        if 4 * np.prod(shape) > 2**20:
            assert "fsdp" in spec, name


def test_an_fsdp_step_gathers_parameters_and_reduces_gradients() -> None:
    """No collective holds more than a parameter's part or a batch's activations."""
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, g_source="identity", vocab_size=512)
    )
    mesh = build_mesh(MeshConfig(1, 8, 1))
    with jax.set_mesh(mesh):
        state = create_state(config, mesh)
        rows = jax.device_put(np.ones((8, 12), np.int32), batch_sharding(mesh, (8, 12)))
        text = jit_train_step(config, mesh, state).lower(state, rows).compile().as_text()
    made = re.findall(
        r"= [^=]*? (all-[a-z-]+|reduce-scatter|collective-permute)(?:-start)?\(", text
    )
    assert set(made) <= {"all-gather", "all-reduce", "reduce-scatter"}, collections.Counter(made)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    assert "512,16" in gathered  # the embedding table, before its rows are taken
    logits = {"8,11,512", "8,512,11"}
    assert not logits & set(gathered)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({0: {0, 1}, 1: {2, 3}}, [(0, 2), (1, 2)]),
        ({0: {2, 3}, 1: {0, 1}, 2: {2, 3}, 3: {0, 1}}, [(1, 2), (0, 2), (1, 2), (0, 2)]),
        ({0: {0, 2}, 1: {1, 3}}, [(0, 2), (1, 2)]),
        ({0: {0, 1}, 1: {0, 1}}, [(0, 1), (0, 1)]),
    ],
)
def test_processes_with_the_same_rows_feed_the_same_part(rows, expected) -> None:
    assert [part_of(rows, process) for process in rows] == expected


@pytest.mark.parametrize("rows", [{0: {0, 1}, 1: {1, 2}}, {0: {0, 1, 2}, 1: {3}}])
def test_processes_whose_rows_are_only_partly_the_same_are_refused(rows) -> None:
    with pytest.raises(ConfigError, match=r"^Mesh: .*Mesh\.tensor") as error:
        part_of(rows, 0)
    assert "\n" not in str(error.value)


def test_one_process_feeds_the_whole_batch() -> None:
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        assert process_part(build_mesh(mesh), 8) == (0, 1)


def test_which_axes_are_divided_on_the_mesh_in_scope() -> None:
    assert not divided("heads", 14)
    for sizes, heads, rows in (((8, 1, 1), False, True), ((4, 1, 2), True, True)):
        with jax.set_mesh(build_mesh(MeshConfig(*sizes))):
            assert (divided("heads", 14), divided("batch", 8)) == (heads, rows)
            assert not divided("length", 8) and not divided("heads", 7)
    with jax.set_mesh(build_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])):
        assert not divided("heads", 14) and not divided("batch", 8)


def test_the_order_of_devices_is_that_of_the_torus() -> None:
    """On a v5e slice of 4 x 8 chips, neighbours on a mesh axis are linked chips."""
    pytest.importorskip("libtpu", reason="needs the TPU's compiler: pip install libtpu")
    from pldr_jax.training.plan.chips import CHIPS
    from pldr_jax.training.plan.compile import plan_mesh

    mesh, compiler = plan_mesh(MeshConfig(4, 8, 1), 32, CHIPS["v5e"])
    assert "4x8" in compiler
    grid = np.array([device.coords for device in mesh.devices.flat]).reshape(4, 8, -1)
    for axis in (0, 1):
        assert (np.abs(np.diff(grid, axis=axis)).sum(-1) == 1).all()
    tensor, _ = plan_mesh(MeshConfig(1, 8, 4), 32, CHIPS["v5e"])
    assert {device.id for device in tensor.devices.flat} == {d.id for d in mesh.devices.flat}
