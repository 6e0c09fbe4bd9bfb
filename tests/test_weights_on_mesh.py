"""Weights come to a mesh in their parts, and no array of them is ever whole on one device."""

import dataclasses
import functools
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_same_bits
from jax.sharding import SingleDeviceSharding
from test_engine import CONFIG, params_of

import pldr_jax
from pldr_jax.config import ExperimentConfig, MeshConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.interop.config_json import PieceIds, config_json
from pldr_jax.interop.tensors import SINGLE, StoredTensor, TensorFiles, write_folder
from pldr_jax.interop.transformers import CONFIG as CONFIG_JSON
from pldr_jax.interop.transformers import to_source
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.model.counts.shapes import param_shardings
from pldr_jax.partition import build_mesh
from pldr_jax.runs.folder import write_run
from pldr_jax.training.finetune.begin import start_from
from pldr_jax.training.freeze import freeze as freezing
from pldr_jax.training.start import first_state

MODEL = dataclasses.replace(CONFIG, vocab_size=96, num_heads=8, num_layers=3, num_gated_units=2)
MESHES = [MeshConfig(1, 4, 2), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)]


@functools.cache
def host_params() -> Any:
    """The parameters, on no device."""
    params = jax.device_get(params_of(MODEL))
    params_of.cache_clear()
    gc.collect()
    return params


@pytest.fixture(scope="module", params=["run folder", "safetensors"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    params = host_params()
    if request.param == "run folder":
        config = config_to_dict(ExperimentConfig(model=MODEL))
        write_run(folder, 3, params, None, config, {})
        return folder
    folder.mkdir()
    tensors = to_source(MODEL, params, None)
    write_folder(folder, TensorFiles(tensors, {SINGLE: list(tensors)}, {"format": "pt"}))
    (folder / CONFIG_JSON).write_text(
        json.dumps(config_json(MODEL, PieceIds(1, 2, 3), "some/code"))
    )
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[jax.Array]]:
    """Arrays that lived when one had been put somewhere."""
    seen: list[jax.Array] = []
    put, callback = jax.device_put, jax.make_array_from_callback

    def watch(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            seen.extend(jax.live_arrays())
            return result

        return call

    monkeypatch.setattr(jax, "device_put", watch(put))
    monkeypatch.setattr(jax, "make_array_from_callback", watch(callback))
    yield seen


def assert_no_whole_parameter(params: Any, made: list[jax.Array]) -> None:
    """Not now, and not when something was put somewhere."""
    large = {
        leaf.shape for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated
    }
    # Some parameter has the shape of another one's part.
    large -= {leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(params)}
    assert len(large) > 5
    for array in [*made, *jax.live_arrays()]:
        if not array.is_deleted() and array.shape in large:
            assert not isinstance(array.sharding, SingleDeviceSharding), array.shape
            assert not array.sharding.is_fully_replicated, array.shape


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_parameter_is_whole_on_a_device(
    checkpoint: Path, sizes: MeshConfig, made: list[jax.Array]
) -> None:
    mesh = build_mesh(sizes)
    opened = open_checkpoint(checkpoint, mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, opened.params) == param_shardings(MODEL, mesh)
    for one, two in zip(
        jax.tree.leaves(opened.params), jax.tree.leaves(host_params()), strict=True
    ):
        assert np.array_equal(one, two)
    assert_no_whole_parameter(opened.params, made)


def test_fine_tuning_begins_on_its_mesh(
    checkpoint: Path, tmp_path: Path, made: list[jax.Array]
) -> None:
    """And takes the weights over: those of the checkpoint are not held beside them."""
    fields = ["Mesh.data=1", "Mesh.fsdp=4", "Mesh.tensor=2", "Data.tokenizer='its.model'"]
    before = {id(array) for array in jax.live_arrays()}
    config, initial = start_from(checkpoint, tmp_path, [], fields)
    assert initial is not None
    mesh = build_mesh(config.mesh)
    state = first_state(config, mesh, initial)
    assert jax.tree.map(lambda x: x.sharding, state.params) == param_shardings(MODEL, mesh)
    assert_same_bits(jax.device_get(state.params), host_params())
    assert_no_whole_parameter(state.params, made)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(initial.params))
    # Without the views of single parts, which the assertions above have made.
    held = sum(
        array.nbytes
        for array in jax.live_arrays()
        if id(array) not in before and len(array.sharding.device_set) > 1
    )
    assert held < 1.01 * sum(x.nbytes for x in jax.tree.leaves(state))


def test_freezing_begins_on_the_mesh_that_is_named(
    checkpoint: Path, tmp_path: Path, made: list[jax.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def look(opened: Any, *_: Any) -> dict[str, Any]:
        assert jax.sharding.get_abstract_mesh().shape["fsdp"] == 4
        seen.append(opened.params)
        return {}

    monkeypatch.setattr(freezing, "_freeze", look)
    fields = ["Mesh.data=1", "Mesh.fsdp=4", "Mesh.tensor=2"]
    freezing.freeze(checkpoint, tmp_path / "out", overrides=fields)
    mesh = build_mesh(MESHES[0])
    assert jax.tree.map(lambda x: x.sharding, seen[0]) == param_shardings(MODEL, mesh)
    assert_no_whole_parameter(seen[0], made)


def test_a_loaded_model_holds_no_more_than_its_share(checkpoint: Path) -> None:
    lm = pldr_jax.load(checkpoint, mesh=MESHES[0])
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(lm.params):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    # 8 devices; norms and biases are whole on each, which counts in a model as small as this one.
    assert len(set(held.values())) == 1
    assert 8 * held[jax.devices()[0]] < 1.5 * sum(x.nbytes for x in jax.tree.leaves(lm.params))
    one = pldr_jax.load(checkpoint)
    tokens = np.arange(12)[None] % MODEL.vocab_size
    np.testing.assert_allclose(lm(tokens).logits, one(tokens).logits, atol=2e-3)


def held_by_devices() -> dict[Any, int]:
    """Bytes of live arrays on each device, views of the same buffer counted once."""
    held: dict[Any, dict[int, int]] = {device: {} for device in jax.devices()}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            held[shard.device][shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return {device: sum(buffers.values()) for device, buffers in held.items()}


@pytest.mark.slow
def test_a_model_that_has_generated_holds_its_weights_once(tmp_path: Path) -> None:
    model = dataclasses.replace(CONFIG, num_heads=8, num_layers=2, context_length=16)
    params = jax.device_get(params_of(model))
    params_of.cache_clear()
    write_run(tmp_path, 3, params, None, config_to_dict(ExperimentConfig(model=model)), {})
    before = max(held_by_devices().values())
    lm = pldr_jax.load(tmp_path, mesh=MESHES[0])
    loaded = max(held_by_devices().values()) - before
    assert loaded < 1.2 * sum(x.nbytes for x in jax.tree.leaves(params)) / 8
    lm.generate([[5, 6, 7]], 4, stop_ids=())
    gc.collect()
    assert max(held_by_devices().values()) - before < 1.01 * loaded
    assert_same_bits(jax.device_get(lm.params), params)


def test_only_the_parts_that_are_asked_for_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of a safetensors file once, and no large tensor whole."""
    if not (checkpoint / SINGLE).exists():
        pytest.skip("Orbax reads run folders")
    read: list[int] = []
    whole = StoredTensor.__getitem__

    def noted(self: StoredTensor, index: Any) -> np.ndarray:
        part = whole(self, index)
        read.append(part.size)
        if min(self.shape) > 16 and len(self.shape) == 2:
            assert part.size < math.prod(self.shape)
        return part

    monkeypatch.setattr(StoredTensor, "__getitem__", noted)
    opened = open_checkpoint(checkpoint, mesh=build_mesh(MESHES[0]))
    assert sum(read) == sum(x.size for x in jax.tree.leaves(opened.params))
