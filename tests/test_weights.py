"""Weights in fewer bytes: what is rounded, by how much, what it saves, and where it can be asked
for.
"""

import dataclasses
import functools
import math
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPOSITORY, assert_same_bits
from test_model import CONFIG, TOKENS, gap, make_params

import pldr_jax
from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, MeshConfig
from pldr_jax.config.load import load_config
from pldr_jax.config.model import ModelConfig
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.inference.intervention import Intervention
from pldr_jax.model import weights as module
from pldr_jax.model.counts.shapes import place_params
from pldr_jax.model.decoder import Params, forward, init_params, unstack_layers
from pldr_jax.model.weights import WeightsDtype, rounded, stack_layers, take_apart
from pldr_jax.partition import build_mesh


def widened(params: Params) -> Params:
    """Rounded parameters as a model's own: kernels times their scales, in float32."""

    def of_tree(tree: Any, stacked: int, name: str) -> Any:
        if not isinstance(tree, dict):
            return tree.astype(jnp.float32)
        made = {key: of_tree(value, stacked, key) for key, value in tree.items()}
        if (scale := made.pop("kernel_scale", None)) is not None:
            summed = range(stacked, stacked + (2 if name == "out" else 1))
            made["kernel"] *= jnp.expand_dims(scale, tuple(summed))
        return made

    return {name: of_tree(tree, int(name == "layers"), name) for name, tree in params.items()}


def nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_kernels_are_rounded_and_nothing_of_plga(weights: WeightsDtype) -> None:
    params = make_params()
    small = rounded(params, weights)
    assert rounded(params, "float32") is params

    def compare(path: Any, exact: jax.Array, other: jax.Array) -> None:
        name = jax.tree_util.keystr(path)
        changed = ("['kernel']" in name or "['table']" in name) and "plga" not in name
        assert (gap(exact, other) > 0) == changed, name

    jax.tree_util.tree_map_with_path(compare, params, widened(small))
    kernel, one = params["layers"]["attention"]["out"], small["layers"]["attention"]["out"]
    if weights == "int8":  # one axis of outputs, [L,D]; half a step of each at most
        assert one["kernel_scale"].shape == (CONFIG.num_layers, CONFIG.model_dim)
        error = np.abs(one["kernel"] * one["kernel_scale"][:, None, None] - kernel["kernel"])
        assert (error.max((1, 2)) <= one["kernel_scale"] / 2 * (1 + 1e-5)).all()
        assert (np.abs(one["kernel"]).max((1, 2)) == 127).all()


def test_a_channel_of_zeros_stays_one() -> None:
    params = make_params()
    kernel = params["head"]["kernel"].at[:, 3].set(0.0)
    head = rounded({**params, "head": {**params["head"], "kernel": kernel}}, "int8")["head"]
    assert not head["kernel"][:, 3].any()
    scale = np.asarray(head["kernel_scale"])
    assert np.isfinite(scale).all() and (scale > 0).all()  # else NaN would become an integer


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_model_with_rounded_weights_is_the_model_of_what_they_stand_for(
    weights: WeightsDtype,
) -> None:
    params = make_params()
    small = rounded(params, weights)
    exact, expected = forward(CONFIG, params, TOKENS), forward(CONFIG, widened(small), TOKENS)
    whole = forward(CONFIG, small, TOKENS)
    largest = float(jnp.abs(expected.logits).max())
    assert gap(whole.logits, expected.logits) < 2e-5 * largest
    assert 1e-4 * largest < gap(whole.logits, exact.logits) < 0.2 * largest
    # Decoding too, with the products that it joins.
    unstacked = unstack_layers(CONFIG, small)
    narrow = jnp.dtype(weights)
    for part in (unstacked["layers"][1]["attention"]["qkv"], unstacked["layers"][0]["ffn"]["w12"]):
        assert part["kernel"].dtype == narrow
    step = jax.jit(functools.partial(decode_step, CONFIG))
    five = jnp.full((TOKENS.shape[0],), 5, jnp.int32)
    prompt, cache = prefill(CONFIG, small, TOKENS[:, :5], five, None, 16)
    g_lm = forward(CONFIG, small, TOKENS[:, :5]).deductive.G_LM
    follow = forward(CONFIG, small, TOKENS, g_lm).logits
    assert gap(prompt, follow[:, 4]) < 2e-5 * largest
    for position in range(5, 8):
        logits, cache = step(unstacked, TOKENS[:, position], cache)
        assert gap(logits, follow[:, position]) < 5e-5 * largest


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_the_forward_pass_of_layers_that_are_apart(weights: WeightsDtype) -> None:
    params = rounded(make_params(), weights)
    unstacked = take_apart(CONFIG, dict(params))
    assert_same_bits(unstacked, unstack_layers(CONFIG, params))
    assert_same_bits(stack_layers(CONFIG, unstacked), params)
    expected = forward(CONFIG, params, TOKENS)
    for unroll in (True, False):  # layer by layer, and in a loop that copies one at a time
        config = dataclasses.replace(CONFIG, unroll=unroll)
        whole = jax.jit(functools.partial(forward, config))(unstacked, TOKENS)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
        jax.tree.map(close, whole, expected)


def test_stacked_arrays_are_let_go_of_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 0)
    params = jax.tree.map(jnp.copy, make_params())
    alive = [weakref.ref(leaf) for leaf in jax.tree.leaves(params["layers"])]
    counts: list[int] = []
    slices = module._jit_slices

    def watch(*args: Any) -> Any:
        counts.append(sum(leaf() is not None for leaf in alive))
        return slices(*args)

    monkeypatch.setattr(module, "_jit_slices", watch)
    take_apart(CONFIG, params)
    assert counts == list(range(len(alive), 0, -1))


@pytest.mark.parametrize(("weights", "share"), [("bfloat16", 0.55), ("int8", 0.35)])
def test_memory_of_the_published_model(weights: WeightsDtype, share: float) -> None:
    config = load_config([REPOSITORY / "configs" / "pldr_110m.gin"]).model
    params = nn.unbox(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert nbytes(jax.eval_shape(lambda p: rounded(p, weights), params)) <= share * nbytes(params)


def test_a_language_model_of_rounded_weights() -> None:
    small = ModelConfig(
        vocab_size=37, num_layers=1, num_heads=2, head_dim=8, num_residual_layers=1,
        num_gated_units=1, context_length=16,
    )  # fmt: skip
    exact = make_params(small)
    params = rounded(exact, "int8")
    lm, like = LanguageModel(small, params), LanguageModel(small, widened(params))
    one, other = (model.generate([[3, 5, 7]], max_new_tokens=6)[0] for model in (lm, like))
    assert one.tokens == other.tokens
    assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
    # What lies on a mesh is rounded there, and stays where it lies.
    mesh = build_mesh(MeshConfig(2, 2, 2))
    placed = rounded(place_params(small, exact, mesh), "int8")
    split = LanguageModel(small, placed, mesh=mesh)
    changed = split.intervened(Intervention(centroid=True))
    assert changed.params["head"]["kernel"].dtype == jnp.int8
    spread = split.generate([[3, 5, 7]], max_new_tokens=6)[0]
    assert spread.tokens == one.tokens
    assert np.allclose(spread.logprobs, one.logprobs, atol=1e-4)


def test_other_dtypes_are_refused_before_anything_is_read() -> None:
    for weights in ("int4", "auto"):
        with pytest.raises(ConfigError, match=f"weights = '{weights}': must be float32, bfloat16"):
            pldr_jax.load("/nowhere", weights=weights)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Generation.weights=int4: expected one of 'float32', "):
        load_config([], ["Generation.weights=int4"])
