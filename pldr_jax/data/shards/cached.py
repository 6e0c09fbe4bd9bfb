"""Raw text of `Data.source`: prepared once into the cache folder, by the build of `pldr-data`.

An entry of the cache is a prepared folder, named after a digest of all that its tokens depend on:
the contents of the files, wherever they lie, the tokenizer and the held-out share.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Sequence

import sentencepiece

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data.shards.build import BuildSettings, Log, build_in, work_folder
from pldr_jax.data.shards.prepared import Manifest, read_prepared
from pldr_jax.data.shards.records import RECORD_TOKENS, DataError, forget_records
from pldr_jax.data.shards.units import Problems, UnitSettings, documents_of, hash_of
from pldr_jax.data.text.inputs import Piece, Unit, compression, find_inputs
from pldr_jax.data.text.readers import ReadSettings, with_chat
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.data.text.vocabulary import take_sample
from pldr_jax.files import cache_folder

_FORMAT = 3
"""Part of the name of an entry: raised whenever the same settings would give other tokens."""
_ABANDONED_AFTER = 7 * 24 * 3600.0
"""Seconds after which unfinished work is taken for that of a run that nobody will continue."""


def cached_text(config: DataConfig, vocab_size: int, log: Log = print) -> Manifest:
    """The prepared text of `Data.source`, from the cache where it is there and whole.

    Args:
      vocab_size: Model.vocab_size; a new tokenizer gets as many pieces, a loaded one must have
        them.
      log: takes each line of progress and notes.

    Raises:
      ConfigError: whatever the user can put right.
    """
    tokenizer = None if config.tokenizer is None else _load_tokenizer(config.tokenizer, vocab_size)
    pieces = find_inputs([config.source])
    for piece in pieces:
        if piece.kind == "hub":
            config.fail("source", "is streamed: prepare it with pldr-data build, and take that")
        if piece.kind == "unreadable":
            config.fail("source", f"{piece.path!r} cannot be read ({piece.reason})")
    settings = _settings(pieces, config, tokenizer)
    trained = [vocab_size, config.tokenizer_sample_bytes, sentencepiece.__version__]
    key = {
        "format": [_FORMAT, RECORD_TOKENS, settings.units.read.block_bytes],
        "text": [_content_of(piece, config) for piece in pieces if piece.kind != "special"],
        "validation_fraction": config.validation_fraction,
        "tokenizer": trained if tokenizer is None else tokenizer.digest,
    }
    if (chat := settings.units.read.chat) is not None:
        key["chat"] = dataclasses.asdict(chat)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    entry = cache_folder(config.cache_dir) / digest[:32]
    if manifest := _whole_entry(entry):
        return manifest
    _remove_abandoned(entry.parent)
    with work_folder(entry, "Data.cache_dir", wait=True) as work:
        if manifest := _whole_entry(entry):  # another run has been faster
            return manifest
        if entry.exists():
            log(f"tokenised text in {entry} is damaged and is made again")
            shutil.rmtree(entry)
            forget_records()
        units = settings.plan(pieces)
        settings = _with_both_sides(settings, units, config)
        if tokenizer is None:
            tokenizer = _train_tokenizer(units, settings.units, config, vocab_size, log)
        manifest = build_in(work, pieces, tokenizer, entry, settings, [digest], log)
    for split in ("train", "validation"):
        counts = (manifest.count(split, f"n_{what}") for what in ("documents", "tokens"))
        log("{}: {:,} documents, {:,} tokens".format(split, *counts))
    return manifest


def _load_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"Model.vocab_size = {vocab_size}: the tokenizer Data.tokenizer = {path!r} has "
            f"{tokenizer.vocab_size} pieces; set Model.vocab_size = {tokenizer.vocab_size}"
        )
    return tokenizer


def _settings(
    pieces: Sequence[Piece], config: DataConfig, tokenizer: Tokenizer | None
) -> BuildSettings:
    """Text files are cut into blocks, a single one into some 64, so that some can be held out."""
    block_bytes = ReadSettings.block_bytes
    if len(pieces) == 1:
        block_bytes = min(max(256, pieces[0].size // 64), block_bytes)
    read = ReadSettings(documents="block", block_bytes=block_bytes)
    read = with_chat(read, pieces, config.chat_template, config.tokenizer, tokenizer)
    return BuildSettings(UnitSettings(read, config.validation_fraction))


def _content_of(piece: Piece, config: DataConfig) -> list[str]:
    try:
        with open(piece.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        config.fail("source", f"{piece.path!r} cannot be read ({error.strerror})")
    return [piece.kind, compression(piece.path), digest]


def _whole_entry(entry: pathlib.Path) -> Manifest | None:
    """The text of a cache entry; None if it is missing or damaged."""
    try:
        manifest = read_prepared(entry)
        manifest.check_files()
    except (ConfigError, DataError, OSError):
        return None
    return manifest


def _with_both_sides(
    settings: BuildSettings, units: Sequence[Unit], config: DataConfig
) -> BuildSettings:
    """The settings, with another held-out share where that of the config would leave no document to
    hold out, or none to train on.
    """
    fraction, hashes = config.validation_fraction, set()
    is_held_out = set()
    for unit in units:
        for document in documents_of(unit, settings.units, Problems()):
            value = hash_of(document.text)
            hashes.add(value)
            is_held_out.add(value < fraction)
            if len(is_held_out) == 2:
                return settings
    if len(hashes) < 2:
        config.fail(
            "source",
            f"holds {len(hashes)} document(s) with text, too few to hold one out for validation; "
            "give more text",
        )
    ordered = sorted(hashes)
    low, high = ordered[:2] if ordered[0] >= fraction else ordered[-2:]
    changed = dataclasses.replace(settings.units, validation_fraction=(low + high) / 2)
    return dataclasses.replace(settings, units=changed)


def _train_tokenizer(
    units: Sequence[Unit], settings: UnitSettings, config: DataConfig, vocab_size: int, log: Log
) -> Tokenizer:
    start = time.monotonic()
    sample = take_sample(units, settings, config.tokenizer_sample_bytes)
    tokenizer = Tokenizer.train(sample.training, vocab_size)
    n_bytes = sum(len(text.encode()) for text in sample.training)
    seconds = time.monotonic() - start
    log(f"trained a tokenizer of {vocab_size} pieces on {n_bytes:,} bytes in {seconds:.1f} s")
    return tokenizer


def _remove_abandoned(folder: pathlib.Path) -> None:
    for work in folder.glob("*.building"):
        with contextlib.suppress(OSError):  # another run has removed it
            if time.time() - work.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(work, ignore_errors=True)
