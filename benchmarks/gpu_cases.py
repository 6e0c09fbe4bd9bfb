"""What `benchmarks/gpu.py` times. A case says what to compile for it, so that many cases can be
compiled side by side, and then measures with that.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.decode import SOURCES, half_full
from benchmarks.gpu_report import Report, Row, timed, timed_together
from pldr_jax.config import ExperimentConfig
from pldr_jax.inference.decode import prefill
from pldr_jax.inference.slots import decode_slots, empty_slots
from pldr_jax.model.counts.flops import forward_flops, training_flops
from pldr_jax.model.decoder import unstack_layers
from pldr_jax.model.deductive import random_g_lm
from pldr_jax.partition import build_mesh
from pldr_jax.training.freeze.calibrate import without_plga
from pldr_jax.training.step import abstract_state, create_state, jit_train_step

GIB = 2**30
PRODUCTS = {"bfloat16": ("bfloat16", "default"), "float32 (TF32)": ("float32", "default")}
"""Name of a matrix product -> dtype and precision."""

Compiled = dict[str, Any]
"""Name -> a compiled program, and under "seconds" what compiling took."""

GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
FLAGS: dict[str, dict[str, Any]] = {
    "loops in graphs": {
        "xla_gpu_enable_command_buffer": GRAPHS,
        "xla_gpu_graph_min_graph_size": 1,
    },
    "small graphs": {"xla_gpu_graph_min_graph_size": 1},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
    "no triton gemm": {"xla_gpu_enable_triton_gemm": False},
}
"""Name -> options of XLA's compiler."""


@dataclasses.dataclass
class Case:
    """A row to be measured.

    Attributes:
      section: of the report.
      row: what the row begins with.
      lower: gives what is to be compiled, by name; traces, so one at a time.
      measure: the rest of the row, from what was compiled.
      options: of the compiler.
      prepare: makes what measuring needs, while programs are being compiled.
    """

    section: str
    row: Row
    lower: Callable[[], dict[str, Any]]
    measure: Callable[[Compiled], Row]
    options: dict[str, Any] | None = None
    prepare: Callable[[], Any] = lambda: None


def product_rate(report: Report, name: str, size: int) -> Row:
    """Operations a second of a large square product of random numbers."""
    dtype, precision = PRODUCTS[name]
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    rate = 2 * size**3 / timed_together(lambda: product(x, x))
    report.rates[name] = rate
    return {"TFLOP_s": rate / 1e12}


def copy_rate(report: Report, count: int) -> Row:
    """Bytes a second, read and written, of a copy of `count` numbers."""
    changed_sign = jax.jit(lambda x: -x, donate_argnums=0)
    arrays = [jnp.ones((count,), jnp.float32)]

    def call() -> Any:
        arrays[0] = changed_sign(arrays[0])
        return arrays[0]

    rate = report.rates["copy"] = 8 * count / timed_together(call)
    return {"GB_s": rate / 1e9}


def changed(config: ExperimentConfig, batch: int, **model: Any) -> ExperimentConfig:
    """The config with another batch, and other fields of `Model`."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(config.data, batch_size=batch),
    )


@functools.cache
def initial_state(config: ExperimentConfig) -> Any:
    """The state that a run begins with; `plain` configs share one."""
    return create_state(config, build_mesh(config.mesh))


def plain(config: ExperimentConfig) -> ExperimentConfig:
    """A config with the same parameters, the same for all ways to compute them."""
    fields: dict[str, Any] = {"dtype": "float32", "remat": "none", "remat_plga": True}
    fields |= {"unroll": False, "attention_kernel": "auto", "context_length": 16}
    fields |= {"plga_precision": "high"}
    return changed(config, 1, **fields)


class Step:
    """The training step of a config, on rows of its context length."""

    def __init__(self, report: Report, config: ExperimentConfig) -> None:
        self.report, self.config = report, config
        self.batch, self.inputs = config.data.batch_size, config.model.context_length - 1
        self.compiled: Any = None
        self.state: Any = None

    def lower(self) -> dict[str, Any]:
        """The step, from shapes alone."""
        mesh = build_mesh(self.config.mesh)
        with jax.set_mesh(mesh):
            state = abstract_state(self.config, mesh)
            rows = jax.ShapeDtypeStruct((self.batch, self.inputs + 1), jnp.int32)
            step: Any = jit_train_step(self.config, mesh, state)
            return {"step": step.lower(state, rows)}

    def prepare(self) -> None:
        """Makes the state that a run begins with, once for all steps of the same parameters."""
        initial_state(plain(self.config))

    def start(self, compiled: Any) -> None:
        """Takes a compiled step, and makes a state and rows for it."""
        self.compiled = compiled
        self.state = jax.tree.map(jnp.copy, initial_state(plain(self.config)))
        shape = (self.batch, self.inputs + 1)
        self.rows = jax.random.randint(
            jax.random.key(1), shape, 1, self.config.model.vocab_size, jnp.int32
        )

    def __call__(self) -> Any:
        """One step."""
        self.state, metrics = self.compiled(self.state, self.rows)
        return metrics

    def measure(self, compiled: Compiled) -> Row:
        """The row of the step."""
        self.start(compiled["step"])
        blocked, together = timed(self), timed_together(self, 5)
        model = self.config.model
        flops = training_flops(model, self.batch, self.inputs)
        row = {
            "ms": blocked * 1e3,
            "queued_ms": together * 1e3,
            "tokens_s": self.batch * self.inputs / together,
            "TFLOP_s": flops / together / 1e12,
            "loss": float(self()["train/loss"]),
            "compile_s": compiled["seconds"],
        }
        rate = self.report.rates.get("bfloat16" if model.dtype == "bfloat16" else "float32 (TF32)")
        if rate is not None:
            row["utilised"] = flops / together / rate
        analysis = self.compiled.memory_analysis()
        row["state_GiB"] = analysis.argument_size_in_bytes / GIB
        row["temp_GiB"] = analysis.temp_size_in_bytes / GIB
        return row

    def release(self) -> None:
        """Frees the state and the program."""
        self.state = self.compiled = self.rows = None


def params_of(config: ExperimentConfig) -> Any:
    """Parameters as a run begins with them, whatever the model computes with them."""
    params = initial_state(plain(changed(config, 1, g_source="learned"))).params
    return params if config.model.g_source == "learned" else without_plga(params)


@functools.cache
def unstacked(config: ExperimentConfig) -> Any:
    """What a decode step reads."""
    return jax.jit(functools.partial(unstack_layers, config.model))(params_of(config))


class Decoding:
    """Greedy decoding with caches half full, `steps` tokens of every slot in a call."""

    def __init__(
        self, report: Report, config: ExperimentConfig, variant: str, batch: int, steps: int
    ) -> None:
        self.report, self.batch, self.steps = report, batch, steps
        self.keep = "A" if variant == "KV" else "G_LM"
        self.config = changed(config, 1, g_source=SOURCES[variant], unroll=False)

    def _slots(self) -> Any:
        model = self.config.model
        g_lm = random_g_lm(model, 0) if model.g_source == "external" else None
        return half_full(
            empty_slots(model, self.batch, model.context_length, g_lm, self.keep, model.dtype)
        )

    def lower(self) -> dict[str, Any]:
        """The call, and what makes its slots."""
        model = self.config.model
        decode: Any = jax.jit(
            functools.partial(decode_slots, model, steps=self.steps, pieces=model.vocab_size),
            donate_argnames="slots",
        )
        slots = jax.eval_shape(self._slots)
        return {
            "slots": jax.jit(self._slots).lower(),
            "decode": decode.lower(unstacked(self.config), slots=slots),
        }

    def measure(self, compiled: Compiled) -> Row:
        """The row of a decode step."""
        params, slots = unstacked(self.config), compiled["slots"]()
        size, times = slots.cache.nbytes, []
        for _ in range(12):
            slots = jax.block_until_ready(compiled["slots"]())
            start = time.perf_counter()
            jax.block_until_ready(compiled["decode"](params, slots=slots))
            times.append((time.perf_counter() - start) / self.steps)
        seconds = statistics.median(times[2:])
        used = {name: tree for name, tree in params.items() if name != "embedding"}
        read = size + sum(leaf.nbytes for leaf in jax.tree.leaves(used))
        for layer in params["layers"] if self.keep == "G_LM" else ():
            read -= sum(leaf.nbytes for leaf in jax.tree.leaves(layer["attention"].get("plga")))
        row = {
            "step_ms": seconds * 1e3,
            "tokens_s": self.batch / seconds,
            "read_MB": read / 1e6,
            "compile_s": compiled["seconds"],
        }
        if "copy" in self.report.rates:
            row["of_copy_rate"] = read / seconds / self.report.rates["copy"]
        return row


class Prefill:
    """`batch` prompts of `tokens` in one call: logits of the last token, keys, values and G_LM."""

    def __init__(self, report: Report, config: ExperimentConfig, batch: int, tokens: int) -> None:
        self.report, self.shape = report, (batch, tokens)
        self.config = changed(config, 1, context_length=tokens, unroll=False)

    def lower(self) -> dict[str, Any]:
        """The call."""
        batch, tokens = self.shape
        call: Any = jax.jit(lambda *args: prefill(self.config.model, *args, None, tokens))
        rows, lengths = (jax.ShapeDtypeStruct(x, jnp.int32) for x in (self.shape, (batch,)))
        return {"prefill": call.lower(params_of(self.config), rows, lengths)}

    def measure(self, compiled: Compiled) -> Row:
        """Its row."""
        (batch, tokens), params = self.shape, params_of(self.config)
        rows, lengths = jnp.ones(self.shape, jnp.int32), jnp.full((batch,), tokens, jnp.int32)
        seconds = timed(lambda: compiled["prefill"](params, rows, lengths))
        flops = forward_flops(self.config.model, tokens)
        flops["head"] /= tokens
        row = {"ms": seconds * 1e3, "tokens_s": batch * tokens / seconds}
        bfloat16 = self.config.model.dtype == "bfloat16"
        rate = self.report.rates.get("bfloat16" if bfloat16 else "float32 (TF32)")
        if rate is not None:
            row["utilised"] = batch * sum(flops.values()) / seconds / rate
        return row
