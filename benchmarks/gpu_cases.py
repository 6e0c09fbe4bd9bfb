"""What `benchmarks/gpu.py` times: rates of the device, the training step, decoding and prefill."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import decode
from benchmarks.gpu_report import Report, Row, timed, timed_together
from pldr_jax.config import ExperimentConfig, ModelConfig
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model.cache import Cache
from pldr_jax.model.decoder import Params, init_params
from pldr_jax.model.flops import forward_flops, training_flops
from pldr_jax.partition import build_mesh
from pldr_jax.training.step import create_state, jit_train_step, loss_fn

GIB = 2**30
PRODUCTS = {
    "bfloat16": ("bfloat16", "default"),
    "float32 (TF32)": ("float32", "default"),
    "float32 (highest)": ("float32", "highest"),
}
"""Name of a matrix product -> dtype and precision."""


def product_rate(report: Report, name: str, size: int) -> Row:
    """Operations a second of a large square product of random numbers."""
    dtype, precision = PRODUCTS[name]
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    y = jax.random.normal(jax.random.key(1), (size, size), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    rate = 2 * size**3 / timed_together(lambda: product(x, y))
    report.rates[name] = rate
    return {"TFLOP_s": rate / 1e12}


def bandwidth(report: Report, name: str, count: int) -> Row:
    """Bytes a second of a copy, read and written, or of a sum, read, of `count` numbers."""
    x = jnp.ones((count,), jnp.float32)
    if name == "copy":
        changed = jax.jit(lambda x: -x, donate_argnums=0)
        arrays = [x]

        def call() -> Any:
            arrays[0] = changed(arrays[0])
            return arrays[0]

        rate = 2 * x.nbytes / timed_together(call)
    else:
        total = jax.jit(jnp.sum)
        rate = x.nbytes / timed_together(lambda: total(x))
    report.rates[name] = rate
    return {"GB_s": rate / 1e9}


def changed(config: ExperimentConfig, batch: int, **model: Any) -> ExperimentConfig:
    """The config with another batch, and other fields of `Model`."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(config.data, batch_size=batch),
    )


class Step:
    """The training step of a config on rows of `inputs` tokens and one more, compiled, and its
    state.
    """

    def __init__(self, config: ExperimentConfig, inputs: int, options: Any = None) -> None:
        self.config, self.inputs = config, inputs
        shape = (config.data.batch_size, inputs + 1)
        self.rows = jax.random.randint(jax.random.key(1), shape, 1, config.model.vocab_size)
        mesh = build_mesh(config.mesh)
        with jax.set_mesh(mesh):
            self.state = create_state(config, mesh)
            step: Any = jit_train_step(config, mesh, self.state)
            start = time.perf_counter()
            self.compiled = step.lower(self.state, self.rows).compile(options)
            self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        """One step."""
        self.state, metrics = self.compiled(self.state, self.rows)
        return metrics

    def measured(self, rates: dict[str, float]) -> Row:
        """Its row."""
        model, batch = self.config.model, self.config.data.batch_size
        blocked, together = timed(self), timed_together(self)
        loss = float(self()["train/loss"])
        flops = training_flops(model, batch, self.inputs)
        row = {
            "ms": blocked * 1e3,
            "queued_ms": together * 1e3,
            "tokens_s": batch * self.inputs / together,
            "TFLOP_s": flops / together / 1e12,
            "compile_s": self.compile_seconds,
            "loss": loss,
        }
        rate = rates.get("bfloat16" if model.dtype == "bfloat16" else "float32 (TF32)")
        if rate is not None:
            row["utilised"] = flops / together / rate
        return row | memory(self.compiled)


def memory(compiled: Any) -> Row:
    """GiB of a compiled step by its own account, and the most the device ever held."""
    analysis = compiled.memory_analysis()
    row = {
        "state_GiB": analysis.argument_size_in_bytes / GIB,
        "temp_GiB": analysis.temp_size_in_bytes / GIB,
    }
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        row["peak_so_far_GiB"] = stats["peak_bytes_in_use"] / GIB
    return row


def parts(config: ExperimentConfig, inputs: int) -> Row:
    """The loss alone, and the loss and its gradient, each compiled by itself."""
    step = Step(config, inputs)
    params, rows = step.state.params, step.rows
    loss = jax.jit(lambda params, rows: loss_fn(config, params, None, rows)[0])
    grad = jax.jit(jax.grad(lambda params, rows: loss_fn(config, params, None, rows)[0]))
    return {
        "forward_ms": timed_together(lambda: loss(params, rows)) * 1e3,
        "and_backward_ms": timed_together(lambda: grad(params, rows)) * 1e3,
        "step_ms": timed_together(step) * 1e3,
    }


compilations = functools.cache(decode.Compilations)


@functools.cache
def random_params(config: ModelConfig) -> Params:
    """Parameters as a run begins with them."""
    return jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))


def decoding(
    report: Report, model: ModelConfig, variant: str, batch: int, context: int, steps: int
) -> Row:
    """Greedy decoding with caches half full, `steps` tokens of every row in a call, and one by
    `decode_step` alone.
    """
    config = dataclasses.replace(model, context_length=context, unroll=False)
    shape = dataclasses.replace(config, dtype="float32", context_length=2)
    made = decode.Variant(variant, config, random_params(shape), steps=steps)
    start = time.perf_counter()
    made.make_slots(batch, context, compilations())
    compiled = time.perf_counter() - start
    rounds = [made.decode() for _ in range(10)]
    seconds = sorted(rounds)[len(rounds) // 2]
    read = made.bytes_read()
    assert made.slots is not None
    row = {
        "step_ms": seconds * 1e3,
        "tokens_s": batch / seconds,
        "read_MB": read / 1e6,
        "compile_s": compiled,
    }
    if "copy" in report.rates:
        row["of_copy_rate"] = read / seconds / report.rates["copy"]
    single = single_steps(config, made.unstacked, made.slots.cache)
    row["single_ms"], row["single_queued_ms"] = timed(single) * 1e3, timed_together(single) * 1e3
    return row


def single_steps(config: ModelConfig, unstacked: Params, cache: Cache) -> Callable[[], Any]:
    """A call that runs one decode step, always at the same position; the cache is its own."""

    def step(unstacked: Params, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits_BV, grown = decode_step(config, unstacked, tokens_B, cache)
        return logits_BV, grown.replace(length_B=cache.length_B)

    jitted = jax.jit(step, donate_argnums=2)
    tokens_B, caches = jnp.ones_like(cache.length_B), [cache]

    def call() -> jax.Array:
        logits_BV, caches[0] = jitted(unstacked, tokens_B, caches[0])
        return logits_BV

    return call


def prefilling(report: Report, model: ModelConfig, batch: int, tokens: int) -> Row:
    """`batch` prompts of `tokens` in one call: logits of the last token, keys, values and G_LM."""
    config = dataclasses.replace(model, context_length=tokens, unroll=False)
    params = random_params(dataclasses.replace(config, dtype="float32", context_length=2))
    call: Callable[..., Any] = jax.jit(
        functools.partial(prefill, config, g_lm_LBNHJ=None, slots=tokens)
    )
    rows = jax.random.randint(jax.random.key(1), (batch, tokens), 1, config.vocab_size)
    lengths = jnp.full((batch,), tokens, jnp.int32)
    seconds = timed(lambda: call(params, rows, lengths))
    flops = forward_flops(config, tokens)
    flops["head"] /= tokens
    row = {"ms": seconds * 1e3, "tokens_s": batch * tokens / seconds}
    rate = report.rates.get("bfloat16" if config.dtype == "bfloat16" else "float32 (TF32)")
    if rate is not None:
        row["utilised"] = batch * sum(flops.values()) / seconds / rate
    return row
