"""What a run would need, found without allocating it: the step is compiled on abstract arrays.

For a TPU, where the package libtpu is installed, it is the TPU's own compiler that is asked, about
a slice of the size of the mesh, which takes minutes. Elsewhere the step is compiled for as many
simulated CPU devices: that compiler widens bfloat16 products to float32 and has no fused attention,
so that its figure is an estimate.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ExperimentConfig, LoraConfig, MeshConfig, ModelConfig
from pldr_jax.data.pipeline import ValidationRows
from pldr_jax.data.rows import blank_rows, row_shape
from pldr_jax.inference.decode import prefill
from pldr_jax.model.counts.flops import BACKWARD, forward_flops, repeated_flops, training_flops
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.decoder import unstack_layers
from pldr_jax.model.deductive import g_lm_shape
from pldr_jax.model.lora import without_head
from pldr_jax.partition import batch_sharding, build_mesh
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.plan.chips import Chip
from pldr_jax.training.plan.settings import MOST_DEVICES
from pldr_jax.training.start import check_batch_size
from pldr_jax.training.step import abstract_state, jit_train_step, loss_fn
from pldr_jax.training.task.data import HeldOutExamples
from pldr_jax.training.task.evaluate import TaskEvaluator

REMEDY = (
    "raise Mesh.fsdp, Mesh.tensor or Training.grad_accumulation, lower Data.batch_size, or set "
    "Model.remat = 'full'"
)
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Of the CPU's compiler: it skips the optimisations that change no buffer."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs. Bytes are of one device; operations are of a whole step on all devices.

    Attributes:
      parameters: of the model.
      mesh: devices along each mesh axis.
      compiler: who has compiled the step.
      state_bytes: parameters and optimiser state.
      trained_bytes: of them, parameters that are trained: all, or adapters.
      step_bytes: activations and temporaries of a training step.
      evaluation_bytes: the same of an evaluation.
      sample_bytes: of the text that an evaluation shows: weights as decode steps read them, the
        cache, and temporaries of the prompt at its longest.
      saved_bytes: what the forward pass of a microbatch saves for the backward pass, before a
        compiler computes parts of it again.
      model_flops: without what rematerialisation repeats.
      device_flops: of the busiest device, with it.
      tokens: inputs of a step.
    """

    parameters: int
    mesh: dict[str, int]
    compiler: str
    state_bytes: int
    trained_bytes: int
    step_bytes: int
    saved_bytes: int
    model_flops: float
    device_flops: float
    tokens: int
    evaluation_bytes: int = 0
    sample_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Of one device: the state, and the largest of what is done with it. A checkpoint is
        restored into the state's own places, and needs nothing besides.
        """
        return self.state_bytes + max(self.step_bytes, self.evaluation_bytes, self.sample_bytes)


def mesh_size(config: MeshConfig, devices: int | None) -> int:
    """Devices of the mesh: `devices`, or else what the config states, -1 taken for 1.

    Raises:
      ConfigError: more than can be simulated.
    """
    stated = math.prod(max(size, 1) for size in (config.data, config.fsdp, config.tensor))
    if stated > MOST_DEVICES:
        raise ConfigError(f"Mesh: makes {stated:,} devices; at most {MOST_DEVICES:,} are planned")
    return stated if devices is None else devices


def plan_mesh(config: MeshConfig, size: int, chip: Chip | None) -> tuple[Mesh, str]:
    """A mesh of devices that need not be there, and in words whose compiler it is for.

    Raises:
      ConfigError: the axis sizes do not make `size` devices.
    """
    shape = chip.topologies.get(size) if chip is not None else None
    if chip is not None and shape is not None and importlib.util.find_spec("libtpu") is not None:
        from jax.experimental import topologies

        # This may be no machine with a TPU; the slice is what the next line says.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        # Compiling touches no chip: it need not wait for a process that holds one.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        bounds = {"chips_per_host_bounds": [1, 1, 1]} if size == 1 else {}
        with contextlib.suppress(RuntimeError):  # a libtpu that does not know this chip
            slice_ = topologies.get_topology_desc(f"{chip.name}:{shape}", platform="tpu", **bounds)
            return build_mesh(config, slice_.devices), f"the TPU's compiler, for a slice of {shape}"
    return build_mesh(config, jax.devices()[:size]), f"the CPU's, for {size} simulated devices"


def make_plan(config: ExperimentConfig, mesh: Mesh, compiler: str) -> Plan:
    """Compiles the step of `config` for `mesh` and reads off what it needs.

    Raises:
      ConfigError: what training refuses, or the compiler says that it does not fit.
    """
    check_batch_size(config, mesh)
    model, rows, length = config.model, config.data.batch_size, config.model.context_length - 1
    segments = config.data.segments_per_row
    predefined = model.g_source in ("random", "external")
    g_lm: Any = jax.ShapeDtypeStruct(g_lm_shape(model), "float32") if predefined else None
    if config.task.kind is not None and model.task is None:
        config.task.fail("labels", "a plan reads no text, from which they would follow; name them")
    # The whole model, also where adapters alone are trained.
    model_config = dataclasses.replace(config, lora=LoraConfig())
    params = abstract_state(model_config, mesh, g_lm).params
    state, batch = abstract_state(config, mesh, g_lm), _batch(config, mesh, rows)
    if config.lora.rank:
        state = state.replace(base=without_head(model, params))
    simulated = mesh.devices.flat[0].platform == "cpu"
    with jax.set_mesh(mesh):
        step_fn: Any = jit_train_step(config, mesh, state)
        options = QUICK if simulated else None
        memory = _compiled(step_fn.lower(state, batch), options).memory_analysis()
        evaluation = _evaluation_bytes(config, mesh, params, g_lm, options)
        samples = config.training.sample_prompt and model.task is None
        sample = _sample_bytes(model, params, g_lm, options) if samples else 0
    cpu_mesh = mesh if simulated else build_mesh(config.mesh, jax.devices()[: mesh.size])
    with jax.set_mesh(cpu_mesh):
        microbatch = _batch(config, cpu_mesh, rows // config.training.grad_accumulation)
        passed = _forward(config, abstract_state(model_config, cpu_mesh, g_lm), microbatch)
        saved = _compiled(passed, QUICK).memory_analysis()
    return Plan(
        parameters=count_params(model),
        mesh={name: int(size) for name, size in mesh.shape.items()},
        compiler=compiler,
        state_bytes=_bytes(state),
        trained_bytes=_bytes(state.params),
        step_bytes=int(memory.temp_size_in_bytes),
        saved_bytes=int(saved.output_size_in_bytes),
        model_flops=training_flops(model, rows, length, segments),
        device_flops=_device_flops(config, dict(mesh.shape)),
        tokens=rows * length,
        evaluation_bytes=evaluation,
        sample_bytes=sample,
    )


def _evaluation_bytes(
    config: ExperimentConfig, mesh: Mesh, params: Any, g_lm: Any, options: dict[str, Any] | None
) -> int:
    """Temporaries of a microbatch of held-out rows."""
    shape = row_shape(config.data.packing, config.model.context_length)
    rows = blank_rows(config.data.batch_size, shape)
    evaluator: Any = Evaluator(config, mesh, ValidationRows(rows, rows[:1]), 1.0)
    if config.model.task is not None:
        evaluator = TaskEvaluator(config, mesh, HeldOutExamples(rows, rows[:1]))
    lowered = evaluator.lower(params, g_lm)
    return int(_compiled(lowered, options, "evaluation").memory_analysis().temp_size_in_bytes)


def _sample_bytes(
    model: ModelConfig, params: Any, g_lm: Any, options: dict[str, Any] | None
) -> int:
    """What decoding one text holds beside the state, and temporaries of its prompt."""
    unstack = jax.jit(functools.partial(unstack_layers, model))
    taken_apart = _compiled(unstack.lower(params), options, "sample")
    held = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(unstack, params),
        taken_apart.output_shardings,
    )
    tokens_BT = jax.ShapeDtypeStruct((1, model.context_length), "int32")
    length_B = jax.ShapeDtypeStruct((1,), "int32")
    run_prompt = jax.jit(functools.partial(prefill, model, capacity=model.context_length))
    prompt = _compiled(run_prompt.lower(held, tokens_BT, length_B, g_lm), options, "sample")
    weights, cache = taken_apart.memory_analysis(), prompt.memory_analysis()
    return int(
        weights.output_size_in_bytes
        + cache.output_size_in_bytes
        + max(weights.temp_size_in_bytes, cache.temp_size_in_bytes)
    )


def _batch(config: ExperimentConfig, mesh: Mesh, rows: int) -> jax.ShapeDtypeStruct:
    """Rows of tokens, as the step takes them, or those of one of its microbatches."""
    shape = (rows, *row_shape(config.data.packing, config.model.context_length))
    return jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh, shape))


def _forward(config: ExperimentConfig, state: Any, batch: Any) -> Any:
    """The forward pass, with what it saves for the backward pass as its result."""

    def residuals(params: Any, g_lm: Any, rows_BC: jax.Array) -> Any:
        return jax.vjp(lambda params: loss_fn(config, params, g_lm, rows_BC)[0], params)[1]

    return jax.jit(residuals).lower(state.params, state.g_lm, batch)


def _compiled(lowered: Any, options: dict[str, Any] | None, what: str = "step") -> Any:
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used (\S+) of (\S+) hbm", str(error)):
            raise ConfigError(
                f"Mesh: the {what} needs {found[1]} of the {found[2]} a chip has; {REMEDY}"
            ) from None
        raise


def _bytes(tree: Any) -> int:
    """Bytes of the part of a tree of abstract arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _device_flops(config: ExperimentConfig, mesh: dict[str, int]) -> float:
    """Operations of one device: parts whose axis does not divide by `tensor` are not split."""
    model, tensor = config.model, mesh["tensor"]
    widths = {"ffn": model.ffn_width, "head": model.vocab_size}
    length = model.context_length - 1
    segments = config.data.segments_per_row
    parts = forward_flops(model, length, segments)
    once = sum(parts.values())
    repeated = repeated_flops(model, 1, length, segments) / once  # in proportion
    split = sum(
        flops / (tensor if widths.get(name, model.num_heads) % tensor == 0 else 1)
        for name, flops in parts.items()
    )
    rows = config.data.batch_size / (mesh["data"] * mesh["fsdp"])
    return rows * split * (1 + BACKWARD + repeated)
