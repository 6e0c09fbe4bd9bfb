"""A SentencePiece tokenizer: trained on any text, or loaded from a model file.

A tokenizer trained here gives back every text exactly: white space and newlines are kept, and what
is not in the vocabulary is spelled in bytes. One loaded from elsewhere follows its own rules (the
published 32,000-piece one normalises: it merges runs of white space and drops newlines).
"""

import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import sentencepiece

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path
from pldr_jax.files import DIGEST, is_as_written, read_regular_file

PAD_PIECE, UNK_PIECE, BOS_PIECE, EOS_PIECE = "[PAD]", "[UNK]", "[START]", "[END]"
SEPARATOR_PIECE = "[SEP]"
TRAINING_BLOCK = 2048
"""Characters in one training sentence: SentencePiece drops sentences that are much longer."""

_CONTEXT_IDS = 8
"""Ids that decide how the next ones are written."""

_SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space; in a text of its own it must be spelled in bytes."""


class Tokenizer:
    """Text to ids and back. Pickles as the model's bytes; the processor is built on first use.

    Attributes:
      model_bytes: the serialised SentencePiece model.
      chat_template: with which conversations are written; None where nothing says.
    """

    def __init__(self, model_bytes: bytes, chat_template: str | None = None) -> None:
        self.model_bytes, self.chat_template = model_bytes, chat_template

    @classmethod
    def from_bytes(cls, model_bytes: bytes) -> "Tokenizer":
        """The tokenizer of a serialised SentencePiece model; a bad one fails on first use."""
        return cls(model_bytes)

    @classmethod
    def load(cls, path: str | pathlib.Path, chat_template: str | None = None) -> "Tokenizer":
        """Reads a SentencePiece model file; ConfigError if it is missing, is not one, or has not
        the digest beside it.
        """
        try:
            name = pathlib.PurePath(path).name
            local = readable_path(path, "Data.tokenizer", (name + DIGEST,))
            content = read_regular_file(local)
            tokenizer, whole = cls(content, chat_template), is_as_written(local, content)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConfigError(
                f"Data.tokenizer = {str(path)!r}: cannot be read ({reason}); name a SentencePiece "
                "model file, or None to train one"
            ) from None
        try:
            _ = tokenizer.vocab_size
        except ConfigError:
            raise ConfigError(
                f"Data.tokenizer = {str(path)!r}: is not a SentencePiece model (damaged, or "
                "another kind of file)"
            ) from None
        if not whole:
            raise ConfigError(
                f"Data.tokenizer = {str(path)!r}: has changed since it was written; put back a "
                f"copy, or remove {name}{DIGEST} where the change was meant"
            )
        return tokenizer

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        allow_whitespace_only_pieces: bool = False,
        character_coverage: float = 0.9995,
        byte_fallback: bool = True,
        split_digits: bool = True,
        control_symbols: Sequence[str] = (),
    ) -> "Tokenizer":
        """Trains a unigram model of exactly `vocab_size` pieces; equal texts give equal bytes.

        Padding, unknown, start and end have the ids 0 to 3.

        allow_whitespace_only_pieces: also learn pieces such as eight spaces, which shortens code.
        character_coverage: share of the characters that get a piece; the rest is spelled in bytes.
        byte_fallback: spell in bytes what has no piece; without it, such text becomes unknown.
        split_digits: every digit is a piece of its own.
        control_symbols: further special pieces, which no text gives; their ids start at 4.
        ConfigError if the text needs more pieces than `vocab_size`, or cannot support as many.
        """
        blocks = [
            text[start : start + TRAINING_BLOCK].replace("\0", " ")
            for text in texts
            for start in range(0, len(text), TRAINING_BLOCK)
        ]
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(blocks),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size,
                byte_fallback=byte_fallback,
                control_symbols=list(control_symbols),
                character_coverage=character_coverage,
                pad_id=0,
                unk_id=1,
                bos_id=2,
                eos_id=3,
                pad_piece=PAD_PIECE,
                unk_piece=UNK_PIECE,
                bos_piece=BOS_PIECE,
                eos_piece=EOS_PIECE,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                split_digits=split_digits,
                allow_whitespace_only_pieces=allow_whitespace_only_pieces,
                max_sentence_length=1 << 16,
                num_threads=1,  # the thread count changes the order of near-equal pieces
                minloglevel=3,
            )
        except RuntimeError as error:
            raise ConfigError(_training_problem(str(error), vocab_size)) from None
        return cls(model.getvalue())

    def save(self, path: str | pathlib.Path) -> None:
        """Writes the SentencePiece model file."""
        pathlib.Path(path).write_bytes(self.model_bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without start and end pieces."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; faster than one by one."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as arrays, int32 [n] and read-only; faster still, as no int is made."""
        # A lone surrogate (an undecodable command line byte) has no UTF-8 form and becomes "?".
        clean = [
            text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
            for text in texts
        ]
        if not (self.is_exact and any(_SPACE_MARK in text for text in clean)):
            return self._ids(clean)
        split = [text.split(_SPACE_MARK) for text in clean]
        ids = iter(self._ids([part for parts in split for part in parts]))
        mark, result = np.asarray(self._space_mark_ids, np.int32), []
        for parts in split:
            row = [next(ids)]
            for _ in parts[1:]:
                row += [mark, next(ids)]
            result.append(np.concatenate(row))
        return result

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text [T], those of `encode`, and the bytes [T,2] of its UTF-8 form that each
        stands for, as first and first after; white space before a word belongs to it. The pieces
        that spell the bytes of a character stand for all of it.
        """
        ids, spans, offset = [], [], 0
        for k, part in enumerate(text.split(_SPACE_MARK) if self.is_exact else [text]):
            if k:
                ids += self._space_mark_ids
                spans += [(offset, offset + 3)] * len(self._space_mark_ids)
                offset += 3
            pieces = self._processor.encode(part, return_type="proto").pieces
            ids += [piece.id for piece in pieces]
            spans += [(offset + piece.begin, offset + piece.end) for piece in pieces]
            offset += len(part.encode("utf-8", "replace"))
        for k in range(len(spans) - 2, -1, -1):
            if spans[k] == (spans[k + 1][0],) * 2:
                spans[k] = spans[k + 1]
        return np.asarray(ids, np.int32), np.asarray(spans, np.int64).reshape(-1, 2)

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        return list(self._processor.encode(texts, num_threads=1, return_type="numpy"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special pieces are left out, an incomplete character becomes U+FFFD."""
        return str(self._processor.decode([int(i) for i in ids]))

    def decode_continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that `ids` add after the ids `before`.

        Alone, `decode` drops the space that a first word begins with in most tokenizers.
        """
        known = list(before[-_CONTEXT_IDS:])
        text, whole = self.decode(known), self.decode([*known, *ids])
        # Not len(text): half a character at the end of `before` is another one with its rest.
        return whole[len(os.path.commonprefix([text, whole])) :]

    def is_byte(self, token: int) -> bool:
        """True for the pieces that spell one byte of what has no piece of its own."""
        return bool(self._processor.is_byte(int(token)))

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of pieces (V)."""
        return int(self._processor.vocab_size())

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id: uint16, or uint32."""
        return id_dtype(self.vocab_size)

    @functools.cached_property
    def pad_id(self) -> int:
        """Id of the padding piece, -1 if the model has none."""
        return int(self._processor.pad_id())

    @functools.cached_property
    def unk_id(self) -> int:
        """Id of the unknown piece."""
        return int(self._processor.unk_id())

    @functools.cached_property
    def bos_id(self) -> int:
        """Id of the start piece, -1 if the model has none."""
        return int(self._processor.bos_id())

    @functools.cached_property
    def eos_id(self) -> int:
        """Id of the end piece, -1 if the model has none."""
        return int(self._processor.eos_id())

    @functools.cached_property
    def separator_id(self) -> int:
        """Id of the piece between two texts: [SEP], or the end piece where there is none."""
        separator = int(self._processor.piece_to_id(SEPARATOR_PIECE))
        return separator if separator != self.unk_id else max(self.eos_id, 0)

    def piece(self, token: int) -> str:
        """The piece of an id, as it is written in the vocabulary."""
        return str(self._processor.id_to_piece(token))

    def id_of(self, piece: str) -> int:
        """The id of a piece of the vocabulary; of any other text, that of the unknown piece."""
        return int(self._processor.piece_to_id(piece))

    @functools.cached_property
    def control_pieces(self) -> tuple[str, ...]:
        """The pieces that no text gives, such as those of padding, start and end."""
        return tuple(self.piece(k) for k in range(self.vocab_size) if self._processor.is_control(k))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the model, in hexadecimal: what a checkpoint records to know its tokenizer."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def __reduce__(self) -> tuple[Callable[[bytes], "Tokenizer"], tuple[bytes]]:
        return type(self).from_bytes, (self.model_bytes,)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, digest={self.digest[:12]})"

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError:
            processor = None
        if processor is None or processor.vocab_size() == 0:
            raise ConfigError("Data.tokenizer: the bytes are not a SentencePiece model")
        return processor

    @functools.cached_property
    def _space_mark_ids(self) -> list[int]:
        pieces = [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode("utf-8")]
        return [int(self._processor.piece_to_id(piece)) for piece in pieces]

    @functools.cached_property
    def is_exact(self) -> bool:
        """True if white space is kept, none is put in front and bytes can be spelled, as in
        tokenizers trained here.
        """
        processor, probe = self._processor, "  a \n b "
        spells_bytes = all(processor.is_byte(i) for i in self._space_mark_ids)
        as_it_is = not processor.encode("a", out_type=str)[0].startswith(_SPACE_MARK)
        return spells_bytes and as_it_is and processor.decode(processor.encode(probe)) == probe


def id_dtype(count: int) -> str:
    """The smallest type that holds ids below `count`."""
    return "uint16" if count <= 1 << 16 else "uint32"


def _training_problem(message: str, vocab_size: int) -> str:
    """SentencePiece's internal message as one line: field, value and remedy."""
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"Model.vocab_size = {vocab_size}: must be at least {found[1]} for this text (256 "
            "bytes, 4 special pieces and its characters)"
        )
    if found := re.search(r"too high .*value <= (\d+)", message):
        return (
            f"Model.vocab_size = {vocab_size}: the text of Data.source supports at most {found[1]} "
            "pieces; lower it, or give more text or a larger Data.tokenizer_sample_bytes"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "Data.source: holds no text to train a tokenizer on; name a folder or file with text"
    reason = " ".join(message.split())[:200]
    return (
        f"Model.vocab_size = {vocab_size}: no tokenizer could be trained on Data.source ({reason})"
    )
