"""How far a device's numbers are from a CPU's, of the same random parameters."""

import contextlib
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import numpy as np

from benchmarks.gpu_cases import Compiled, changed, params_of
from benchmarks.gpu_report import Row
from pldr_jax.config import ExperimentConfig
from pldr_jax.model.decoder import Params, forward
from pldr_jax.training.losses import token_loss

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
def moved_params(config: ExperimentConfig) -> Params:
    """Initial parameters, each moved by a tenth of a normal number times its size, so that none is
    zero or one.
    """
    rng = np.random.default_rng(0)

    def moved(x: jax.Array) -> np.ndarray:
        values = np.asarray(x)
        noise = rng.standard_normal(values.shape, np.float32)
        return values + 0.1 * (values.std() or 0.1) * noise

    return jax.tree.map(moved, params_of(config))


class Numerics:
    """Logits, deductive outputs and the gradient of a loss of one row of `tokens`, here and, once
    for all variants, in float32 on the CPU.
    """

    _references: ClassVar[dict[Any, Arrays]] = {}

    def __init__(self, config: ExperimentConfig, tokens: int, variant: str) -> None:
        self.variant, self.tokens = variant, tokens
        self.base = changed(config, 1, context_length=tokens, unroll=False)

    def lower(self) -> dict[str, Any]:
        """The program of the variant, and that of the CPU where it is the first."""
        fields, precision = VARIANTS[self.variant]
        lowered = {"here": self._lowered(fields, precision, jax.devices()[0])}
        if self.variant == next(iter(VARIANTS)):
            exact, precision = VARIANTS[self.variant]
            lowered["cpu"] = self._lowered(exact, precision, jax.devices("cpu")[0])
        return lowered

    def _lowered(self, fields: dict[str, Any], precision: str | None, device: Any) -> Any:
        model = dataclasses.replace(self.base.model, **fields)

        def loss(params: Params, rows: jax.Array) -> tuple[jax.Array, Arrays]:
            out = forward(model, params, rows)
            named = {"logits": out.logits}
            for field in ("A", "A_LM", "A_P", "G_LM"):
                named[field] = getattr(out.deductive, field)
            return token_loss(out.logits[:, :-1], rows[:, 1:]).loss, named

        params, rows = self._inputs(device)
        scope = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        with scope, jax.default_device(device):
            return jax.jit(jax.grad(loss, has_aux=True)).lower(params, rows)

    def _inputs(self, device: Any) -> tuple[Params, jax.Array]:
        rows = np.random.default_rng(1).integers(1, self.base.model.vocab_size, (1, self.tokens))
        return jax.device_put((moved_params(self.base), rows.astype(np.int32)), device)

    def measure(self, compiled: Compiled) -> Row:
        """Of each output the largest difference, relative to the output's largest entry; of the
        gradient the norm of the difference, relative to its norm.
        """
        if "cpu" in compiled:
            self._references["cpu"] = self._outputs(compiled["cpu"], jax.devices("cpu")[0])
        made = self._outputs(compiled["here"], jax.devices()[0])
        return differences(made, self._references["cpu"])

    def _outputs(self, program: Any, device: Any) -> Arrays:
        grads, named = program(*self._inputs(device))
        flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(grads)])
        return {name: np.asarray(x) for name, x in named.items()} | {"gradient": flat}


def differences(made: Arrays, reference: Arrays) -> Row:
    """As `Numerics.measure` says."""
    row = {}
    for name, expected in reference.items():
        expected, apart = np.float64(expected), np.float64(made[name]) - np.float64(expected)
        size = np.linalg.norm if name == "gradient" else lambda x: np.max(np.abs(x))
        row[name] = float(size(apart) / size(expected))
    return row
