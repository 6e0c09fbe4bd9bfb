"""The training laws of the author's later work, as his scripts trained `tiny` (tests/goldens/laws).

The trajectory of `hold` is near the edge of what float32 can repeat: the last place of the initial
parameters moves its losses by up to 3e-4 of themselves, so that it is compared as users compile it.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, load_golden
from safetensors.numpy import load_file

from pldr_jax.config import ExperimentConfig, LossConfig, OptimizerConfig, TrainingConfig
from pldr_jax.interop.names import to_tensors
from pldr_jax.training.optimizer import initial_state
from pldr_jax.training.step import TrainState, train_step

VALUES = json.loads((GOLDENS / "laws" / "golden.json").read_text())
TENSORS = load_file(GOLDENS / "laws" / "golden.safetensors")
NAMES = ("decoder.dec_layers.0.mha1.plgatt_layer.Wlst", "decoder.dec_layers.0.mha1.wq.weight")
NAMES = (*NAMES, "final_layer.weight")


def law(name: str) -> ExperimentConfig:
    """The two laws of the goldens, on the weights of `tiny`."""
    hold = VALUES["hold"]
    optimizer, loss = {
        "onepass": (
            OptimizerConfig(
                learning_rate=3e-4,
                generator_learning_rate=3e-4 * VALUES["generator_gain"],
                schedule="constant",
                warmup_steps=0,
                eps=1e-8,
                weight_decay=0.01,
                clip="norm",
            ),
            LossConfig(targets="last"),
        ),
        "hold": (
            OptimizerConfig(
                learning_rate=hold["rate"],
                schedule="hold",
                warmup_steps=hold["warmup"],
                hold_until=hold["hold_until"],
                decay_steps=hold["total"],
                end_lr_fraction=hold["alpha"],
                eps=1e-5,
                weight_decay=0.1,
            ),
            LossConfig(),
        ),
    }[name]
    return ExperimentConfig(
        model=load_golden("tiny").config,
        loss=loss,
        optimizer=optimizer,
        training=TrainingConfig(steps=12),
    )


@pytest.mark.parametrize("name", ["onepass", "hold"])
def test_a_law_trains_as_the_authors_scripts_do(name: str) -> None:
    """Losses to 2e-4 of themselves, rates to 1e-9, weights to 1e-4 of the largest magnitude."""
    config, params = law(name), load_golden("tiny").params
    state = TrainState(jnp.int32(0), params, initial_state(config, params), None)
    losses, rates = [], []
    step = jax.jit(functools.partial(train_step, config))
    for rows in TENSORS["batches"].astype(np.int32):
        state, metrics = step(state, rows)
        losses.append(float(metrics["train/loss"]))
        groups = ("train/generator_learning_rate", "train/learning_rate")
        rates.append([float(metrics[group]) for group in groups if group in metrics])
    assert losses == pytest.approx(VALUES[f"{name}/losses"], rel=2e-4)
    np.testing.assert_allclose(rates, VALUES[f"{name}/rates"], atol=1e-9, rtol=0)
    end = to_tensors(config.model, state.params)
    for tensor in NAMES:
        expected = TENSORS[f"{name}/end/{tensor}"]
        assert np.abs(end[tensor] - expected).max() < 1e-4 * np.abs(expected).max(), tensor
