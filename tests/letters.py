"""A small model of letters, and `infer.py` with it in this process."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import pytest
from helpers import run_here

import pldr_jax.api
from pldr_jax.api import LanguageModel
from pldr_jax.cli.infer import infer_main
from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import init_params

CONTEXT = 48
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "
CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    num_residual_layers=1,
    context_length=CONTEXT,
)


class Letters:
    """A tokenizer of one token a letter; `changed` letters are written as something else."""

    eos_id, vocab_size = 63, 64

    def __init__(self, changed: dict[str, str] | None = None) -> None:
        self.changed = changed or {}

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        letters = (LETTERS[i] for i in ids if i != self.eos_id)
        return "".join(self.changed.get(letter, letter) for letter in letters)

    def decode_continuation(self, before: Iterable[int], ids: Iterable[int]) -> str:
        return self.decode(ids)


@functools.cache
def letters_model() -> LanguageModel:
    params = nn.unbox(init_params(CONFIG, jax.random.key(1)))
    # Larger than at the start of a training, so that prompts and G_LM change what is drawn.
    params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)
    return LanguageModel(CONFIG, params, tokenizer=Letters())  # type: ignore[arg-type]


def infer_here(
    capsys: pytest.CaptureFixture[str], model: LanguageModel, *arguments: object
) -> tuple[Any, str, str]:
    """`infer.py` with a model: exit status, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pldr_jax.api, "load", lambda *_, **__: model)
        return run_here(capsys, infer_main, "--checkpoint=none", *arguments)  # type: ignore[return-value]


def jsonl(path: Path, *rows: Any) -> Path:
    """A file with a line of JSON, or of raw text, for each row."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def results(path: Path) -> dict[Any, dict[str, Any]]:
    """By their ids; those of lines that cannot be read by ("line", number)."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    names = [("line", x["line"]) if x["id"] is None else x["id"] for x in found]
    assert len(set(names)) == len(found)
    return dict(zip(names, found, strict=True))
