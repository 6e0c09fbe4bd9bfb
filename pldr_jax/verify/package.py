"""The package against numbers of the authors' implementation that it carries: two small cases."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from pldr_jax.api import LanguageModel
from pldr_jax.config import ModelConfig
from pldr_jax.interop.transformers import open_transformers
from pldr_jax.model.decoder import Params, forward, init_params
from pldr_jax.training.losses import PAD_ID, dag_losses, token_loss
from pldr_jax.verify.findings import Finding, difference
from pldr_jax.verify.laws import LAWS, law_config, trajectory

GOLDENS = Path(__file__).parent / "goldens"
LIMITS = {"float32": 2e-5, "bfloat16": 6e-2}
"""Share of the largest magnitude that the outputs of a pass may be off by, of float32 products in
full and of bfloat16 ones."""
LOSS_LIMITS = {"float32": 2e-5, "bfloat16": 2e-2}
DAG_LIMIT, LAW_LIMIT, RATE_LIMIT = 1e-4, 2e-3, 1e-9
"""Of a law: float32 repeats its last losses to some 3e-4 of themselves where products are summed in
another order."""
MODES = {"kv0_g0": "none", "kv0_g1": "G_LM", "kv1_g0": "A", "kv1_g1": "G_LM"}


class PackageCase:
    """The model of the goldens, with what is known of it."""

    def __init__(self) -> None:
        folder = GOLDENS / "tiny"
        opened = open_transformers(folder)
        self.params: Params = opened.params
        self.config: ModelConfig = dataclasses.replace(
            opened.config, unroll=False, plga_precision="highest"
        )
        self.values = json.loads((folder / "golden.json").read_text())
        self.tensors = load_file(folder / "golden.safetensors")


def package_findings() -> Iterator[Finding]:
    """Every check, one after the other; float32 products are computed in full."""
    case = PackageCase()
    with jax.default_matmul_precision("highest"):
        for dtype in LIMITS:
            yield from _outputs(case, dtype)
        yield from _predefined(case)
        yield from _caches(case)
        yield from _initialisers()
        yield from _laws(case)


def _outputs(case: PackageCase, dtype: Any) -> Iterator[Finding]:
    """A forward pass, and the losses of its logits."""
    config, rows = dataclasses.replace(case.config, dtype=dtype), case.tensors["tokens"]
    rows = rows.astype(np.int32)
    outputs = jax.jit(functools.partial(forward, config))(case.params, rows[:, :-1])
    deductive = dict(outputs.deductive.items())
    compared = {"logits": outputs.logits, "hidden": outputs.hidden, **deductive}
    compared |= {"keys": outputs.layers.k_BTNH, "values": outputs.layers.v_BTNH}
    # In bfloat16 an entry of A_LM near 0 decides what its power is.
    names = compared if dtype == "float32" else ("logits", "A", "keys", "values")
    for name in names:
        off = difference(compared[name], case.tensors[name])
        yield Finding(f"equations, {dtype}", name, off, LIMITS[dtype])
    targets = jnp.asarray(rows[:, 1:])
    padded = targets.at[0, -5:].set(PAD_ID)
    for key, each in (("loss", targets), ("loss_with_5_padded_targets_in_row_0", padded)):
        found, expected = float(token_loss(outputs.logits, each).loss), case.values[key]
        name = key.replace("_", " ")
        yield Finding(f"losses, {dtype}", name, abs(found / expected - 1), LOSS_LIMITS[dtype])
    if dtype != "float32":
        return
    dag = dag_losses(outputs.deductive)
    for (name, value), expected in zip(dag.items(), case.values["dag_loss_float64"], strict=True):
        off = abs(float(value) / expected - 1)
        yield Finding(f"losses, {dtype}", f"DAG loss of {name}", off, DAG_LIMIT)


def _predefined(case: PackageCase) -> Iterator[Finding]:
    run = jax.jit(functools.partial(forward, case.config))
    for source in ("identity", "random"):
        g_lm = case.tensors[f"predefined/{source}/G_LM"]
        outputs = run(case.params, case.tensors["tokens"].astype(np.int32)[:, :-1], g_lm)
        off = difference(outputs.logits, case.tensors[f"predefined/{source}/logits"])
        yield Finding("predefined G_LM", f"logits, {source}", off, LIMITS["float32"])


def _caches(case: PackageCase) -> Iterator[Finding]:
    """Greedy tokens that differ, of 12."""
    model, prompt = LanguageModel(case.config, case.params), case.tensors["prompt"][0].tolist()
    for mode, kept in MODES.items():
        (text,) = model.generate([prompt], 12, kv_cache=mode.startswith("kv1"), g_cache=kept)
        expected = case.tensors[f"greedy/{mode}/tokens"][0].tolist()
        wrong = sum(a != b for a, b in zip(prompt + text.tokens, expected, strict=True))
        yield Finding("caches", f"greedy tokens, {mode.replace('_', ' ')}", wrong, 0)


def _initialisers() -> Iterator[Finding]:
    """The mean square of W, P and a, in units of what is stated, against 5 standard errors."""
    H, N = 64, 4
    stated = {
        "legacy": 2 / (H * H + N * H),
        "native_port": 2 / (H * H + N * H),
        "normalized": 2 / (H * (H + 2)),
    }
    for init, variance in stated.items():
        model = ModelConfig(
            init=init,  # type: ignore[arg-type]
            vocab_size=8,
            num_layers=1,
            num_heads=N,
            head_dim=H,
            num_residual_layers=0,
            context_length=8,
        )
        params = nn.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))
        plga = params["layers"]["attention"]["plga"]
        drawn = np.stack([np.asarray(plga[name], np.float64) for name in ("W", "P", "a")])
        kurtosis = 3.0 if init == "legacy" else 1.8
        limit = 5 * math.sqrt((kurtosis - 1) / drawn.size)
        off = abs(float(np.square(drawn).mean()) / variance - 1)
        yield Finding("initial weights", f"variance, {init}", off, limit)


def _laws(case: PackageCase) -> Iterator[Finding]:
    folder = GOLDENS / "laws"
    values = json.loads((folder / "golden.json").read_text())
    batches = load_file(folder / "golden.safetensors")["batches"]
    for name in LAWS:
        config = law_config(name, case.config, values)
        with _quick_compilation():
            losses, rates, _ = trajectory(config, case.params, batches)
        off = np.abs(np.asarray(losses) / values[f"{name}/losses"] - 1).max()
        yield Finding("training laws", f"{name}, losses of 12 steps", float(off), LAW_LIMIT)
        off = np.abs(np.asarray(rates) - values[f"{name}/rates"]).max()
        yield Finding("training laws", f"{name}, learning rates", float(off), RATE_LIMIT)


@contextlib.contextmanager
def _quick_compilation() -> Iterator[None]:
    """A step of training compiles in half the time without most of the compiler's optimisations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
