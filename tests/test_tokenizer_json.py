"""`tokenizer.json` gives the ids of `tokenizer.model`, in the tokenizers library and in
transformers.
"""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from helpers import WORDS

from pldr_jax.config import ConfigError
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.interop.tokenizer.fast import tokenizer_json
from pldr_jax.interop.tokenizer.files import (
    HOSTILE,
    TokenizerCheck,
    check_tokenizer,
    tokenizer_files,
)

TEXT = [" ".join(WORDS * 40), "abcdefghijklmnopqrstuvwxyz ABC [](){}<>.,:;=x0123456789\n" * 30] + [
    f"def {a}({b}):\n    return {a} [END] <{b}>\n" for a in WORDS for b in WORDS
]
PROSE = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] + [
    "caf\u00e9 \ufb01 \u00bd", "[SEP]", "  two  ", "\t", "<0x41>", "a<0x41>b[END]c", "x" * 30,
]  # fmt: skip


def trained(**options: Any) -> Tokenizer:
    """A SentencePiece model that somebody else trained."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT).splitlines()),
        model_writer=model,
        minloglevel=3,
        **{"vocab_size": 400, "hard_vocab_limit": False, **options},
    )
    return Tokenizer(model.getvalue())


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
MODELS: dict[str, Any] = {
    "unigram": {},
    "unigram, bytes": {"byte_fallback": True, "user_defined_symbols": ["[SEP]"], "vocab_size": 600},
    "unigram, as Llama has it": {"byte_fallback": True, "vocab_size": 600, **IDENTITY},
    "bpe": {"model_type": "bpe"},
    "bpe, bytes": {"model_type": "bpe", "byte_fallback": True, "vocab_size": 600},
    "bpe, no space in front": {"model_type": "bpe", "add_dummy_prefix": False, **IDENTITY},
    "characters": {"model_type": "char", "byte_fallback": True, "vocab_size": 600},
}


def fast(tokenizer: Tokenizer) -> Any:
    library = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    return library.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_models_of_others(name: str) -> None:
    tokenizer = trained(**MODELS[name])
    read = fast(tokenizer)
    wrong = [text for text in (*HOSTILE, *PROSE) if read.encode(text).ids != tokenizer.encode(text)]
    assert wrong == []
    for text in PROSE:
        ids = tokenizer.encode(text)
        if tokenizer.unk_id not in ids:
            assert read.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("options", [{}, {"split_digits": False, "control_symbols": ["<|im|>"]}])
def test_ids_of_tokenizers_trained_here(options: Any) -> None:
    tokenizer = Tokenizer.train(TEXT, 345, **options)
    read = fast(tokenizer)
    for text in (*HOSTILE, *PROSE, "<|im|>", "x<|im|>y"):
        ids = tokenizer.encode(text)
        assert read.encode(text).ids == ids, text
        assert read.decode(ids) == text
    # What is spelled like a byte, a space or a special piece is none.
    assert tokenizer.eos_id not in read.encode("a[END]").ids
    mark = [tokenizer.piece(i) for i in read.encode("\u2581").ids]
    assert mark == ["<0xE2>", "<0x96>", "<0x81>"]
    assert len(read.encode("<0x41>").ids) > 1
    check = check_tokenizer(tokenizer, json.dumps(tokenizer_json(tokenizer)).encode())
    assert check == TokenizerCheck(len(HOSTILE)) and "warning" not in check.line()
    assert f"{len(HOSTILE)} of {len(HOSTILE)}" in check.line()


def test_the_check_sees_another_tokenizer() -> None:
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer, other = Tokenizer.train(TEXT, 345), Tokenizer.train(TEXT, 338)
    check = check_tokenizer(tokenizer, json.dumps(tokenizer_json(other)).encode())
    assert check.equal is not None and check.equal < 20 and "warning" in check.line()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: .* cannot read it"):
        check_tokenizer(tokenizer, b'{"version": "1.0"}')


@pytest.mark.parametrize("ours", [True, False])
def test_auto_tokenizer(ours: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    tokenizer = Tokenizer.train(TEXT, 345) if ours else trained(model_type="bpe")
    for name, data in tokenizer_files(tokenizer, 64, {}).items():
        (tmp_path / name).write_bytes(data)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*HOSTILE, *PROSE):
        assert auto(text)["input_ids"] == tokenizer.encode(text), text
    assert (auto.eos_token_id, auto.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert (len(auto), auto.model_max_length) == (tokenizer.vocab_size, 64)
    ids = tokenizer.encode("def return self")
    assert auto.decode([*ids, tokenizer.eos_id], skip_special_tokens=True) == "def return self"


def test_files_of_the_source_are_kept() -> None:
    tokenizer = trained()
    theirs = {"tokenizer_class": "LlamaTokenizer", "padding_side": "left", "legacy": False}
    files = tokenizer_files(tokenizer, 64, {"tokenizer_config.json": json.dumps(theirs).encode()})
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["tokenizer_class"], settings["padding_side"]) == (
        "PreTrainedTokenizerFast", "left",
    )  # fmt: skip
    assert "legacy" not in settings and "tokenizer.json" in files
    kept = tokenizer_files(tokenizer, 64, {"tokenizer.json": b"{}"})
    assert list(kept) == ["tokenizer.model"]
