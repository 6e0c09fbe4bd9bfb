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
    large = {
        leaf.shape
        for leaf in jax.tree.leaves(opened.params)
        if not leaf.sharding.is_fully_replicated
    }
    # Some parameter has the shape of another one's part.
    large -= {leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(opened.params)}
    assert len(large) > 5
    for array in [*made, *jax.live_arrays()]:
        if not array.is_deleted() and array.shape in large:
            assert not isinstance(array.sharding, SingleDeviceSharding), array.shape
            assert not array.sharding.is_fully_replicated, array.shape


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
