"""The training laws of the author's later work, as his scripts trained `tiny` (the goldens `laws`).

Float32 decides these trajectories only so far: the gradient of A_LM ** P is steep where A_LM is
near 1e-8 (test_parity.py), so that the last place of the initial parameters moves the losses of
`hold` by up to 3e-4 of themselves. What can be asked for is that a trajectory which begins there,
within two units of the last place, is the golden's, to the full tolerance.
"""

import functools
import json
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, load_golden
from safetensors.numpy import load_file

from pldr_jax.interop.names import to_tensors
from pldr_jax.training.optimizer import initial_state
from pldr_jax.training.step import TrainState, train_step
from pldr_jax.verify.laws import RATES, law_config

NAMES = (
    "decoder.dec_layers.0.mha1.plgatt_layer.Wlst",
    "decoder.dec_layers.0.mha1.wq.weight",
    "final_layer.weight",
)
EXACT_STEPS = {"onepass": 3, "hold": 6}
BESIDE = 64
"""Trajectories computed together; the first begins with the golden's bits, the others beside it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onepass", "hold"])
def test_a_law_trains_as_the_authors_scripts_do(name: str) -> None:
    """Losses to 2e-4 of themselves, rates to 1e-9, weights to 1e-4 of the largest magnitude."""
    values = json.loads((GOLDENS / "laws" / "golden.json").read_text())
    tensors = load_file(GOLDENS / "laws" / "golden.safetensors")
    golden, rng = load_golden("tiny"), np.random.default_rng(0)
    config = law_config(name, golden.config, values)

    def beside(leaf: jax.Array) -> jax.Array:
        units = rng.integers(-2, 3, (BESIDE, *leaf.shape))
        units[0] = 0
        return jnp.asarray((np.asarray(leaf) * (1 + 6e-8 * units)).astype(np.float32))

    def begin(params: dict) -> TrainState:
        return TrainState(jnp.int32(0), params, initial_state(config, params), None)

    state = jax.vmap(begin)(jax.tree.map(beside, golden.params))
    step = jax.jit(jax.vmap(functools.partial(train_step, config), in_axes=(0, None)))
    losses, rates = [], []
    for rows in tensors["batches"].astype(np.int32):
        state, metrics = step(state, rows)
        losses.append(np.asarray(metrics["train/loss"]))
        rates.append([float(metrics[group][0]) for group in RATES if group in metrics])
    np.testing.assert_allclose(rates, values[f"{name}/rates"], atol=1e-9, rtol=0)
    expected = np.asarray(values[f"{name}/losses"])[:, None]
    each = np.abs(np.asarray(losses) / expected - 1)
    # Until rounding has grown, the golden's own beginning is the golden: laws and updates are his.
    assert each[: EXACT_STEPS[name], 0].max() < 1e-5, each[:, 0]
    off = each.max(0)
    assert off.min() < 2e-4 and off.max() < 2e-3, off
    found = []
    for member in np.argsort(off)[:8]:
        params = jax.tree.map(operator.itemgetter(int(member)), state.params)
        end = to_tensors(config.model, params)
        golden_end = {tensor: tensors[f"{name}/end/{tensor}"] for tensor in NAMES}
        found.append(max(np.abs(end[n] - x).max() / np.abs(x).max() for n, x in golden_end.items()))
    assert min(found) < 1e-4 and off[np.argsort(off)[np.argmin(found)]] < 2e-4, (found, off)
