"""How far a device's numbers are from a CPU's, of the same random parameters."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_cases import random_params
from benchmarks.gpu_report import Row
from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Params, forward

Arrays = dict[str, Any]

VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "float32, all highest": ({"dtype": "float32", "plga_precision": "highest"}, "highest"),
    "float32, defaults": ({"dtype": "float32"}, None),
    "bfloat16, auto attention": ({"dtype": "bfloat16"}, None),
    "bfloat16, xla attention": ({"dtype": "bfloat16", "attention_kernel": "xla"}, None),
    "float32, plga highest": ({"dtype": "float32", "plga_precision": "highest"}, None),
}
"""Name -> fields of `Model`, and JAX's own matrix product precision."""


@functools.cache
def moved_params(config: ModelConfig) -> Params:
    """Initial parameters, each moved by a tenth of a normal number times its size, so that none is
    zero or one.
    """
    shape = dataclasses.replace(config, dtype="float32", plga_precision="high", context_length=2)
    rng = np.random.default_rng(0)

    def moved(x: jax.Array) -> np.ndarray:
        values = np.asarray(x)
        noise = rng.standard_normal(values.shape, np.float32)
        return values + 0.1 * (values.std() or 0.1) * noise

    return jax.tree.map(moved, random_params(shape))


def outputs(config: ModelConfig, tokens: int, device: Any, precision: str | None) -> Arrays:
    """Logits, deductive outputs and the gradient of the mean logarithm of the likelihood."""
    params = jax.device_put(moved_params(config), device)
    rows = np.random.default_rng(1).integers(1, config.vocab_size, (2, tokens), np.int32)
    inputs = jax.device_put(rows, device)

    def loss(params: Params, rows: jax.Array) -> tuple[jax.Array, Arrays]:
        out = forward(config, params, rows)
        named = {"logits": out.logits}
        for field in ("A", "A_LM", "A_P", "G_LM"):
            named[field] = getattr(out.deductive, field)
        logprobs = jax.nn.log_softmax(out.logits[:, :-1])
        return -jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=-1).mean(), named

    scope = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
    with scope, jax.default_device(device):
        grads, named = jax.jit(jax.grad(loss, has_aux=True))(params, inputs)
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])
    return jax.tree.map(np.asarray, named | {"gradient": flat})


_REFERENCES: dict[Any, Arrays] = {}


def compare(config: ModelConfig, tokens: int, variant: str) -> Row:
    """Differences of a variant from float32 on the CPU: of each output the largest, relative to the
    output's largest entry; of the gradient the norm, relative to its norm.
    """
    cpu, key = jax.devices("cpu")[0], (config, tokens)
    if key not in _REFERENCES:
        exact = dataclasses.replace(config, dtype="float32", plga_precision="highest")
        _REFERENCES[key] = outputs(exact, tokens, cpu, "highest")
    fields, precision = VARIANTS[variant]
    made = outputs(dataclasses.replace(config, **fields), tokens, jax.devices()[0], precision)
    row = differences(made, _REFERENCES[key])
    if variant.startswith("bfloat16"):
        other = _REFERENCES.setdefault((*key, "bfloat16"), made)
        if other is not made:
            row["logits_to_other_kernel"] = differences(made, other)["logits"]
            row["gradient_to_other_kernel"] = differences(made, other)["gradient"]
    return row


def differences(made: Arrays, reference: Arrays) -> Row:
    """As `compare` says."""
    row = {}
    for name, expected in reference.items():
        expected, apart = np.float64(expected), np.float64(made[name]) - np.float64(expected)
        size = np.linalg.norm if name == "gradient" else lambda x: np.max(np.abs(x))
        row[name] = float(size(apart) / size(expected))
    return row
