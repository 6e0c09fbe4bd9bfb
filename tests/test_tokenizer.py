"""Tokenizer: exact round trips, special pieces, determinism, and errors in one line."""

import io
import pickle
import random

import numpy as np
import pytest
import sentencepiece

from pldr_jax.config import ConfigError
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import with_digest

WORDS = "def return self the of value list for in if else print range tokens model layer".split()


def some_text(seed: int, words: int = 4000) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", "\n", "\n    "]) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([some_text(0)], 300)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  leading and trailing  ",
        "\t\tdef f():\r\n\r\n  return\n",
        "e\u0301 caf\u00e9 \ufb01",
        "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\u2581",
        "a\u2581 b \u2581\u2581c",
        "a\0b\0",
        "\ufeff\u2028\u3000\u00a0\ufffd",
        "[PAD][START] <0x41> <unk>",
    ],
)
def test_texts_with_unusual_characters_survive(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_random_texts_survive_alone_and_in_a_batch(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    alphabet = "ab  \t\n\r\0\u2581\u00e9\u0301\u4e2d\U0001f642"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(300)]
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    assert [tokenizer.encode(text) for text in texts] == batch


def test_arrays_hold_the_ids_of_the_lists(tokenizer: Tokenizer) -> None:
    plain = ["ab cd", "", "x = 1", "caf\u00e9", "a\udcffb"]
    marked = [*plain, "\u2581", "a\u2581 b \u2581\u2581c", ""]
    for texts in (plain, marked):  # without a space mark there is nothing to split
        arrays = tokenizer.encode_arrays(texts)
        assert {(ids.dtype, ids.ndim) for ids in arrays} == {(np.dtype(np.int32), 1)}
        assert [ids.tolist() for ids in arrays] == [tokenizer.encode(text) for text in texts]
    decoded = [tokenizer.decode(ids) for ids in tokenizer.encode_arrays(marked)]
    assert decoded == [text.replace("\udcff", "?") for text in marked]
    assert tokenizer.encode_arrays([]) == []


def test_special_pieces_have_fixed_ids_and_never_come_from_text(tokenizer: Tokenizer) -> None:
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 300
    assert min(tokenizer.encode("[PAD][UNK][START][END] \U0001f642")) > 3
    assert tokenizer.decode([2, *tokenizer.encode("value"), 3, 0]) == "value"


def test_lone_surrogate_becomes_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


def test_equal_texts_train_equal_models(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train([some_text(0)], 300).model_bytes == tokenizer.model_bytes
    assert Tokenizer.train([some_text(0)], 301).digest != tokenizer.digest


def test_a_long_text_is_used_to_its_end() -> None:
    # SentencePiece alone drops a sentence of this length, and what only the end has is not learned.
    trained = Tokenizer.train([some_text(0, 12000) + "\u00e9" * 3000], 300)
    assert len(trained.encode("\u00e9")) == 1


def test_white_space_pieces_shorten_indentation() -> None:
    text = "\n".join(" " * (8 * (k % 4)) + WORDS[k % len(WORDS)] for k in range(3000))
    without, having = (
        Tokenizer.train([text], 288, allow_whitespace_only_pieces=allow) for allow in (False, True)
    )
    assert len(without.encode(" " * 16)) == 16
    assert len(having.encode(" " * 16)) < 16
    assert having.decode(having.encode(text)) == text


def test_pickle_and_file_keep_the_model(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "tokenizer.model")
    text = "def value \U0001f642"
    for copy in (
        Tokenizer.load(tmp_path / "tokenizer.model"),
        pickle.loads(pickle.dumps(tokenizer)),
        Tokenizer.from_bytes(tokenizer.model_bytes),
    ):
        assert copy.digest == tokenizer.digest
        assert copy.encode(text) == tokenizer.encode(text)


def test_pickle_holds_the_bytes_only(tokenizer: Tokenizer) -> None:
    tokenizer.encode("value")
    assert len(pickle.dumps(tokenizer)) < len(tokenizer.model_bytes) + 200


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_bad_model_file_is_a_one_line_error(tmp_path, content: bytes | None) -> None:
    path = tmp_path / "bad.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^Data\.tokenizer = .*bad\.model.*\S$") as raised:
        Tokenizer.load(path)
    assert "\n" not in str(raised.value)


def test_a_model_that_has_changed_is_refused(tokenizer: Tokenizer, tmp_path) -> None:
    files = with_digest("tokenizer.model", tokenizer.model_bytes)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "tokenizer.model"
    assert Tokenizer.load(path).digest == tokenizer.digest
    # Another piece: it is a SentencePiece model still, whose ids mean something else.
    changed = tokenizer.model_bytes.replace(b"[START]", b"[STARZ]")
    assert Tokenizer(changed).vocab_size == tokenizer.vocab_size
    path.write_bytes(changed)
    with pytest.raises(ConfigError, match=r"has changed since .* remove tokenizer.model.sha256"):
        Tokenizer.load(path)
    (tmp_path / "tokenizer.model.sha256").unlink()
    assert Tokenizer.load(path).digest != tokenizer.digest


def test_too_small_vocabulary_names_the_smallest_that_works() -> None:
    with pytest.raises(ConfigError, match=r"^Model\.vocab_size = 262: must be at least (\d+)") as e:
        Tokenizer.train([some_text(0)], 262)
    smallest = int(str(e.value).split("at least ")[1].split()[0])
    assert Tokenizer.train([some_text(0)], smallest).vocab_size == smallest
    with pytest.raises(ConfigError, match=r"^Model\.vocab_size"):
        Tokenizer.train([some_text(0)], smallest - 1)


def test_too_little_text_names_the_largest_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"^Model\.vocab_size = 5000: .* at most (\d+) pieces"):
        Tokenizer.train(["def f(x): return x"], 5000)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_names_the_source(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^Data\.source: "):
        Tokenizer.train(texts, 300)


def test_a_continuation_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    """Also with a tokenizer that puts a space before every text, as the published one does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"return the {w} of a value" for w in "abcdefgh" * 20]),
        model_writer=model,
        vocab_size=60,
        byte_fallback=False,
        hard_vocab_limit=False,
    )
    text = "return the h of a value"
    for one in (tokenizer, Tokenizer.from_bytes(model.getvalue())):
        ids = one.encode(text)
        for cut in range(len(ids) + 1):
            rest = one.decode_continuation(ids[:cut], ids[cut:])
            assert one.decode(ids[:cut]) + rest == one.decode(ids) == text
    cuts = range(1, len(ids))
    assert any(one.decode(ids[k:]) != one.decode_continuation(ids[:k], ids[k:]) for k in cuts)
