"""What the compiled programs of the published model exchange on meshes of eight simulated devices.

A cut of it in depth, context and rows is compiled: shapes of parameters are the published ones.
Numbers of rows and tokens are such that no other size is a multiple of theirs.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import sys
from typing import Any

import jax
import pytest
from helpers import REPOSITORY

from pldr_jax.config import ExperimentConfig, MeshConfig
from pldr_jax.config.load import load_config
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model.cache import empty_cache
from pldr_jax.model.counts.shapes import param_shapes
from pldr_jax.model.decoder import unstack_layers
from pldr_jax.partition import batch_sharding, build_mesh
from pldr_jax.training.losses import token_loss
from pldr_jax.training.rows import forward_rows
from pldr_jax.training.step import abstract_state, jit_train_step

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from hlo import Collective, collectives, instructions

ROWS, TOKENS = 24, 31
QUICK: Any = {"xla_backend_optimization_level": 0}
FULL = bool(os.environ.get("PLDR_SLOW_TESTS"))
"""Set to compile the training step at full depth, which takes minutes."""

MESHES = [(1, 8, 1), (2, 4, 1), (1, 4, 2)]


def config_of(sizes: tuple[int, int, int]) -> ExperimentConfig:
    cut = [] if FULL else ["Model.num_layers=2", "Model.num_residual_layers=2"]
    cut += [f"Data.batch_size={ROWS}", f"Model.context_length={TOKENS + 1}"]
    config = load_config([REPOSITORY / "configs" / "pldr_110m.gin"], cut)
    return dataclasses.replace(config, mesh=MeshConfig(*sizes))


@functools.cache
def training_step(sizes: tuple[int, int, int]) -> tuple[str, str]:
    """The step as it is lowered, and as it is compiled."""
    config = config_of(sizes)
    mesh = build_mesh(config.mesh)
    state = abstract_state(config, mesh)
    shape = (ROWS, TOKENS + 1)
    rows = jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh, shape))
    with jax.set_mesh(mesh):
        lowered = jit_train_step(config, mesh, state).lower(state, rows)
        return lowered.as_text(), lowered.compile(QUICK).as_text()


def whole_batches(text: str, config: ExperimentConfig, small: int = 0) -> list[str]:
    """Tensors of more than `small` elements that carry the whole batch, alone or joined with other
    axes.
    """
    heads = {config.model.num_heads, config.model.num_heads // config.mesh.tensor}
    widths = [{1, TOKENS}, {1} | heads, {1, config.model.head_dim}]
    sizes = {ROWS * math.prod(joined) for joined in itertools.product(*widths)}
    return [
        f"{i.name} {shape} {i.scope}"
        for i in instructions(text)
        for shape in i.shapes
        if sizes & set(shape.dims) and shape.size > small
    ]


def sizes_of_parameters(config: ExperimentConfig) -> set[int]:
    """Elements of every parameter, of a layer of it, of a residual layer, and of the weights of
    q, k and v side by side, as a decode step takes them: whole, and what lies on a device of the
    tensor axis.
    """
    L, R = config.model.num_layers, config.model.num_residual_layers
    whole = {math.prod(shape) for shape in param_shapes(config.model).values()}
    whole.add(3 * L * config.model.model_dim**2)
    layers = {size // n for size in whole for n in (1, L, L * R) if size % n == 0}
    return {size // n for size in layers for n in (1, config.mesh.tensor) if size % n == 0}


def along_tensor(collective: Collective, config: ExperimentConfig) -> bool:
    """Whether it goes along the mesh's tensor axis, the innermost one, alone."""
    n = config.mesh.tensor
    return n > 1 and all(
        len(group) == n and group[0] // n == group[-1] // n for group in collective.groups
    )


def assert_only_what_the_mesh_implies(
    text: str, config: ExperimentConfig, small: int = 0
) -> list[Collective]:
    """Along tensor, activations are summed; otherwise parameters and scalars alone travel, and
    arrays of at most `small` elements.
    """
    assert not whole_batches(text, config, small)
    found, allowed = collectives(text), sizes_of_parameters(config)
    assert found
    for one in found:
        assert one.groups, one
        if along_tensor(one, config) or 0 < max(shape.size for shape in one.shapes) <= small:
            continue
        assert one.kind in ("all-gather", "all-reduce", "reduce-scatter"), one
        n = len(one.groups[0])
        for shape in one.shapes:
            size = shape.size * (n if one.kind == "reduce-scatter" else 1)
            assert size <= 1 or size in allowed, (str(shape), one)
    return found


@pytest.mark.parametrize("sizes", MESHES)
def test_the_batch_stays_split_and_only_parameters_travel(sizes: tuple[int, int, int]) -> None:
    config = config_of(sizes)
    assert_only_what_the_mesh_implies(training_step(sizes)[1], config)


def inference_program(program: str, sizes: tuple[int, int, int]) -> str:
    """Evaluation, prefill or a decode step, compiled."""
    config = config_of(sizes)
    model, mesh = config.model, build_mesh(config.mesh)
    params = abstract_state(config, mesh).params

    def split(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh, shape))

    def evaluate(params: Any, rows: jax.Array) -> Any:
        outputs, targets_BT, _ = forward_rows(model, params, rows)
        return token_loss(outputs.logits, targets_BT)

    def admit(params: Any, tokens_BT: jax.Array, length_B: jax.Array) -> Any:
        return prefill(model, params, tokens_BT, length_B, None, 2 * TOKENS)

    def decode(params: Any, tokens_B: jax.Array) -> Any:
        cache = empty_cache(model, ROWS, 2 * TOKENS, None, "G_LM", model.dtype)
        return decode_step(model, unstack_layers(model, params), tokens_B, cache)

    functions: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "evaluate": (evaluate, (split(ROWS, TOKENS + 1),)),
        "prefill": (admit, (split(ROWS, TOKENS), split(ROWS))),
        "decode": (decode, (split(ROWS),)),
    }
    function, inputs = functions[program]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(params, *inputs).compile(QUICK).as_text()


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 1, 4)])
@pytest.mark.parametrize("program", ["evaluate", "prefill", "decode"])
def test_evaluation_and_decoding_keep_the_batch_split(
    program: str, sizes: tuple[int, int, int]
) -> None:
    """No logits are gathered, no cache is moved: what crosses the batch axes is parameters."""
    config = config_of(sizes)
    # A decode step takes one row of the table for each token: rows, of a device's part of D, travel
    # and not the table.
    rows = ROWS * config.model.model_dim // sizes[1] if program == "decode" and sizes[1] > 1 else 0
    found = assert_only_what_the_mesh_implies(inference_program(program, sizes), config, rows)
    table = config.model.vocab_size // sizes[2], config.model.model_dim
    assert not rows or table not in [shape.dims for one in found for shape in one.shapes]


@pytest.mark.parametrize("sizes", MESHES)
def test_each_parameter_is_gathered_once_a_use_and_reduced_once(
    sizes: tuple[int, int, int],
) -> None:
    """A use: forward, and backward where the layer's parameters were not kept."""
    config = config_of(sizes)
    found = [one for one in collectives(training_step(sizes)[1]) if not along_tensor(one, config)]
    shapes = param_shapes(config.model)
    outside = {name: math.prod(shape) for name, shape in shapes.items() if name[0] != "layers"}
    learner = {name: math.prod(shape) for name, shape in shapes.items() if "plga" in name}
    total = sum(math.prod(shape) for shape in shapes.values())
    once = sum(outside.values()) + sum(learner.values())
    share = max(config.mesh.tensor // 2, 1)

    def elements(*kinds: str) -> int:
        return sum(
            one.times * shape.size * (len(one.groups[0]) if one.kind == "reduce-scatter" else 1)
            for one in found
            if one.kind in kinds
            for shape in one.shapes
        )

    assert elements("all-gather") <= (once + 2 * (total - once)) / share
    reduced = elements("all-reduce", "reduce-scatter")
    # Along data, what fsdp has scattered is summed once more.
    assert total / config.mesh.tensor * 0.9 < reduced < total / share * 1.2
    table = [one for one in found if one.kind == "reduce-scatter"]
    vocab, width = config.model.vocab_size, config.model.model_dim
    scattered = vocab // config.mesh.tensor * width // config.mesh.fsdp
    assert scattered in [shape.size for one in table for shape in one.shapes]


@pytest.mark.parametrize("sizes", MESHES[:1])
def test_parameters_are_gathered_in_the_compute_dtype(sizes: tuple[int, int, int]) -> None:
    """A CPU widens bfloat16 in its own programs, so that the lowered one is read: no float32
    parameter is made whole but those of PLGA that are used in float32.
    """
    config = config_of(sizes)
    constraint = r"sdy\.sharding_constraint \S+ <@\w+, (\[.*?\])> : tensor<([\dx]+)x(f32|bf16)>"
    gathered = {
        (tuple(map(int, dims.split("x"))), dtype)
        for split, dims, dtype in re.findall(constraint, training_step(sizes)[0])
        if "fsdp" not in split
    }
    model = config.model
    assert ((model.vocab_size, model.model_dim), "bf16") in gathered
    assert ((model.model_dim, model.vocab_size), "bf16") in gathered
    assert ((model.model_dim, model.ffn_width), "bf16") in gathered
    power_law = (model.num_layers, model.num_heads, model.head_dim, model.head_dim)
    assert {dims for dims, dtype in gathered if dtype == "f32"} == {power_law, power_law[1:]}
