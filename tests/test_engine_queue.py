"""The engine's queue: nothing compiles or grows, one slot's fault is its own, what is refused."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import CONFIG, MODES, asked, params_of, requests_of

from pldr_jax.config import ConfigError, SamplingConfig
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.request import DecodeOptions, Request, bucket


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of events, one for each program that XLA compiles."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_is_compiled_after_warm_up(compilations: list[str]) -> None:
    engine = Engine(CONFIG, params_of())
    rng = np.random.default_rng(2)

    def queue(count: int) -> Iterator[Request]:
        for i in range(count):
            length = int(rng.integers(1, 60))
            prompt = tuple(rng.integers(1, 64, length).tolist())
            yield asked(
                prompt,
                int(rng.integers(1, 9)),
                temperature=float(rng.random() * (i % 2)),
                top_k=i % 5,
                top_p=float(1 - rng.random() / 2),
                min_p=float(rng.random() / 2),
                repetition_penalty=float(1 + rng.random()),
                seed=i,
                stop_ids=tuple(range(i % 4)),
            )

    # One prompt a bucket, and one that is ended by its text.
    warm = [asked((1,) * bucket, 2) for bucket in (16, 32, 33)]
    list(engine.run(warm, DecodeOptions(4), find_stop=lambda completion: 1))
    assert compilations
    del compilations[:]
    assert len(engine.generate(queue(50), DecodeOptions(4), find_stop=stop_at_seven)) == 50
    assert compilations == []


def stop_at_seven(completion: Any) -> int | None:
    return completion.tokens.index(7) if 7 in completion.tokens else None


def test_a_long_queue_does_not_grow() -> None:
    """Thousands of prompts through the slots: what lives on the device does not grow."""
    config = dataclasses.replace(CONFIG, head_dim=4, vocab_size=16, context_length=16)
    engine, taken = Engine(config, params_of(config)), 0

    def queue() -> Iterator[Request]:
        nonlocal taken
        for i in range(4_000):
            taken += 1
            yield asked((i % 15 + 1,), 1 + i % 3)

    alive: list[int] = []
    ahead = finished = 0
    for completion in engine.run(queue(), DecodeOptions(64)):
        finished += completion.finish_reason is not None
        ahead = max(ahead, taken - finished)
        if finished % 1000 == 0 and completion.finish_reason is not None:
            gc.collect()
            alive.append(sum(array.nbytes for array in jax.live_arrays()))
    assert finished == 4_000 and len(alive) == 4
    assert ahead <= 64  # the queue is read as slots become free
    assert max(alive[1:]) <= alive[0]


def test_a_row_with_nan_fails_and_the_others_go_on() -> None:
    params = dict(params_of())
    table = params["embedding"]["table"].at[63].set(jnp.nan)
    params["embedding"] = {**params["embedding"], "table": table}
    good = [r for r in requests_of(CONFIG) if 63 not in r.prompt][:5]
    bad = asked((5, 63, 9), 4)
    expected = Engine(CONFIG, params_of()).generate(good, DecodeOptions(3))
    made = Engine(CONFIG, params).generate([*good[:2], bad, *good[2:]], DecodeOptions(3))
    failed = made.pop(2)
    assert failed.finish_reason == "error" and "not finite" in str(failed.error)
    assert failed.tokens == []
    for one, two in zip(made, expected, strict=True):
        assert one.tokens == two.tokens and one.finish_reason == "length"


def test_a_slot_forgets_its_last_row() -> None:
    """A long row before a short one in the same slot leaves nothing behind."""
    long, short = asked(tuple(range(1, 50)), 10), asked((7, 8), 10, repetition_penalty=1.5)
    engine = Engine(CONFIG, params_of())
    assert engine.generate([long, short], DecodeOptions(1))[1] == dataclasses.replace(
        engine.generate([short], DecodeOptions(1))[0], index=1
    )


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (Request(()), "the prompt is empty"),
        (Request((1,) * 64), "64 tokens"),
        (Request((1, 64)), "token id 64, outside the vocabulary of 64"),
        (Request((1, 10**30)), "outside the vocabulary of 64"),
        (Request((-1,)), "token id -1, outside"),
        (Request((1,), SamplingConfig(stop_ids=(64,))), "stop_ids has the token id 64, outside"),
        (Request((1,), error="no such prompt"), "no such prompt"),
    ],
)
def test_what_cannot_be_decoded_is_one_line(bad: Request, named: str) -> None:
    good = asked((1, 2, 3), 4)
    engine = Engine(CONFIG, params_of())
    for more in ({}, {"kv_cache": False}):
        made = engine.generate([good, bad, good], DecodeOptions(2, **more))
        assert [c.finish_reason for c in made] == ["length", "error", "length"]
        assert named in str(made[1].error) and "\n" not in str(made[1].error)
        assert made[0].tokens == made[2].tokens == engine.generate([good])[0].tokens


def test_a_prompt_that_a_slot_cannot_hold() -> None:
    made = Engine(CONFIG, params_of()).generate(
        [asked((1,) * 20, 13), asked((1,) * 20, 12)], DecodeOptions(capacity=32)
    )
    assert made[0].error == "the prompt and max_new_tokens need 33 tokens, the slots hold 32"
    assert len(made[1].tokens) == 12


@pytest.mark.parametrize("first", [(), (1,) * 64, (1, 64)])
def test_the_first_prompt_that_can_be_decoded_gives_the_g_lm(first: tuple[int, ...]) -> None:
    """And the others never decode with their own."""
    engine, requests = Engine(CONFIG, params_of()), requests_of(CONFIG)[:3]
    options = DecodeOptions(share_first_g=True)
    wanted = engine.generate(requests, options)
    assert [c.logprobs for c in wanted] != [c.logprobs for c in engine.generate(requests)]
    made = engine.generate(iter([asked(first), asked(()), *requests]), options)
    assert [c.finish_reason for c in made[:2]] == ["error", "error"]
    assert [c.tokens for c in made[2:]] == [c.tokens for c in wanted]
    ended = engine.generate([asked(first)], options)
    assert [c.finish_reason for c in ended] == ["error"]


@pytest.mark.parametrize("options", MODES.values())
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_logits_that_are_not_finite_have_one_rule(options: dict[str, Any], value: float) -> None:
    """-inf is a token that cannot come; NaN and infinity are a broken model."""
    params = dict(params_of())
    bias = params["head"]["bias"].at[jnp.array([7, 9])].set(value)
    params["head"] = {**params["head"], "bias": bias}
    settings = {"max_new_tokens": 6, "temperature": 1.5, "repetition_penalty": 1.2}
    requests = [asked((7, 8, 9), **settings), asked((1,), **settings)]
    made = Engine(CONFIG, params).generate(requests, DecodeOptions(2, **options))
    if value == -np.inf:
        assert all(c.finish_reason == "length" and not {7, 9} & set(c.tokens) for c in made)
        assert np.isfinite([c.logprobs for c in made]).all()
    else:
        assert all(c.finish_reason == "error" and "not finite" in str(c.error) for c in made)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_ids_without_a_piece_are_never_drawn(kv_cache: bool) -> None:
    params = dict(params_of())
    params["head"] = {**params["head"], "bias": params["head"]["bias"].at[50:].add(100.0)}
    options = DecodeOptions(kv_cache=kv_cache)
    requests = [asked((1, 2), 6), asked((1, 2), 6, temperature=2.0, top_k=3), asked((50,), 6)]
    free = Engine(CONFIG, params).generate(requests, options)
    assert all(set(c.tokens) <= set(range(50, 64)) for c in free)
    made = Engine(CONFIG, params, pieces=50).generate(requests, options)
    assert all(c.tokens and set(c.tokens) <= set(range(50)) for c in made[:2])
    assert made[2].error == "the prompt has the token id 50, of which the tokenizer has no piece"


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"steps": 0}, {"capacity": 0}, {"batch_size": True}]
)
def test_options_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(settings))} = \w+: must be"):
        DecodeOptions(**settings)


@pytest.mark.parametrize(
    ("length", "limit", "expected"), [(1, 64, 16), (16, 64, 16), (17, 64, 32), (33, 40, 40)]
)
def test_buckets(length: int, limit: int, expected: int) -> None:
    assert bucket(length, limit) == expected
