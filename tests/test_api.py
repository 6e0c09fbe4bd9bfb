"""The Python API: loading, a forward pass, generating, and what it says when something is wrong."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS, Golden
from letters import Letters, letters_model
from safetensors.numpy import load_file, save_file

import pldr_jax
from pldr_jax import ConfigError

TINY = GOLDENS / "tiny"
PROMPTS = [[5, 9, 3], [7, 8, 9, 10, 11, 12, 13], [4]]


@pytest.fixture(scope="module")
def lm() -> Any:
    loaded = pldr_jax.load(TINY)
    # As loaded, but for scans, which compile in a fraction of the time.
    config = dataclasses.replace(loaded.config, unroll=False)
    return pldr_jax.LanguageModel(config, loaded.params, loaded.g_lm, loaded.tokenizer)


def test_load_and_call(lm: Any) -> None:
    assert (lm.config.num_layers, lm.config.num_heads, lm.config.head_dim) == (2, 2, 8)
    assert lm.config.vocab_size == 61 and lm.config.context_length == 48
    assert lm.params["embedding"]["table"].shape == (61, 16)
    assert lm.g_lm is None and lm.tokenizer is None
    out = lm([[5, 9, 3, 7], [1, 2, 3, 4]])
    assert out.logits.shape == (2, 4, 61) and out.logits.dtype == jnp.float32
    assert out.hidden.shape == (2, 4, 16)
    for name in ("A", "A_LM", "A_P", "G_LM"):
        assert getattr(out.deductive, name).shape == (2, 2, 2, 8, 8)
    assert float(out.deductive.A_LM.min()) > 0
    assert np.array_equal(lm(np.array([[5, 9, 3, 7], [1, 2, 3, 4]])).logits, out.logits)


def test_load_is_the_golden(golden: Callable[[str], Golden]) -> None:
    case = golden("tiny")
    logits = pldr_jax.load(TINY)(case.rows[:, :-1]).logits
    assert np.abs(logits - case.tensors["logits"]).max() < 1e-4


def test_call_with_a_given_g_lm(lm: Any) -> None:
    tokens = [[5, 9, 3, 7], [1, 2, 3, 4]]
    own = lm(tokens)
    again = lm(tokens, g_lm=own.deductive.G_LM)
    assert np.abs(again.logits - own.logits).max() < 1e-5
    assert again.deductive.A is None and again.deductive.G_LM is not None
    first = lm(tokens, g_lm=own.deductive.G_LM[:, 0])
    assert np.abs(first.logits[0] - own.logits[0]).max() < 1e-5
    assert np.abs(first.logits[1] - own.logits[1]).max() > 1e-4


def test_generate_from_one_prompt_or_many(lm: Any) -> None:
    (one,) = lm.generate(PROMPTS[1], max_new_tokens=6)
    (same,) = lm.generate([PROMPTS[1]], max_new_tokens=6)
    assert one == same
    assert one.prompt_tokens == PROMPTS[1]
    assert len(one.tokens) == 6 and one.finish_reason == "length" and one.text == ""
    together = lm.generate(PROMPTS, max_new_tokens=6)
    assert [result.tokens for result in together] == [
        lm.generate(prompt, max_new_tokens=6)[0].tokens for prompt in PROMPTS
    ]
    assert len({tuple(result.tokens) for result in together}) == 3


def test_drawn_texts_do_not_depend_on_the_batch(lm: Any) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    together = lm.generate(PROMPTS, seed=5, **settings)
    alone = [lm.generate(prompt, seed=5 + i, **settings)[0] for i, prompt in enumerate(PROMPTS)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    others = lm.generate(PROMPTS, seed=6, **settings)
    assert [r.tokens for r in others] != [r.tokens for r in together]


def test_generate_stops(lm: Any) -> None:
    (free,) = lm.generate(PROMPTS[1], max_new_tokens=6)
    stop = free.tokens[3]
    (stopped,) = lm.generate(PROMPTS[1], max_new_tokens=6, stop_ids=[stop])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    assert stopped.finish_reason == "stop"
    (full,) = lm.generate(list(range(1, 46)), max_new_tokens=9)
    assert len(full.tokens) == 3 and full.finish_reason == "context"


def test_stream_grows_to_what_generate_returns(lm: Any) -> None:
    seen: dict[int, list[list[int]]] = {}
    for index, result in lm.stream(PROMPTS, max_new_tokens=6):
        seen.setdefault(index, []).append(result.tokens)
    assert all([len(tokens) for tokens in grown] == [1, 2, 3, 4, 5, 6] for grown in seen.values())
    finished = [seen[index][-1] for index in sorted(seen)]
    assert finished == [r.tokens for r in lm.generate(PROMPTS, max_new_tokens=6)]


def test_generate_with_a_given_g_lm(lm: Any) -> None:
    g_lm = lm([PROMPTS[1]]).deductive.G_LM[:, 0]
    given, own = (lm.generate(PROMPTS, max_new_tokens=6, g_lm=g) for g in (g_lm, None))
    assert given[1].tokens == own[1].tokens
    assert given[0].tokens != own[0].tokens


def fails(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_bad_prompts(lm: Any) -> None:
    fails("prompt 0: the prompt is empty", lm.generate, [[], []])
    fails("prompts: none", lm.generate, [])
    fails("prompt 0: the prompt has 48 tokens, .*context of 48", lm.generate, [[1] * 48])
    fails("prompt 0: .*outside the vocabulary of 61", lm.generate, [1, 61])
    fails("prompt 0: .*outside the vocabulary of 61", lm.generate, [-1])
    fails("no tokenizer", lm.generate, "text")
    fails("max_new_tokens = 0", lm.generate, [1], max_new_tokens=0)
    fails("top_p = 0", lm.generate, [1], top_p=0.0)
    fails("g_cache = 'B': is not one of 'G_LM', 'A', 'none'", lm.generate, [1], g_cache="B")
    fails("turn the key-value cache off", lm.generate, [1], g_cache="none")


@pytest.mark.parametrize(
    "prompts",
    [b"def", bytearray(b"def"), 2.5, None, 7, {"a": 1}, [b"def"], [2.5], [[1.5]], [None], [[True]],
     [[None]], [{1: 2}], np.array([[0.5]]), [["a"]], [[10**30]], [[[1]]]],
)  # fmt: skip
def test_what_is_no_prompt_is_one_line(lm: Any, prompts: Any) -> None:
    fails("prompt", lm.generate, prompts)


def test_prompts_of_any_kind(lm: Any) -> None:
    wanted = [r.tokens for r in lm.generate(PROMPTS, 4)]
    rows = [PROMPTS[1], PROMPTS[1]]
    for prompts, expected in (
        ((prompt for prompt in PROMPTS), wanted),
        (map(np.asarray, PROMPTS), wanted),
        (tuple(map(tuple, PROMPTS)), wanted),
        ([jnp.asarray(prompt) for prompt in PROMPTS], wanted),
        (np.array(rows, np.uint8), [wanted[1]] * 2),
        (jnp.array(PROMPTS[0]), wanted[:1]),
        (iter(PROMPTS[0]), wanted[:1]),
        (range(9, 6, -1), [lm.generate([9, 8, 7], 4)[0].tokens]),
    ):
        assert [r.tokens for r in lm.generate(prompts, 4)] == expected


def test_a_bad_prompt_leaves_the_others_their_results(lm: Any) -> None:
    wanted = lm.generate(PROMPTS, 4)
    mixed = [PROMPTS[0], [], [1, 61], None, PROMPTS[2], [1] * 48]
    with pytest.warns(UserWarning, match="prompt 1: the prompt is empty; its result has .error"):
        made = lm.generate(mixed, 4)
    assert [r.finish_reason for r in made] == ["length", *["error"] * 3, "length", "error"]
    assert [made[0].tokens, made[4].tokens] == [wanted[0].tokens, wanted[2].tokens]
    assert all(r.error and not r.tokens for r in made if r.finish_reason == "error")
    assert sorted(i for i, r in lm.stream(mixed, 1) if r.error) == [1, 2, 3, 5]


def test_one_value_of_sampling(lm: Any) -> None:
    sampling = pldr_jax.SamplingConfig(6, temperature=1.0, top_k=9, seed=3)
    wanted = [r.tokens for r in lm.generate(PROMPTS, 6, temperature=1.0, top_k=9, seed=3)]
    assert [r.tokens for r in lm.generate(PROMPTS, sampling)] == wanted
    assert [r.tokens for r in lm.generate(PROMPTS, sampling=sampling, rows=2)] == wanted
    assert [r.tokens for r in lm.generate(PROMPTS, sampling, seed=4)] != wanted
    assert [r.tokens for r in lm.generate(PROMPTS, sampling, seed=2)][1:] != wanted[1:]
    ended = {i: r.tokens for i, r in lm.stream(PROMPTS, sampling, steps=4, batch_size=2)}
    assert [ended[i] for i in range(3)] == wanted
    first, second = lm.generate(PROMPTS[:2], 4, temperature=1.0, seed=2**32 - 1)
    assert second.tokens == lm.generate(PROMPTS[1], 4, temperature=1.0, seed=0)[0].tokens


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rows": 0}, "batch_size = 0: must be at least 1"),
        ({"batch_size": 2.0}, "batch_size = 2.0: must be int"),
        ({"steps": 0}, "steps = 0"),
        ({"top_k": 2**40}, "top_k = 1099511627776: must be at most"),
        ({"max_new_tokens": 10**12}, "max_new_tokens = 1000000000000"),
        ({"max_new_tokens": True}, "max_new_tokens = True: must be int"),
        ({"temperature": float("nan")}, "temperature = nan: must be finite"),
        ({"seed": 2**32}, "seed = 4294967296: must be at most"),
        ({"stop_ids": [99999999999]}, "stop_ids = "),
        ({"stop_ids": [61]}, "stop_ids has the token id 61, outside the vocabulary of 61"),
        ({"stop": "fn"}, "stop: this checkpoint has no tokenizer; use stop_ids"),
        ({"stop": [""]}, "an empty string"),
        ({"temprature": 1}, "temprature: no such setting; did you mean temperature?"),
        ({"batchsize": 1}, "batchsize: no such setting; did you mean batch_size?"),
    ],
)
def test_settings_that_cannot_be_used(lm: Any, settings: dict[str, Any], named: str) -> None:
    fails(re.escape(named), lm.generate, [1, 2], **settings)


def test_a_stop_string_is_one_string() -> None:
    lm = letters_model()
    (free,) = lm.generate("hello", 20, temperature=1.0)
    stop = free.text[4:7]
    (cut,) = lm.generate("hello", 20, temperature=1.0, stop=stop)
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    (same,) = lm.generate("hello", 20, temperature=1.0, stop=[stop])
    assert same == cut


def test_a_tokenizer_with_fewer_pieces_than_the_model() -> None:
    """Ids without a piece are never drawn, and no prompt may have them."""
    whole = letters_model()
    few = Letters()
    few.vocab_size = 40
    lm = pldr_jax.LanguageModel(whole.config, whole.params, tokenizer=few)
    texts = [whole.encode("abc"), whole.encode("x y"), [3, 45]]
    assert any(
        t >= 40 for r in whole.generate(texts[:1] * 20, 9, temperature=2.0) for t in r.tokens
    )
    made = lm.generate(texts[:1] * 20, 9, temperature=2.0)
    assert all(0 <= t < 40 for r in made for t in r.tokens)
    for bad in (texts[1], texts[2], "x y"):
        fails("of which the tokenizer has no piece", lm.generate, bad)
    fails("of which the tokenizer has no piece", lm.generate, "abc", stop_ids=[63])


def test_bad_tokens_and_g_lm(lm: Any) -> None:
    fails("outside the vocabulary of 61", lm, [[61]])
    fails("outside the vocabulary of 61", lm, [[-1]])
    fails("must be integer ids", lm, [1, 2])
    fails("must be integer ids", lm, [[0.5]])
    fails("rows are not of one length", lm, [[1], [2, 3]])
    fails("rows are not of one length", lm, [[1, 2], 3])
    fails("must be integer ids", lm, np.zeros((1, 0), np.int32))
    for shape in [(2, 2, 8, 4), (3, 2, 8, 8), (2, 8, 8), (2, 1, 1, 8, 8)]:
        fails("g_lm: has shape .*needs \\(2, 2, 8, 8\\)", lm, [[1]], g_lm=np.zeros(shape))
        fails("g_lm: has shape", lm.generate, [1], g_lm=np.zeros(shape))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    return tmp_path


def test_missing_files(copy: Path) -> None:
    fails("no such folder", pldr_jax.load, copy / "nowhere")
    (copy / "model.safetensors").unlink()
    fails("model.safetensors: no such file", pldr_jax.load, copy)


def test_missing_unknown_and_misshaped_tensors(copy: Path) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "decoder.dec_layers.1.mha1.wk.bias"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    fails(f"the tensor '{name}' is missing", pldr_jax.load, copy)
    save_file({**tensors, "decoder.extra": tensors[name]}, path)
    fails("unknown tensor 'decoder.extra'", pldr_jax.load, copy)
    save_file({**tensors, name: tensors[name][:-1]}, path)
    fails(f"'{name}' has the shape \\(15,\\), the config needs \\(16,\\)", pldr_jax.load, copy)


@pytest.mark.parametrize("kept", [0, 4, 200, 60_000])
def test_truncated_weights(copy: Path, kept: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    fails("model.safetensors: cannot be read, it may be truncated", pldr_jax.load, copy)


def test_bad_config_files(copy: Path) -> None:
    path = copy / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "model_type": "llama"}))
    fails("model_type = 'llama'", pldr_jax.load, copy)
    path.write_text(json.dumps({**raw, "attention_bias": False}))
    fails("attention_bias = False", pldr_jax.load, copy)
    path.write_text(json.dumps({key: value for key, value in raw.items() if key != "A_dff"}))
    fails("'A_dff' is missing", pldr_jax.load, copy)
    path.write_text("{")
    fails("cannot be read as JSON", pldr_jax.load, copy)
    path.write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    fails("decoder.dec_layers.2.* is missing", pldr_jax.load, copy)
