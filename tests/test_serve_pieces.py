"""Texts in pieces: whatever the pieces, they are the whole, and no half of anything shows."""

import random
from typing import Any

import pytest
from helpers import WORDS

from pldr_jax.config import SamplingConfig
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.inference.request import Request
from pldr_jax.serve.completions import Choice
from pldr_jax.serve.wire import ApiError, parse_object
from pldr_jax.serve.worker import Update


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(random.Random(k).choices(WORDS, k=99)) for k in range(9)], 290)


def grown(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int], cuts: list[int], stop: Any
) -> tuple[list[str], dict[str, list[Any]]]:
    """The pieces of a text that comes in parts, and its lists."""
    request = Request(tuple(prompt), SamplingConfig(99, stop=stop))
    choice = Choice(tokenizer, request, 5, listed=True)
    texts, lists = [], {}
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        ended = "length" if end == len(tokens) else None
        part = tokens[start:end]
        update = Update(0, part, [-1.0] * len(part), [], ended, None)
        text, told = choice.add(update)
        texts.append(text)
        assert told is not None
        lists = {name: [*lists.get(name, []), *told[name]] for name in told}
    return texts, lists


@pytest.mark.parametrize("seed", range(60))
def test_pieces_are_the_whole(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    characters = "def the \u00e9\u20ac\U0001f600\n" + "".join(rng.choices("abc \u2019", k=6))
    text = "".join(rng.choices(characters, k=14))
    tokens = tokenizer.encode(text)
    if seed % 2:  # bytes that are no characters
        tokens = [rng.randrange(4, 260) for _ in range(12)]
    prompt = tokenizer.encode("of the")
    whole = tokenizer.decode_continuation(prompt, tokens)
    stop = () if seed % 3 else (whole[5:7],)
    while stop and stop[0] in tokenizer.decode_continuation(prompt, tokens[:-1]):
        tokens.pop()  # as the engine ends it
    cuts = sorted(rng.sample(range(1, len(tokens)), min(4, len(tokens) - 1)))
    texts, lists = grown(tokenizer, prompt, tokens, cuts, stop)
    expected = whole[: whole.index(stop[0])] if stop else whole
    assert "".join(texts) == expected
    for k in range(len(texts) - 1):  # a character or a stop string is never shown by halves
        assert expected.startswith("".join(texts[:k]))
    alone = grown(tokenizer, prompt, tokens, [], stop)
    assert alone == ([expected], lists)
    offsets = lists["text_offset"]
    assert offsets == sorted(offsets) and all(5 <= x for x in offsets)
    assert stop or len(lists["tokens"]) == len(tokens)
    for offset, token in zip(offsets, lists["tokens"], strict=True):
        shown = expected[offset - 5 :]
        if seed % 2 == 0 and not token.startswith("bytes:"):
            assert shown.startswith(token) or token.startswith(shown)


def test_objects_are_read_strictly() -> None:
    assert parse_object(b'{"a": null, "b": 1}') == {"b": 1}
    for body in (b'{"a": 1, "a": 2}', b"[]", b"NaN", b"\xff", b"{" * 10**5, b'{"a": Infinity}'):
        with pytest.raises(ApiError) as caught:
            parse_object(body)
        assert caught.value.status == 400 and "\n" not in str(caught.value)
