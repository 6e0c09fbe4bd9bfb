"""The network by itself: positions, padding, causality, caches, dtypes, rematerialisation."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.model.decoder import Params, forward, init_params, unstack_layers
from pldr_jax.model.deductive import identity_g_lm, random_g_lm
from pldr_jax.model.reductions import POSITIONS, add_bias, most_probable
from pldr_jax.training.losses import token_loss

CONFIG = ModelConfig(
    vocab_size=37,
    num_layers=2,
    num_heads=2,
    head_dim=8,
    num_residual_layers=2,
    num_gated_units=1,
    unroll=False,
    context_length=16,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 37, (3, 12)), jnp.int32)


def variant(**changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def make_params(config: ModelConfig = CONFIG) -> Params:
    """Parameters without zeros: initial ones, and noise on top, so that biases count too."""
    params = jax.jit(lambda key: nn.unbox(init_params(config, key)))(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [leaf + 0.05 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def jitted(config: ModelConfig = CONFIG) -> Any:
    return jax.jit(functools.partial(forward, config))


def without_plga(params: Params) -> Params:
    attention = {k: v for k, v in params["layers"]["attention"].items() if k != "plga"}
    return {**params, "layers": {**params["layers"], "attention": attention}}


def gap(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


def test_rope_layouts_agree_under_a_permutation_of_the_head_dimension() -> None:
    """Half-split channel i is interleaved channel 2i, and i + H/2 is 2i + 1."""
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    params, g_lm = make_params(), random_g_lm(CONFIG, 3)
    attention = dict(params["layers"]["attention"])
    for name in ("q", "k"):
        attention[name] = {key: value[..., order] for key, value in attention[name].items()}
    permuted = {**params, "layers": {**params["layers"], "attention": attention}}
    expected = jitted()(params, TOKENS, g_lm).logits
    half_split = jitted(variant(rope_layout="half_split"))
    permuted_g_lm = g_lm[..., order, :][..., order]
    assert gap(half_split(permuted, TOKENS, permuted_g_lm).logits, expected) < 1e-5
    assert gap(half_split(params, TOKENS, g_lm).logits, expected) > 1e-2


def test_a_padded_row_gives_what_it_gives_alone() -> None:
    params, lengths = make_params(), [5, 12, 9]
    batch = jitted()(params, TOKENS, None, jnp.array(lengths))
    ignored = jitted()(params, TOKENS)
    for row, length in enumerate(lengths):
        alone = jitted()(params, TOKENS[row : row + 1, :length])
        logits = alone.logits[0]
        assert gap(batch.logits[row, :length], logits) < 1e-5 * float(jnp.abs(logits).max())
        for name, value in batch.deductive.items():
            own = getattr(alone.deductive, name)[:, 0]
            assert gap(value[:, row], own) < 2e-5 * float(jnp.abs(own).max()), name
        assert (gap(ignored.logits[row, :length], logits) > 1e-3) == (length < 12)


def test_what_padding_holds_does_not_matter() -> None:
    params, lengths = make_params(), jnp.array([5, 12, 9])
    other = jnp.where(jnp.arange(12) < lengths[:, None], TOKENS, 36)
    one, two = (jitted()(params, tokens, None, lengths) for tokens in (TOKENS, other))
    for row, length in enumerate(lengths.tolist()):
        assert gap(one.logits[row, :length], two.logits[row, :length]) < 1e-6
    assert gap(one.logits, two.logits) > 1e-2


@pytest.mark.parametrize("seen", [2, 6, 11])
def test_later_tokens_reach_earlier_ones_through_g_lm_alone(seen: int) -> None:
    params = make_params()
    other = TOKENS.at[:, seen:].set((TOKENS[:, seen:] + 7) % 37)
    g_lm = random_g_lm(CONFIG, 4)
    given = [jitted()(params, tokens, g_lm).logits for tokens in (TOKENS, other)]
    assert gap(given[0][:, :seen], given[1][:, :seen]) < 1e-6
    assert gap(given[0][:, seen:], given[1][:, seen:]) > 1e-2
    computed = [jitted()(params, tokens).logits for tokens in (TOKENS, other)]
    assert gap(computed[0][:, :seen], computed[1][:, :seen]) > 1e-3


@functools.cache
def decoding(keep: str) -> tuple[Any, Any]:
    first = functools.partial(prefill, CONFIG, capacity=14, keep=keep)
    return jax.jit(first), jax.jit(functools.partial(decode_step, CONFIG))


@pytest.mark.parametrize("keep", ["G_LM", "A"])
def test_cached_decoding_is_the_full_forward_pass(keep: str) -> None:
    """At every split point, given the prompt's G_LM, which decoding leaves as it is bit for bit."""
    params, (first, step) = make_params(), decoding(keep)
    unstacked = unstack_layers(CONFIG, params)
    for split in range(1, 12):
        length = jnp.full(3, split, jnp.int32)
        g_lm = jitted()(params, TOKENS, None, length).deductive.G_LM
        full = jitted()(params, TOKENS, g_lm).logits
        logits, cache = first(params, TOKENS, length, None)
        kept = [np.asarray(getattr(layer.deductive, keep)) for layer in cache.layers]
        if keep == "G_LM":
            assert gap(np.stack(kept), g_lm) < 1e-6 * float(jnp.abs(g_lm).max())
        tolerance = 1e-5 * float(jnp.abs(full).max())
        assert gap(logits, full[:, split - 1]) < tolerance, split
        for position in range(split, 12):
            logits, cache = step(unstacked, TOKENS[:, position], cache)
            assert gap(logits, full[:, position]) < tolerance, (split, position)
        assert cache.length_B.tolist() == [12] * 3
        for layer, before in zip(cache.layers, kept, strict=True):
            assert np.array_equal(getattr(layer.deductive, keep), before)


def test_rows_of_different_lengths_decode_side_by_side() -> None:
    params, (first, step) = make_params(), decoding("G_LM")
    unstacked, lengths = unstack_layers(CONFIG, params), jnp.array([3, 9, 6])
    g_lm = jitted()(params, TOKENS, None, lengths).deductive.G_LM
    full = jitted()(params, TOKENS, g_lm).logits
    _, cache = first(params, TOKENS, lengths, None)
    for i in range(3):
        at = lengths + i
        logits, cache = step(unstacked, TOKENS[jnp.arange(3), at], cache)
        assert gap(logits, full[jnp.arange(3), at]) < 1e-5 * float(jnp.abs(full).max())


def test_bfloat16_keeps_parameters_and_deductive_outputs_in_float32() -> None:
    config = variant(dtype="bfloat16")
    fresh = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    g_lm = random_g_lm(CONFIG, 5)
    outputs = jitted(config)(make_params(), TOKENS)
    assert outputs.logits.dtype == jnp.float32
    assert [value.dtype for _, value in outputs.deductive.items()] == [jnp.float32] * 4
    assert outputs.layers.k_BTNH.dtype == outputs.hidden.dtype == jnp.bfloat16
    loss, gradient = loss_and_gradient(config)
    assert float(loss) == pytest.approx(float(loss_and_gradient(CONFIG)[0]), abs=0.2)
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    # With one G_LM, logits of magnitude 4 differ by rounding to 8 bits.
    low, full = (jitted(c)(make_params(), TOKENS, g_lm).logits for c in (config, CONFIG))
    relative = gap(low, full) / float(jnp.abs(full).max())
    assert 1e-5 < relative < 5e-2
    # With its own, G_LM amplifies the rounding of the queries; most logits stay close all the same.
    own = jitted()(make_params(), TOKENS).logits
    assert float(jnp.abs(outputs.logits - own).mean() / jnp.abs(own).mean()) < 0.1


@functools.cache
def loss_and_gradient(config: ModelConfig) -> tuple[jax.Array, Any]:
    def loss(params: Params) -> jax.Array:
        logits = forward(config, params, TOKENS[:, :-1]).logits
        return token_loss(logits, TOKENS[:, 1:]).loss

    # What is compared does not need machine code that took long to make.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss), compiler_options=options)(make_params())


@pytest.mark.parametrize("changes", [{"remat": "dots"}, {"remat": "full"}, {"unroll": True}])
def test_remat_and_unroll_change_no_number(changes: dict[str, Any]) -> None:
    """The gradient as a whole: single tensors follow the rounding order (test_parity.py)."""
    loss, gradient = loss_and_gradient(CONFIG)
    other_loss, other_gradient = loss_and_gradient(variant(**changes))
    assert float(other_loss) == pytest.approx(float(loss), abs=1e-6)
    one, other = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (gradient, other_gradient)
    )
    assert np.linalg.norm(other - one) < 1e-3 * np.linalg.norm(one)
    for leaf in jax.tree.leaves(gradient):
        assert np.asarray(leaf).any()


def test_identity_is_g_lm_of_ones_on_the_diagonal() -> None:
    config, params = variant(g_source="identity"), make_params()
    bare = without_plga(params)
    expected = jax.eval_shape(lambda key: nn.unbox(init_params(config, key)), jax.random.key(0))
    assert jax.tree.structure(bare) == jax.tree.structure(expected)
    outputs = jitted(config)(bare, TOKENS)
    eye = jnp.broadcast_to(jnp.eye(8), (2, 1, 2, 8, 8))
    assert np.array_equal(identity_g_lm(CONFIG), eye)
    assert gap(outputs.logits, jitted()(params, TOKENS, eye).logits) < 1e-6
    assert outputs.deductive.items() == []
    # And that is ordinary attention: doubling G_LM changes it.
    assert gap(outputs.logits, jitted()(params, TOKENS, 2 * eye).logits) > 1e-2


@pytest.mark.parametrize(
    "changes", [{"g_source": "random"}, {"g_source": "external", "g_file": "g.npz"}]
)
def test_a_model_without_plga_needs_its_g_lm(changes: dict[str, Any]) -> None:
    config, bare = variant(**changes), without_plga(make_params())
    with pytest.raises(ValueError, match=f"g_source = '{changes['g_source']}'.*pass G_LM"):
        forward(config, bare, TOKENS)
    g_lm = random_g_lm(config, 6)
    expected = jitted()(make_params(), TOKENS, g_lm).logits
    assert gap(jitted(config)(bare, TOKENS, g_lm).logits, expected) < 1e-6


def test_random_g_lm_is_standard_normal_and_seeded() -> None:
    wide = variant(head_dim=32)
    one, again, other = (np.asarray(random_g_lm(wide, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.shape == (2, 1, 2, 32, 32)
    assert one.std() == pytest.approx(1, abs=0.05) and abs(one.mean()) < 0.06
    assert not np.array_equal(one[0], one[1])


def test_the_compiled_program_names_its_parts() -> None:
    text = jitted().lower(make_params(), TOKENS).compile().as_text()
    for scope in ("plga", "metric_learner", "power_law", "attention", "ffn", "head", "embedding"):
        assert f"{scope}/" in text, scope


def product_precisions(config: ModelConfig) -> list[tuple[bool, Any]]:
    """Of every product of the forward pass: whether it is PLGA's, and its precision. (Not of those
    that sum over one number: biases, on a CPU.)
    """
    found: list[tuple[bool, Any]] = []

    def visit(jaxpr: Any, outer: bool = False) -> None:
        for equation in jaxpr.eqns:
            inside = outer or "plga" in str(equation.source_info.name_stack)
            if equation.primitive.name == "dot_general" and equation.invars[0].aval.shape[-1] > 1:
                found.append((inside, equation.params["precision"]))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    visit(getattr(value, "jaxpr", value), inside)

    visit(jax.make_jaxpr(functools.partial(forward, config))(make_params(), TOKENS).jaxpr)
    return found


@pytest.mark.parametrize("name", ["default", "high", "highest"])
def test_precision_of_the_products_of_plga(name: Any) -> None:
    """Those in PLGA, Q^T Q included, have it; the others, (q G_LM) k^T among them, have not."""
    asked = jax.lax.Precision(name) if name != "default" else jax.lax.Precision.DEFAULT
    found = product_precisions(variant(plga_precision=name))
    inside = [precision for in_plga, precision in found if in_plga]
    assert len(inside) == 1 + 3 + 2  # Q^T Q; w1, w2, w3 of the scanned unit; W A and a A_P
    assert set(inside) == {(asked, asked)}
    assert {precision for in_plga, precision in found if not in_plga} == {None}


def test_new_values_compile_nothing_again() -> None:
    traces = []

    @jax.jit
    def run(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        traces.append(None)
        return forward(CONFIG, params, tokens, None, lengths).logits

    run(make_params(), TOKENS, jnp.array([12, 12, 12]))
    run(jax.tree.map(lambda leaf: 2 * leaf, make_params()), TOKENS[::-1], jnp.array([4, 2, 9]))
    assert len(traces) == 1
    step = decoding("G_LM")[1]
    first = decoding("G_LM")[0]
    unstacked = unstack_layers(CONFIG, make_params())
    for length in (3, 7):
        _, cache = first(make_params(), TOKENS, jnp.full(3, length, jnp.int32), None)
        for position in range(length, length + 3):
            _, cache = step(unstacked, TOKENS[:, position], cache)
    assert first._cache_size() == step._cache_size() == 1


def test_a_bias_and_its_gradient_are_those_of_a_sum() -> None:
    y, weights = jax.random.normal(jax.random.key(0), (2, 37, 5))
    bias = jnp.arange(5.0) + 0.1
    assert np.array_equal(add_bias(y, bias), y + bias)
    grads = jax.grad(lambda y, b: (add_bias(y, b) * weights).sum(), argnums=(0, 1))(y, bias)
    assert np.array_equal(grads[0], weights)
    np.testing.assert_allclose(grads[1], weights.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, POSITIONS, 2 * POSITIONS, 2 * POSITIONS + 7])
def test_the_most_probable_token_is_the_first_of_the_largest(length: int) -> None:
    logits = jax.random.randint(jax.random.key(length), (3, length, 9), 0, 4).astype(jnp.float32)
    assert np.array_equal(jax.jit(most_probable)(logits), jnp.argmax(logits, -1))
