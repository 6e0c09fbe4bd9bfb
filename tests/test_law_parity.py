"""The training laws of the author's later work, as his scripts trained `tiny` (the goldens `laws`).

Float32 decides a trajectory only so far: the gradient of A_LM ** P is steep where A_LM is near
1e-8 (test_parity.py).
"""

import json

import numpy as np
import pytest
from conftest import GOLDENS, load_golden
from safetensors.numpy import load_file

from pldr_jax.interop.names import to_tensors
from pldr_jax.verify.laws import law_config, trajectory

NAMES = (
    "decoder.dec_layers.0.mha1.plgatt_layer.Wlst",
    "decoder.dec_layers.0.mha1.wq.weight",
    "final_layer.weight",
)


@pytest.mark.parametrize("name", ["onepass", "hold"])
def test_a_law_trains_as_the_authors_scripts_do(name: str) -> None:
    """Losses to 2e-4 of themselves, rates to 1e-9, weights to 1e-4 of the largest magnitude."""
    values = json.loads((GOLDENS / "laws" / "golden.json").read_text())
    tensors = load_file(GOLDENS / "laws" / "golden.safetensors")
    golden = load_golden("tiny")
    config = law_config(name, golden.config, values)
    losses, rates, params = trajectory(config, golden.params, tensors["batches"])
    assert losses == pytest.approx(values[f"{name}/losses"], rel=2e-4)
    np.testing.assert_allclose(rates, values[f"{name}/rates"], atol=1e-9, rtol=0)
    end = to_tensors(config.model, params)
    for tensor in NAMES:
        expected = tensors[f"{name}/end/{tensor}"]
        assert np.abs(end[tensor] - expected).max() < 1e-4 * np.abs(expected).max(), tensor
