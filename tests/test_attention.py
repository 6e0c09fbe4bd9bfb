"""Attention by itself: rotations, blocks, segments, the flash kernel."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_model import gap

from pldr_jax.config import MeshConfig
from pldr_jax.model.kernels import attend, attend_in_blocks, cuda_capability
from pldr_jax.model.rope import rotate
from pldr_jax.partition import build_mesh, mesh_scope


def test_rotation_by_hand() -> None:
    x = np.random.default_rng(2).normal(size=(1, 3, 1, 4)).astype(np.float32)
    positions = np.array([[0, 1, 5]])
    pairs = {"interleaved": [(0, 1), (2, 3)], "half_split": [(0, 2), (1, 3)]}
    for layout, of_layout in pairs.items():
        expected = x.astype(np.float64)
        for t, position in enumerate(positions[0]):
            for i, (one, two) in enumerate(of_layout):
                angle = position * 100.0 ** (-2 * i / 4)
                turned = np.exp(1j * angle) * (x[0, t, 0, one] + 1j * x[0, t, 0, two])
                expected[0, t, 0, [one, two]] = turned.real, turned.imag
        actual = rotate(jnp.asarray(x), jnp.asarray(positions), 100.0, layout)
        assert gap(actual, expected) < 1e-6


@pytest.mark.parametrize("block", [1, 5, 12, 64])
def test_attention_in_blocks_is_attention(block: int) -> None:
    """The same numbers and gradients, without the scores of all pairs."""
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, 2, 12, 3, 8))

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (weight * attend(q, k, v, "xla")).sum()

    def parts(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (weight * attend_in_blocks(q, k, v, None, block)).sum()

    assert gap(attend_in_blocks(q, k, v, None, block), attend(q, k, v, "xla")) < 1e-6
    gradients = [jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (whole, parts)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), *gradients)
    program = jax.jit(jax.grad(parts)).lower(q, k, v).as_text()
    assert ("tensor<2x3x12x12xf32>" in program) == (block == 12)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_segments_in_blocks_are_segments(block: int) -> None:
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 12, 3, 8))
    ids_BT = jnp.asarray([[1] * 5 + [2] * 4 + [3, 0, 0], [1] * 12])
    dense = attend(q, k, v, "xla", ids_BT)
    assert gap(attend_in_blocks(q, k, v, ids_BT, block), dense) < 1e-6
    assert gap(attend(q, k, v, "xla")[0], dense[0]) > 1e-2
    assert gap(attend(q, k, v, "xla")[1], dense[1]) == 0


@pytest.mark.parametrize("segments", [False, True])
def test_long_contexts_go_in_blocks(segments: bool) -> None:
    shapes = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32) for length in (2047, 2048)]
    for shape, whole in zip(shapes, (True, False), strict=True):
        length = shape.shape[1]
        ids_BT = jnp.ones((1, length), jnp.int32) if segments else None
        attention = jax.jit(lambda q, k, v, ids_BT=ids_BT: attend(q, k, v, "auto", ids_BT))
        program = attention.lower(shape, shape, shape)
        assert (f"tensor<1x1x{length}x{length}xf32>" in program.as_text()) == whole


@pytest.mark.parametrize("sharded", [False, True])
def test_the_flash_kernel_of_a_tpu_gives_the_same(sharded: bool) -> None:
    """Interpreted: lengths and heads that are no whole tiles, outputs and gradients."""
    rng = np.random.default_rng(6)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, 130, 2, 8)), jnp.float32) for _ in range(4))

    def run(kernel: str) -> Any:
        def weighted(q: Any, k: Any, v: Any) -> Any:
            return (attend(q, k, v, kernel) * weight).sum()

        return jax.jit(jax.value_and_grad(weighted, (0, 1, 2)))(q, k, v)

    plain = run("xla")
    mesh = build_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]) if sharded else None
    with mesh_scope(mesh), pltpu.force_tpu_interpret_mode():
        fused = run("flash")
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(fused), strict=True):
        assert gap(one, other) < 1e-5 * max(1.0, float(np.abs(one).max()))


@pytest.mark.parametrize(
    ("platform", "stated", "expected"),
    [
        ("gpu", "9.0", (9, 0)),
        ("gpu", "12.1", (12, 1)),
        ("cuda", "8.10", (8, 10)),
        ("gpu", "9.0a", (9, 0)),
        ("gpu", "gfx90a", (0, 0)),
        ("gpu", "gfx1100", (0, 0)),
        ("gpu", "", (0, 0)),
        ("gpu", None, (0, 0)),
        ("METAL", "3.2", (0, 0)),
        ("cpu", "9.0", (0, 0)),
    ],
)
def test_compute_capability_of_any_maker(platform: str, stated: Any, expected: Any) -> None:
    device = types.SimpleNamespace(platform=platform, compute_capability=stated)
    assert cuda_capability(device) == expected
    del device.compute_capability
    assert cuda_capability(device) == (0, 0)
