"""What the model does on a GPU, with stand-ins for the kernel and the backend."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pldr_jax.cli.xla_flags import with_presets
from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model import kernels, layers
from pldr_jax.model.decoder import forward, init_params, unstack_layers
from pldr_jax.model.layers import GLU
from pldr_jax.training.losses import token_loss

CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=2,
    num_heads=2,
    head_dim=16,
    num_residual_layers=2,
    context_length=32,
    dtype="bfloat16",
)


def checked(x_BTNH: jax.Array, training: bool) -> None:
    """The checks that JAX makes before it calls the kernel."""
    if x_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"Q must be fp16/bf16, got {x_BTNH.dtype}")
    if x_BTNH.shape[3] % 8 or x_BTNH.shape[3] > 256:
        raise NotImplementedError("The head dim must be <= 256 and a multiple of 8")
    if training and x_BTNH.shape[1] % 2:
        raise NotImplementedError(f"Unsupported sequence length Q {x_BTNH.shape[1]}")


class Kernel:
    """A stand-in for JAX's `dot_product_attention`, and how often it was called for a device."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.reference = jax.nn.dot_product_attention

        @jax.custom_vjp
        def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            checked(q, False)
            return self.computed(q, k, v)

        def fwd(*arrays: jax.Array) -> Any:
            checked(arrays[0], True)
            return jax.vjp(self.computed, *arrays)

        fused.defvjp(fwd, lambda pullback, gradient: pullback(gradient))
        self.fused = fused

    def computed(self, *arrays: jax.Array) -> jax.Array:
        self.lengths.append(arrays[0].shape[1])
        wide = (x.astype(jnp.float32) for x in arrays)
        return self.reference(*wide, is_causal=True).astype(arrays[0].dtype)

    def __call__(self, q: Any, k: Any, v: Any, *, is_causal: bool, implementation: str) -> Any:
        assert is_causal and implementation == "cudnn"
        return self.fused(q, k, v)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A Hopper GPU's kernel."""
    stand_in = Kernel()
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(kernels, "cuda_capability", lambda device=None: (9, 0))
    yield stand_in


def arrays_of(length: int, head_dim: int = 16, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(length), 3)
    return [jax.random.normal(key, (2, length, 2, head_dim), dtype) for key in keys]


@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 127])
def test_cudnn_runs_at_every_length_and_so_does_its_gradient(kernel: Kernel, length: int) -> None:
    def total(attend: Any, *arrays: jax.Array) -> jax.Array:
        return jnp.square(attend(*arrays).astype(jnp.float32)).sum()

    arrays = arrays_of(length)
    fused = functools.partial(kernels.attend, kernel="auto")
    plain = functools.partial(kernels.attend, kernel="xla")
    np.testing.assert_allclose(
        np.float32(fused(*arrays)), np.float32(plain(*arrays)), rtol=2e-2, atol=2e-2
    )
    assert set(kernel.lengths) == {-(-length // 64) * 64}
    wide = [x.astype(jnp.float32) for x in arrays]
    exact = jax.grad(functools.partial(total, plain), argnums=(0, 1, 2))(*wide)
    made = jax.grad(functools.partial(total, fused), argnums=(0, 1, 2))(*arrays)
    for one, other in zip(made, exact, strict=True):
        np.testing.assert_allclose(np.float32(one), other, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(12, jnp.bfloat16), (264, jnp.bfloat16), (16, jnp.float32)]
)
def test_what_cudnn_refuses_is_computed_without_it(
    kernel: Kernel, head_dim: int, dtype: Any
) -> None:
    arrays = arrays_of(9, head_dim, dtype)
    expected = kernels.attend(*arrays, kernel="xla")
    np.testing.assert_array_equal(kernels.attend(*arrays, kernel="auto"), expected)
    assert not kernel.lengths
    with pytest.raises(ConfigError, match=r"^Model\.attention_kernel = 'cudnn': .*; take 'auto'$"):
        kernels.attend(*arrays, kernel="cudnn")


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, ValueError])
def test_auto_does_without_a_kernel_that_raises(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("cuDNN is not\ndetected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    arrays = arrays_of(9)
    expected = kernels.attend(*arrays, kernel="xla")
    np.testing.assert_array_equal(kernels.attend(*arrays, kernel="auto"), expected)
    with pytest.raises(ConfigError, match=r"cannot run: cuDNN is not detected\.; take 'auto'"):
        kernels.attend(*arrays, kernel="cudnn")


def test_an_odd_number_of_inputs_trains_with_the_kernel(kernel: Kernel) -> None:
    # Without PLGA, which would amplify the rounding of bfloat16.
    config = dataclasses.replace(CONFIG, g_source="identity")
    params = nn.unbox(init_params(config, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 31), 1, config.vocab_size)
    gradients = {}
    for name in ("auto", "xla"):
        loss = functools.partial(mean_square, dataclasses.replace(config, attention_kernel=name))
        flat = [x.ravel() for x in jax.tree.leaves(jax.jit(jax.grad(loss))(params, tokens))]
        gradients[name] = np.concatenate(flat)
    assert set(kernel.lengths) == {64}
    apart = np.linalg.norm(gradients["auto"] - gradients["xla"])
    assert apart < 0.03 * np.linalg.norm(gradients["xla"])
    jax.eval_shape(jax.grad(functools.partial(mean_square, CONFIG)), with_plga(), tokens)


def with_plga() -> Any:
    return nn.unbox(init_params(CONFIG, jax.random.key(0)))


def mean_square(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    return jnp.square(forward(config, params, tokens).logits).mean()


@pytest.mark.parametrize("width", [21, 170, 48])
def test_the_gated_unit_of_aligned_width_has_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    unit = GLU(24, width, ("embed", "ffn"))
    x = jax.random.normal(jax.random.key(0), (3, 5, 24))
    params = nn.unbox(unit.init(jax.random.key(1), x))
    params = jax.tree.map(lambda w: w + 0.1 * jnp.cos(jnp.arange(w.size).reshape(w.shape)), params)

    def total(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = unit.apply(params, x)
        return jnp.square(y).sum(), y

    measured = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    expected = measured(params, x)
    monkeypatch.setattr(layers, "on_gpu", lambda: True)
    assert layers.aligned("ffn", 170) == 192 and layers.aligned("ffn", 2389) == 2432
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5),
        measured(params, x),
        expected,
    )


def test_decoding_on_a_gpu_has_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, dtype="float32")
    params = nn.unbox(init_params(config, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 1, config.vocab_size)
    expected = forward(config, params, tokens, g_length_B=jnp.array([8, 8])).logits[:, 8]
    monkeypatch.setattr(layers, "on_gpu", lambda: True)
    unstacked = unstack_layers(config, params)
    assert unstacked["layers"][0]["ffn"]["w12"]["kernel"].shape == (32, 2, 128)
    _, cache = prefill(config, params, tokens[:, :8], jnp.array([8, 8]), None, 16)
    logits, _ = decode_step(config, unstacked, tokens[:, 8], cache)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-4)


def test_the_loss_without_a_lookup_has_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = jax.random.normal(jax.random.key(0), (2, 5, 33))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 33)
    measured = jax.value_and_grad(lambda logits: token_loss(logits, targets).loss)
    expected = measured(logits)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "scatter" not in str(jax.make_jaxpr(measured)(logits))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7),
        measured(logits),
        expected,
    )


def test_xla_flags_are_added_and_none_replaced() -> None:
    assert with_presets(["deterministic"], "") == "--xla_gpu_deterministic_ops=true"
    present = "--xla_dump_to=x --xla_gpu_graph_min_graph_size=5"
    both = with_presets(["decode", "train"], present)
    assert both.startswith(present + " ") and both.count("min_graph_size") == 1
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in both
