"""The files that transformers reads a tokenizer from, beside `tokenizer.model`.

`tokenizer.json` states the whole tokenizer, so that what is read there does not depend on how a
version of transformers converts SentencePiece models. It is written for tokenizers that keep every
text exactly, as those trained here do; others follow normalisation rules of their own.
"""

import json
from typing import Any

from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER

_SPACE_MARK = "\u2581"


def tokenizer_files(tokenizer: Tokenizer, context_length: int) -> dict[str, bytes]:
    """Contents by file name."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    named = {name: tokenizer.piece(number) for name, number in ids.items() if number >= 0}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if tokenizer.is_exact else "LlamaTokenizer",
        "add_bos_token": False,  # the model was trained without
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **({} if tokenizer.is_exact else {"legacy": False, "add_prefix_space": True}),
        **named,
    }
    files = {
        TOKENIZER: tokenizer.model_bytes,
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(named),
    }
    if tokenizer.is_exact:
        files["tokenizer.json"] = _json(tokenizer_json(tokenizer))
    return files


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer that keeps every text, in the format of the tokenizers library."""
    pieces = tokenizer.scored_pieces()
    added = [
        {
            "id": number,
            "content": piece,
            "special": True,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for number, (piece, _) in enumerate(pieces)
        if tokenizer.is_special(number)
    ]
    space, mark = {"String": " "}, {"String": _SPACE_MARK}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": space, "content": _SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": mark, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "byte_fallback": True,
            "vocab": [[piece, score] for piece, score in pieces],
        },
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
