"""The engine: a row is what it is alone, beside any other, on any mesh, in any queue."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Golden

from pldr_jax.config import MeshConfig, ModelConfig, SamplingConfig
from pldr_jax.inference.decode import prefill
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.request import DecodeOptions, Request, bucket
from pldr_jax.inference.sampling import slot_sampling
from pldr_jax.inference.slots import Prompts, Slots, admit, decode_slots, empty_slots
from pldr_jax.model.counts.shapes import place_params
from pldr_jax.model.decoder import Params, forward, init_params, unstack_layers
from pldr_jax.model.deductive import random_g_lm
from pldr_jax.partition import build_mesh

LENGTHS = (3, 17, 1, 12, 8, 5, 15, 2, 30)
CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    num_residual_layers=1,
    context_length=64,
    unroll=False,
)


@functools.cache
def params_of(config: ModelConfig = CONFIG, scale: float = 3.0) -> Params:
    params = nn.unbox(jax.jit(functools.partial(init_params, config))(jax.random.key(0)))

    # Larger than at the start of a training, so that texts are not one token again and again; not
    # those of PLGA, whose powers would amplify the last place of every number.
    def larger(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf if "plga" in jax.tree_util.keystr(path) else scale * leaf

    return jax.tree.map_with_path(larger, params)


def prompts_of(config: ModelConfig, lengths: tuple[int, ...] = LENGTHS) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    return [tuple(rng.integers(1, config.vocab_size, n).tolist()) for n in lengths]


def requests_of(config: ModelConfig, **settings: Any) -> list[Request]:
    """Requests of different lengths; each has its own seed."""
    settings = {"max_new_tokens": 10, **settings}
    return [asked(p, seed=i, **settings) for i, p in enumerate(prompts_of(config))]


def asked(prompt: tuple[int, ...], max_new_tokens: int = 128, **settings: Any) -> Request:
    return Request(prompt, SamplingConfig(max_new_tokens, **settings))


@functools.cache
def jitted(config: ModelConfig) -> tuple[Callable[..., Slots], Callable[..., Any]]:
    admitted = jax.jit(functools.partial(admit, config, keep="G_LM"))
    decode = functools.partial(decode_slots, config, steps=1, pieces=config.vocab_size)
    return admitted, jax.jit(decode)


@functools.cache
def unstacked(case: Golden) -> Params:
    return jax.jit(functools.partial(unstack_layers, case.config))(case.params)


class Steps:
    """Slots by hand: what the engine does, with the logits of every step in view."""

    def __init__(self, case: Golden, batch: int, capacity: int, g_lm: Any = None) -> None:
        config = case.config
        self.case, self.unstacked, self.g_lm = case, unstacked(case), g_lm
        make = functools.partial(empty_slots, config, batch, capacity, g_lm, "G_LM", "float32")
        self.slots = jax.jit(make)()
        self.admit, self.decode = jitted(config)

    def put(self, slot: int, prompt: tuple[int, ...], width: int | None = None) -> None:
        """Admits a prompt, padded to the engine's bucket or to `width`."""
        width = width or bucket(len(prompt), self.case.config.context_length)
        tokens = np.zeros((width,), np.int32)
        tokens[: len(prompt)] = prompt
        self.slots = self.admit(
            self.case.params,
            slots=self.slots,
            prompts=Prompts(
                slot_Q=np.array([slot], np.int32),
                tokens_QT=tokens[None],
                length_Q=np.array([len(prompt)], np.int32),
                sampling=slot_sampling([SamplingConfig(99)]),
                stop_QZ=jnp.full((1, 8), -1),
            ),
            g_lm_LBNHJ=self.g_lm,
        )

    def run(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [X,B], and the logits they were drawn from [X,B,V]."""
        tokens, logits = [], []
        for _ in range(count):
            logits.append(np.asarray(self.slots.logits_BV))
            self.slots, made = self.decode(self.unstacked, slots=self.slots)
            tokens.append(np.asarray(made.token_XB[0]))
        return np.stack(tokens), np.stack(logits)


def test_rows_are_what_they_are_alone(case: Golden) -> None:
    """Same greedy tokens, and logits within 1e-5, with other neighbours, slots and lengths of the
    cache; G_LM bit for bit."""
    prompts = prompts_of(case.config, (3, 17, 1, 30, 8))
    together = Steps(case, batch=6, capacity=48)
    for slot, prompt in enumerate(prompts):
        together.put(slot, prompt)
    kept = [layer.deductive.G_LM for layer in together.slots.cache.layers]
    tokens, logits = together.run(12)
    for slot, prompt in enumerate(prompts):
        alone = Steps(case, batch=1, capacity=42)
        alone.put(0, prompt)
        for layer, g_lm in zip(alone.slots.cache.layers, kept, strict=True):
            assert np.array_equal(layer.deductive.G_LM[0], g_lm[slot])
        own_tokens, own_logits = alone.run(12)
        assert np.array_equal(own_tokens[:, 0], tokens[:, slot])
        assert np.abs(own_logits[:, 0] - logits[:, slot]).max() < 1e-5, slot


def test_padding_changes_nothing_given_g_lm(case: Golden) -> None:
    """With one G_LM, any width of padding gives the same tokens, and logits within 1e-5."""
    forward_pass = jax.jit(functools.partial(forward, case.config))
    g_lm = forward_pass(case.params, case.rows[:1, :-1]).deductive.G_LM
    for prompt in prompts_of(case.config, (3, 17, 1)):
        made = []
        for width, batch, capacity in ((18, 1, 40), (48, 3, 48)):
            steps = Steps(case, batch, capacity, g_lm)
            steps.put(batch - 1, prompt, width)
            tokens, logits = steps.run(12)
            made.append((tokens[:, batch - 1], logits[:, batch - 1]))
        for tokens, logits in made[1:]:
            assert np.array_equal(tokens, made[0][0])
            assert np.abs(logits - made[0][1]).max() < 1e-5


def test_cached_decoding_is_the_full_pass_given_g_lm(case: Golden) -> None:
    """At every split between prefill and decode; G_LM stays bit for bit what the prompt gave."""
    (prompt,) = prompts_of(case.config, (24,))
    config, params = case.config, case.params
    full_pass = jax.jit(functools.partial(forward, config))
    first = jax.jit(functools.partial(prefill, config, capacity=24))
    for split in range(1, 24):
        steps = Steps(case, batch=1, capacity=24)
        steps.put(0, prompt[:split], width=24)
        g_lm = np.stack([layer.deductive.G_LM for layer in steps.slots.cache.layers])
        padded = np.where(np.arange(24) < split, prompt, 0)[None]
        _, cache = first(params, padded, jnp.array([split]), None)
        for layer, kept in zip(cache.layers, g_lm, strict=True):
            assert np.array_equal(layer.deductive.G_LM, kept)
        full = np.asarray(full_pass(params, np.array([prompt]), g_lm).logits[0])
        for position in range(split, 24):
            drawn = steps.slots.logits_BV[0]
            assert np.abs(drawn - full[position - 1]).max() < 1e-5, (split, position)
            # The next token of the text, whatever the model would draw.
            forced = jnp.full((1, config.vocab_size), -1e9).at[0, prompt[position]].set(0.0)
            slots, _ = steps.decode(steps.unstacked, slots=steps.slots.replace(logits_BV=forced))
            steps.slots = slots
        assert np.abs(steps.slots.logits_BV[0] - full[23]).max() < 1e-5
        for layer, kept in zip(steps.slots.cache.layers, g_lm, strict=True):
            assert np.array_equal(layer.deductive.G_LM, kept)


MODES: dict[str, dict[str, Any]] = {
    "kv1_g1": {},
    "kv1_g0": {"g_cache": "A"},
    "kv0_g1": {"kv_cache": False},
    "kv0_g0": {"kv_cache": False, "g_cache": "none"},
}


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_of_the_goldens(case: Golden, mode: str) -> None:
    sequence = case.tensors[f"greedy/{mode}/tokens"][0].astype(int).tolist()
    start = case.tensors["prompt"].shape[1]
    request = asked(tuple(sequence[:start]), len(sequence) - start)
    queue = [*requests_of(case.config, temperature=1.0)[:2], request]
    options = DecodeOptions(2, **MODES[mode])
    made = Engine(case.config, case.params).generate(queue, options)
    assert made[-1].tokens == sequence[start:]


@functools.cache
def sampled(batch: int, capacity: int | None, reverse: bool = False, steps: int = 8) -> list[Any]:
    requests = requests_of(CONFIG, temperature=1.3, top_p=0.95, repetition_penalty=1.1)
    order = requests[::-1] if reverse else requests
    made = Engine(CONFIG, params_of()).generate(order, DecodeOptions(batch, capacity, steps))
    return made[::-1] if reverse else made


@pytest.mark.parametrize("arguments", [(2, None), (8, None, True), (3, 48), (4, 40, False, 3)])
def test_samples_depend_on_prompt_seed_and_settings_alone(arguments: tuple[Any, ...]) -> None:
    alone, other = sampled(1, None), sampled(*arguments)
    assert [c.tokens for c in other] == [c.tokens for c in alone]
    for one, two in zip(alone, other, strict=True):
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)
    assert len({tuple(c.tokens) for c in alone}) == len(alone)  # the seeds do something


def test_one_g_lm_for_all() -> None:
    """`share_first` gives every row the first prompt's; a given one serves all."""
    engine, requests = Engine(CONFIG, params_of()), requests_of(CONFIG)[:3]
    tokens = np.array([requests[0].prompt])
    g_lm = jax.jit(functools.partial(forward, CONFIG))(params_of(), tokens).deductive.G_LM
    given = engine.generate(requests, g_lm=g_lm)
    shared = engine.generate(requests, DecodeOptions(share_first_g=True))
    own = engine.generate(requests)
    assert [c.tokens for c in shared] == [c.tokens for c in given]
    assert shared[0].tokens == own[0].tokens
    assert own[1].logprobs != pytest.approx(given[1].logprobs, abs=1e-4)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 1, 2), (2, 2, 2)])
def test_a_mesh_gives_the_tokens_of_one_device(sizes: tuple[int, int, int]) -> None:
    config = dataclasses.replace(CONFIG, num_heads=8, vocab_size=96, context_length=32)
    mesh = build_mesh(MeshConfig(*sizes))
    engine = Engine(config, place_params(config, params_of(config, 1.0), mesh), mesh=mesh)
    for given, tolerance in ((False, 1e-4), (True, 1e-5)):
        # Its own G_LM amplifies rounding, and devices sum in another order.
        alone, g_lm = one_device(config, given)
        made = engine.generate(requests_of(config)[:-1], g_lm=g_lm)
        assert [c.tokens for c in made] == [c.tokens for c in alone]
        for one, two in zip(alone, made, strict=True):
            np.testing.assert_allclose(one.logprobs, two.logprobs, atol=tolerance)


@functools.cache
def one_device(config: ModelConfig, given: bool) -> tuple[list[Any], jax.Array | None]:
    g_lm = random_g_lm(config, 2) if given else None
    engine = Engine(config, params_of(config, 1.0))
    return engine.generate(requests_of(config)[:-1], g_lm=g_lm), g_lm


def test_the_cache_is_split_and_stays_where_it_is() -> None:
    config = dataclasses.replace(CONFIG, num_heads=4, num_layers=1)
    mesh = build_mesh(MeshConfig(4, 1, 2))
    params = place_params(config, params_of(config), mesh)
    with jax.set_mesh(mesh):
        make = functools.partial(empty_slots, config, 8, 32, None, "G_LM", "float32")
        slots = jax.jit(make)()
        unstacked = jax.jit(functools.partial(unstack_layers, config))(params)
        decode = jax.jit(functools.partial(decode_slots, config, steps=2, pieces=config.vocab_size))
        compiled = decode.lower(unstacked, slots=slots).compile()
        after, _ = compiled(unstacked, slots=slots)
    for state in (slots, after):
        for leaf in jax.tree.leaves(state.cache.layers):
            assert leaf.sharding.spec[:2] == ("data", "tensor")
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size
    layer = slots.cache.layers[0]
    moved = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
    for whole in (layer.k_BNSH, layer.deductive.G_LM):
        for batch, heads in ((8, 4), (2, 4), (8, 2)):
            shape = ",".join(map(str, (batch, heads, *whole.shape[2:])))
            assert not any(f"[{shape}]" in line.split("all-gather(")[0] for line in moved)


def test_bfloat16_cache() -> None:
    """Half the bytes; nearly the same distribution."""
    requests = requests_of(CONFIG)[:4]
    full = Engine(CONFIG, params_of(), random_g_lm(CONFIG, 1))
    half = Engine(CONFIG, params_of(), random_g_lm(CONFIG, 1), cache_dtype="bfloat16")
    firsts = [[c.logprobs[1] for c in e.generate(requests)] for e in (full, half)]
    assert firsts[0] != firsts[1]
    np.testing.assert_allclose(*firsts, atol=0.1)
    sizes = [
        empty_slots(CONFIG, 2, 32, None, "G_LM", dtype).cache.layers[0].k_BNSH.nbytes
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] == 2 * sizes[1]
