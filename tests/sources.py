"""What the tests of raw text as `Data.source` share: forty documents, opened and read back; and as
a plugin of pytest their folder and an empty cache.
"""

import pathlib
import random

import numpy as np
import pytest
from helpers import WORDS

from pldr_jax.config import DataConfig
from pldr_jax.data.mixture import TrainingText, open_training_text
from pldr_jax.data.shards.prepared import ShardedTokens
from pldr_jax.data.text.tokenizer import Tokenizer

V = 300


def text_of(k: int, words: int = 200) -> str:
    rng = random.Random(k)
    return f"document {k}\n" + " ".join(rng.choices(WORDS, k=words)) + "\n"


@pytest.fixture
def cache_dir(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("PLDR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    root = tmp_path / "text"
    (root / "sub").mkdir(parents=True)
    for k in range(40):
        path = root / ("sub" if k % 2 else "") / f"{k:02d}.txt"
        path.write_text(text_of(k), encoding="utf-8")
    return root


def opened(source: object, vocab_size: int = V, **settings) -> tuple[TrainingText, list[str]]:
    lines: list[str] = []
    config = DataConfig(source=str(source), **settings)
    return open_training_text(config, vocab_size, log=lines.append), lines


def texts_in(tokens: ShardedTokens, tokenizer: Tokenizer) -> list[str]:
    ids = tokens.read(0, tokens.n_tokens)
    assert ids[-1] == tokenizer.eos_id
    return [tokenizer.decode(part) for part in np.split(ids, np.cumsum(tokens.lengths)[:-1])]


def sides(text: TrainingText) -> tuple[list[str], list[str]]:
    """Texts of documents, trained on and held out."""
    (one,) = text.texts
    return texts_in(one.train, text.tokenizer), texts_in(one.validation, text.tokenizer)
