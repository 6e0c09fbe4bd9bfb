"""Weights as decoding reads them: layouts give the same logits, and rounding costs what it says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import CONFIG, TOKENS, gap, make_params

from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model import weights as weights_module
from pldr_jax.model.decoder import Params, forward, unstack_layers
from pldr_jax.model.weights import DecodeKernel, nbytes, rounded, rounded_params


def decoded(params: Params, weights: str) -> np.ndarray:
    """Logits [4,B,V] of four decode steps after five tokens."""
    unstacked = unstack_layers(CONFIG, params, weights)
    length_B = jnp.full((3,), 5, jnp.int32)
    _, cache = prefill(CONFIG, params, TOKENS, length_B, None, 16)
    step = jax.jit(functools.partial(decode_step, CONFIG))
    made = []
    for position in range(5, 9):
        logits, cache = step(unstacked, TOKENS[:, position], cache)
        made.append(logits)
    return np.stack(made)


def test_both_layouts_give_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 12))
    for shape, inputs in (((12, 7), 1), ((12, 2, 4), 1), ((3, 4, 5), 2)):
        kernel = jax.random.normal(jax.random.key(1), shape)
        expected = x @ kernel.reshape(12, -1)
        for backend in ("cpu", "gpu"):
            monkeypatch.setattr(weights_module.jax, "default_backend", lambda b=backend: b)
            made = DecodeKernel.of(kernel, inputs, jnp.float32)
            assert made.out_first == (backend == "cpu")
            assert gap(made.product(x), expected) < 1e-5
            low = DecodeKernel.of(kernel, inputs, jnp.int8)
            assert 1e-4 < gap(low.product(x), expected) < 0.2


def test_int8_is_within_half_a_step_of_each_output_channel() -> None:
    kernel = jax.random.normal(jax.random.key(0), (4, 6, 5)) * jnp.arange(5.0)
    values, scale = rounded(kernel, 2, "int8")
    assert values.dtype == jnp.int8 and scale is not None and scale.shape == (5,)
    error = jnp.abs(values * scale - kernel).max((0, 1))
    assert (error <= scale / 2 * (1 + 1e-5)).all()
    assert not values[..., 0].any()  # a channel of zeros stays one
    assert (jnp.abs(values).max((0, 1))[1:] == 127).all()


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_decoding_is_the_forward_pass_with_rounded_kernels(weights: str) -> None:
    params = make_params()
    made, exact = decoded(params, weights), decoded(params, "auto")
    low = rounded_params(params, weights)
    g_lm = forward(CONFIG, params, TOKENS, None, jnp.full((3,), 5, jnp.int32)).deductive.G_LM
    assert 1e-4 < gap(made, exact) < 0.5

    def changed(path: Any, one: jax.Array, other: jax.Array) -> None:
        name = jax.tree_util.keystr(path)
        moved = not np.array_equal(one, other)
        assert moved == (name.endswith("['kernel']") and "plga" not in name), name

    jax.tree_util.tree_map_with_path(changed, params, low)
    whole = np.moveaxis(np.asarray(forward(CONFIG, low, TOKENS, g_lm).logits)[:, 5:9], 1, 0)
    # The prompt's keys are those of the exact weights.
    assert np.abs(made - whole).mean() < np.abs(exact - whole).mean() * 1.5


@pytest.mark.parametrize(("weights", "share"), [("auto", 1.0), ("bfloat16", 0.55), ("int8", 0.4)])
def test_memory_of_the_weights_of_the_published_model(weights: str, share: float) -> None:
    from helpers import REPOSITORY

    from pldr_jax.config.load import load_config
    from pldr_jax.model.decoder import init_params

    config = load_config(
        [REPOSITORY / "configs" / "pldr_110m.gin"], ["Model.dtype='float32'"]
    ).model
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    made = jax.eval_shape(lambda p: unstack_layers(config, p, weights), _unboxed(params))
    assert nbytes(made) <= share * nbytes(_unboxed(params))


def _unboxed(params: Any) -> Any:
    import flax.linen as nn

    return nn.unbox(params)
