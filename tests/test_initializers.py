"""The distribution of every initial parameter of a mid-size model."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import init_params
from pldr_jax.model.plga import per_head_glorot_normal

CONFIG = ModelConfig(
    vocab_size=256, num_layers=2, num_heads=4, head_dim=16, num_residual_layers=3, context_length=16
)
D, F, H, M, N, V = 64, 170, 16, 42, 4, 256
FANS = {
    "head": (D, V),
    "ffn/w1": (D, F), "ffn/w2": (D, F), "ffn/w3": (F, D),
    "attention/q": (D, D), "attention/k": (D, D), "attention/v": (D, D), "attention/out": (D, D),
    **{f"unit_{u}/{w}": (H, M) for u in (0, 1) for w in ("w1", "w2")},
    **{f"unit_{u}/w3": (M, H) for u in (0, 1)},
}  # fmt: skip
SIGMAS = 5


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    params = jax.jit(lambda key: nn.unbox(init_params(CONFIG, key)))(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def kind(name: str) -> str:
    """The initialiser a parameter must have."""
    last = name.rsplit("/", 1)[-1]
    if name == "embedding/table":
        return "unit normal"
    return {"W": "glorot normal", "P": "glorot normal", "a": "glorot normal"}.get(last, last)


def test_every_parameter_has_a_rule(parameters: dict[str, np.ndarray]) -> None:
    kinds = {kind(name) for name in parameters}
    assert kinds == {"unit normal", "glorot normal", "kernel", "bias", "scale", "b_W", "b_a"}
    kernels = {name for name in parameters if kind(name) == "kernel"}
    found = {fan for fan in FANS for name in kernels if name.endswith(f"{fan}/kernel")}
    assert found == set(FANS) and len(kernels) == len(FANS)


def test_biases_are_zero_and_scales_one(parameters: dict[str, np.ndarray]) -> None:
    for name, value in parameters.items():
        if kind(name) in ("bias", "b_W", "b_a"):
            assert not value.any(), name
        if kind(name) == "scale":
            assert (value == 1).all(), name


def test_kernels_are_glorot_uniform(parameters: dict[str, np.ndarray]) -> None:
    for name, value in parameters.items():
        if kind(name) != "kernel":
            continue
        (fans,) = (FANS[fan] for fan in FANS if name.endswith(f"{fan}/kernel"))
        limit = math.sqrt(6 / sum(fans))
        # The estimate of a uniform standard deviation has relative error sqrt(0.2 / n).
        sigma = math.sqrt(0.2 / value.size)
        assert value.std() * math.sqrt(3) / limit == pytest.approx(1, abs=SIGMAS * sigma), name
        assert abs(value.mean()) < SIGMAS * limit / math.sqrt(3 * value.size), name
        assert limit * (1 - 30 / value.size) < np.abs(value).max() <= limit * (1 + 1e-6), name


def assert_normal(value: np.ndarray, std: float, name: str) -> None:
    """Mean, standard deviation, share beyond two of them, kurtosis: the last two fail truncated."""
    n = value.size
    assert value.std() / std == pytest.approx(1, abs=SIGMAS * math.sqrt(0.5 / n)), name
    assert abs(value.mean()) < SIGMAS * std / math.sqrt(n), name
    beyond = (np.abs(value) > 2 * std).mean()
    assert beyond == pytest.approx(0.0455, abs=SIGMAS * math.sqrt(0.0455 * 0.9545 / n)), name
    kurtosis = ((value / value.std()) ** 4).mean()
    assert kurtosis == pytest.approx(3, abs=SIGMAS * math.sqrt(24 / n)), name


def test_embedding_is_unit_normal(parameters: dict[str, np.ndarray]) -> None:
    assert_normal(parameters["embedding/table"], 1.0, "embedding")


def test_power_law_weights_are_glorot_normal_with_the_authors_fans(
    parameters: dict[str, np.ndarray],
) -> None:
    std = math.sqrt(2 / (H * H + N * H))
    found = {name[-1]: value for name, value in parameters.items() if kind(name) == "glorot normal"}
    assert sorted(found) == ["P", "W", "a"]
    for name, value in found.items():
        assert value.shape == (2, N, H, H)
        sigma = math.sqrt(0.5 / value.size)
        assert value.std() / std == pytest.approx(1, abs=SIGMAS * sigma), name
    assert_normal(np.stack(list(found.values())), std, "W, P, a")


def test_power_law_weights_of_the_published_size() -> None:
    value = np.asarray(per_head_glorot_normal(14, 64)(jax.random.key(1), (14, 64, 64)))
    assert math.sqrt(2 / (64 * 64 + 14 * 64)) == pytest.approx(0.02002, abs=5e-6)
    assert_normal(value, 0.02002, "W")


def test_no_two_tensors_are_drawn_alike(parameters: dict[str, np.ndarray]) -> None:
    """Layers, residual layers in them, and tensors of one shape are independent draws."""
    drawn: dict[str, np.ndarray] = {}
    for name, value in parameters.items():
        if kind(name) not in ("kernel", "glorot normal", "unit normal"):
            continue
        stacked = 2 if "/residual/" in name else 1 if name.startswith("layers/") else 0
        for index in np.ndindex(*value.shape[:stacked]):
            drawn[f"{name}{index}"] = value[index].ravel()
    assert len(drawn) == 2 + 2 * (4 + 3 + 3) + 2 * 3 * 6
    names = list(drawn)
    for i, one in enumerate(names):
        for other in names[:i]:
            size = min(drawn[one].size, drawn[other].size)
            pair = drawn[one][:size], drawn[other][:size]
            assert abs(np.corrcoef(*pair)[0, 1]) < 6 / math.sqrt(size), (one, other)
