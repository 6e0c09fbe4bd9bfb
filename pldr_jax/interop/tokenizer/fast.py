"""`tokenizer.json`: a SentencePiece model in the format of the tokenizers library.

It states the whole tokenizer, so that the ids do not depend on how a version of transformers
converts SentencePiece models. Three things are said otherwise than SentencePiece says them:

- A text may spell a piece that stands for no text, such as `[END]` or `<0x41>`. SentencePiece never
  takes it for the piece; the library would. So the text is split inside of such a spelling, at a
  place that no other piece spans.
- Tokenizers that keep every text, as those trained here do, spell a literal U+2581 in bytes. Spaces
  are spaces in their pieces here, which leaves U+2581 without a piece.
- A BPE model has scores of pieces, the library ranks of pairs.
"""

import base64
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from pldr_jax.data.text.tokenizer import Tokenizer

_SPACE_MARK = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE, _WORD, _CHAR = range(1, 5)
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The content of `tokenizer.json`; None for a model of whole words, which has no such form."""
    schema: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = schema.ModelProto.FromString(tokenizer.model_bytes)
    if model.trainer_spec.model_type == _WORD:
        return None
    plain = tokenizer.is_exact
    pieces = [
        piece.piece.replace(_SPACE_MARK, " ") if plain else piece.piece for piece in model.pieces
    ]
    types = [piece.type for piece in model.pieces]
    rules = model.normalizer_spec
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if not plain:
        decoders.insert(0, _replace({"String": _SPACE_MARK}, " "))
    if rules.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unigram = model.trainer_spec.model_type == _UNIGRAM
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # Special pieces are none of these: the library would find them in texts.
        "added_tokens": [] if unigram else _user_defined(pieces, types),
        "normalizer": _normalizer(rules, " " if plain else _SPACE_MARK),
        "pre_tokenizer": _split(pieces, types) if unigram else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model, pieces) if unigram else _bpe(model, pieces, types),
    }


def _unigram(model: Any, pieces: list[str]) -> dict[str, Any]:
    largest = max((p.score for p in model.pieces if p.type == _NORMAL), default=0.0)
    vocab = []
    for piece, stored in zip(pieces, model.pieces, strict=True):
        # SentencePiece's bonus, for which a piece that its user defined is nearly always chosen.
        bonus = float(np.float32(len(piece.encode()) * largest - 0.1))
        vocab.append([piece, bonus if stored.type == _USER_DEFINED else stored.score])
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": vocab,
    }


def _bpe(model: Any, pieces: list[str], types: list[int]) -> dict[str, Any]:
    """Every pair of pieces that joins to a piece, best score first."""
    scores = {p: m.score for p, m in zip(pieces, model.pieces, strict=True) if m.type == _NORMAL}
    merges = []
    if model.trainer_spec.model_type == _BPE:
        for piece in sorted(scores, key=scores.__getitem__, reverse=True):
            cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            merges += [[left, right] for left, right in cuts if left in scores and right in scores]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[types.index(_UNKNOWN)],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: number for number, piece in enumerate(pieces)},
        "merges": merges,
    }


def _normalizer(rules: Any, space: str) -> dict[str, Any] | None:
    """What SentencePiece does first: its map of characters, fewer spaces, a space in front."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": space})
    if space != " ":
        steps.append(_replace({"String": " "}, space))
        if rules.remove_extra_whitespaces:
            steps.append(_replace({"Regex": f"{space}+$"}, ""))
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _split(pieces: list[str], types: list[int]) -> dict[str, Any] | None:
    """Splits a text inside of what is spelled like a piece that no text gives."""
    given = zip(pieces, types, strict=True)
    spoken: set[str] = set()
    silent: set[str] = set()
    for piece, kind in given:
        (spoken if kind in (_NORMAL, _USER_DEFINED) else silent).add(piece)
    pairs = {piece[i : i + 2] for piece in spoken for i in range(len(piece) - 1)}
    spelled_bytes = silent & _BYTES
    heads: dict[str, list[str]] = {}
    if len(spelled_bytes) == len(_BYTES) and "<0" not in pairs:
        heads["<"] = ["0x[0-9A-F]{2}>"]
        silent -= _BYTES
    for piece in sorted(silent):
        if len(piece) > 1:
            free = (i for i in range(1, len(piece)) if piece[i - 1 : i + 1] not in pairs)
            cut = next(free, 1)
            heads.setdefault(piece[:cut], []).append(re.escape(piece[cut:]))
    if not heads:
        return None
    pattern = "|".join(f"{re.escape(head)}(?={'|'.join(tails)})" for head, tails in heads.items())
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }


def _user_defined(pieces: Iterable[str], types: Iterable[int]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "content": piece,
            "special": False,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for number, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind == _USER_DEFINED
    ]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
