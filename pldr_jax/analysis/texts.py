"""Text to rows of tokens: held-out text of a run, or documents from a file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path
from pldr_jax.data.rows import TokenRows, TokenStore, join_rows
from pldr_jax.data.text.tokenizer import Tokenizer

FLAG = "--prompts"
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_KEYS = ("prompt", "text")


def rows_of_file(path: str | Path, tokenizer: Tokenizer, rows: int, length: int) -> np.ndarray:
    """int32 [R,C]: the documents of a file, each with an end token behind it, joined and cut.

    Args:
      path: a document a line: text, or JSONL with "prompt" or "text" where the name ends in .jsonl,
        .json or .ndjson. Blank lines do not count.
      rows: at most this many; 0 takes all that the file gives.
      length: C.

    Raises:
      ConfigError: one line, for a file that cannot be read or gives fewer than two rows.
    """
    tokens: list[int] = []
    documents = 0
    for text in _documents(readable_path(path, FLAG)):
        documents += 1
        tokens += tokenizer.encode(text)
        tokens += [tokenizer.eos_id] * (tokenizer.eos_id >= 0)
        if rows and len(tokens) >= rows * length:
            break
    if not documents:
        raise ConfigError(f"{FLAG}={path}: holds no text; put a document on each line")
    n_rows = min(rows or len(tokens), len(tokens) // length)
    if n_rows < 2:
        raise _too_few(f"{FLAG}={path}", len(tokens), length)
    return np.asarray(tokens[: n_rows * length], np.int32).reshape(n_rows, length)


def rows_of_stores(
    stores: Sequence[TokenStore], rows: int, length: int, where: str, seed: int = 0
) -> np.ndarray:
    """int32 [R,C]: rows of tokenised texts, chosen at random where there are more.

    Args:
      rows: at most this many; 0 takes all.
      where: names the text.

    Raises:
      ConfigError: the texts give fewer than two rows.
    """
    found = join_rows([TokenRows(store, length) for store in stores])
    if len(found) < 2:
        raise _too_few(where, sum(store.n_tokens for store in stores), length)
    order = np.random.default_rng(seed).permutation(len(found))
    return np.stack([found[k] for k in order[: rows or len(found)]])


def _too_few(where: str, n_tokens: int, length: int) -> ConfigError:
    return ConfigError(
        f"{where}: gives {n_tokens} tokens, too few for two rows of {length}; give more text, or "
        f"a --length of at most {n_tokens // 2}"
        if n_tokens >= 4
        else f"{where}: gives {n_tokens} tokens, too few for two rows; give more text"
    )


def _documents(path: Path) -> Iterator[str]:
    """Documents of a file, as they are read."""
    is_json = path.suffix.lower() in _JSON_SUFFIXES
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield (
                        _from_json(line, f"{FLAG}={path}:{number}")
                        if is_json
                        else line.rstrip("\r\n")
                    )
    except OSError as error:
        raise ConfigError(f"{FLAG}={path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{FLAG}={path}: is not UTF-8 text") from None


def _from_json(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigError(f"{where}: is no JSON; give an object with prompt or text") from None
    texts = [row[key] for key in _TEXT_KEYS if key in row] if isinstance(row, dict) else [row]
    if not texts or not isinstance(texts[0], str):
        raise ConfigError(f"{where}: holds no text; give an object with prompt or text")
    return texts[0]
