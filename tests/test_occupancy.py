"""Several prompts enter in one call, and the device does not wait for the host."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from test_engine import CONFIG, asked, params_of, requests_of

from pldr_jax.config import SamplingConfig
from pldr_jax.inference import engine as engine_module
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.occupancy import Occupancy
from pldr_jax.inference.request import Completion, DecodeOptions, prompts_together
from pldr_jax.inference.sampling import slot_sampling
from pldr_jax.inference.slots import Prompts, Slots, admit, empty_slots

TOGETHER = 4


@functools.cache
def program() -> Any:
    return jax.jit(functools.partial(admit, CONFIG, keep="G_LM"))


def entered(prompts: list[tuple[int, ...]], slots: list[int]) -> Slots:
    """Eight slots after prompts of one bucket have entered some of them in one call."""
    tokens = np.zeros((len(prompts), 16), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return program()(
        params_of(),
        slots=empty_slots(CONFIG, 8, 48, None, "G_LM", "float32"),
        prompts=Prompts(
            slot_Q=np.array(slots, np.int32),
            tokens_QT=tokens,
            length_Q=np.array([len(prompt) for prompt in prompts], np.int32),
            sampling=slot_sampling([SamplingConfig(9)] * len(prompts)),
            stop_QZ=np.full((len(prompts), 8), -1, np.int32),
        ),
        g_lm_LBNHJ=None,
    )


def row(slots: Slots, slot: int, length: int) -> list[np.ndarray]:
    """What a slot holds of its prompt; beyond its tokens is padding."""
    cache = slots.cache.layers[0]
    arrays = [np.asarray(x[slot])[:, :length] for x in (cache.k_BNSH, cache.v_BNSH)]
    kept = (cache.deductive.G_LM, slots.logits_BV, slots.history.seen_BV, slots.cache.length_B)
    return arrays + [np.asarray(x[slot]) for x in kept]


def test_prompts_that_enter_together_are_what_they_are_alone() -> None:
    """Bit for bit the same beside others, in another place among them, and beside copies of itself;
    within rounding what a call of one prompt gives."""
    prompts = [r.prompt for r in requests_of(CONFIG) if len(r.prompt) <= 16][:TOGETHER]
    assert len({len(prompt) for prompt in prompts}) == TOGETHER
    together = entered(prompts, [5, 0, 3, 6])
    turned = entered(prompts[1:] + prompts[:1], [0, 1, 2, 3])
    for i, prompt in enumerate(prompts):
        found = row(together, [5, 0, 3, 6][i], len(prompt))
        padded_call = entered([prompt] * TOGETHER, [2] * TOGETHER)
        for other in (
            row(turned, (i - 1) % TOGETHER, len(prompt)),
            row(padded_call, 2, len(prompt)),
        ):
            assert all(map(np.array_equal, found, other))
        for one, two in zip(found, row(entered([prompt], [7]), 7, len(prompt)), strict=True):
            np.testing.assert_allclose(one.astype(float), two.astype(float), atol=1e-4)
    assert not together.active_B[1] and np.asarray(together.active_B).sum() == TOGETHER


def test_a_text_does_not_depend_on_what_waits_beside_it() -> None:
    """To the last bit, with as many slots: a job resumed after a kill finds other neighbours."""
    engine, requests = Engine(CONFIG, params_of()), requests_of(CONFIG, temperature=1.3)
    whole = engine.generate(requests, DecodeOptions(4))
    rest = engine.generate(requests[5:], DecodeOptions(4))
    assert [(c.tokens, c.logprobs) for c in rest] == [(c.tokens, c.logprobs) for c in whole[5:]]


def test_how_many_prompts_enter_together() -> None:
    assert [prompts_together(width, 8) for width in (16, 32, 64, 1024)] == [4, 2, 1, 1]
    assert [prompts_together(16, batch) for batch in (1, 2, 3, 100)] == [1, 2, 2, 4]


class Recorded:
    """Notes the calls of an engine in their order."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.limits: list[int] = []
        self.prompts: list[int] = []
        compiled, get = engine._slots, jax.device_get

        class Slots:
            empty, release, unstack = compiled.empty, compiled.release, compiled.unstack

            @staticmethod
            def admit(*args: Any, **kwargs: Any) -> Any:
                self.prompts.append(len(set(kwargs["prompts"].slot_Q.tolist())))
                return compiled.admit(*args, **kwargs)

            @staticmethod
            def decode(*args: Any, **kwargs: Any) -> Any:
                self.calls.append("decode")
                self.limits.append(int(kwargs["limit"]))
                return compiled.decode(*args, **kwargs)

        def read(tree: Any) -> Any:
            self.calls.append("read")
            return get(tree)

        monkeypatch.setattr(engine, "_slots", Slots)
        monkeypatch.setattr(engine_module.jax, "device_get", read)


def test_results_are_read_while_the_next_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a slot surely becomes free for a prompt: no call runs with that slot empty."""
    engine = Engine(CONFIG, params_of())
    recorded = Recorded(engine, monkeypatch)
    made = engine.generate([asked((i + 1,), 24) for i in range(8)], DecodeOptions(4))
    assert recorded.calls == ["decode", "decode", "read", "decode", "read", "read"] * 2
    assert recorded.prompts == [4, 4]
    assert [len(c.tokens) for c in made] == [24] * 8


def test_a_call_ends_with_a_text_while_prompts_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(CONFIG, params_of())
    recorded = Recorded(engine, monkeypatch)
    engine.generate([asked((1,), n) for n in (5, 30, 3, 1, 1)], DecodeOptions(2))
    assert recorded.limits[:4] == [5, 3, 2, 2]
    assert recorded.limits[-1] == 8  # nothing waits any more


def test_a_text_that_its_reader_ends_frees_its_slot() -> None:
    """As a stop string does; what its last calls still made is not its."""
    engine = Engine(CONFIG, params_of())
    ends: list[int] = []
    for completion in engine.run([asked((i + 1,), 40) for i in range(3)], DecodeOptions(1)):
        if completion.finish_reason is None and completion.index != 1:
            completion.stop(3)
        if completion.finish_reason is not None:
            ends.append(completion.index)
        assert len(completion.tokens) <= 40
    assert ends == [0, 1, 2]


def test_a_text_that_may_have_ended_gives_way() -> None:
    occupancy = Occupancy(2, 64)
    texts = [Completion(i, asked((1,), 4)) for i in range(3)]
    (group,) = occupancy.enter(texts[:2])
    assert list(group) == [0, 1] and occupancy.free == []
    assert occupancy.start(8, waiting=False) == 8 and not occupancy.going
    assert occupancy.ending and occupancy.free == []
    texts[1].finish_reason = texts[0].finish_reason = "length"
    assert occupancy.free == [0, 1] and not occupancy.ending
    assert [list(group) for group in occupancy.enter(texts[2:])] == [[0]]
    assert [text.completion for text in occupancy.going] == [texts[2]]
