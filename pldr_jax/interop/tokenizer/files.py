"""The files that transformers reads a tokenizer from, and a check that they give the same ids."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER, TOKENIZER_CONFIG
from pldr_jax.interop.tokenizer.fast import tokenizer_json

FAST = "tokenizer.json"
SETTINGS = TOKENIZER_CONFIG
_OF_OTHER_CLASSES = ("legacy", "add_prefix_space", "use_fast", "sp_model_kwargs", "from_slow")

HOSTILE = (
    "", " ", "  ", "a", " a ", "  two  spaces\n\n\n and lines\n", "\ttab\t", "a\r\nb", "\r",
    "<0x41>", "x<0x41><0xE2>y", "<<0x41>>", "[END]", "a[END]b [START][PAD] [UNK]", "</s><s><unk>",
    "[SEP] x [CLS]", "<|endoftext|>", "\u2581", "a\u2581b", " \u2581 ", "\u2581\u2581\u2581x",
    "na\u00efve caf\u00e9", "cafe\u0301", "\ufb01 \ufb02 \u00bd \u00b2 \u2460 \u2122",
    "\uff26\uff35\uff2c\uff2c", "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\U0001f642\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea", "\u200b\u200d\ufeff",
    "\u00a0x\u3000",     "\x00nul\x01\x1b[31m", "a\u00adb", "0123456789 3.14", "UPPER lower MiXeD", "https://x.y/?a=b#c",
    "def f(x):\n    return x\n", "\u0338\u0301", "\u2028\u2029", "\u05e2\u05d1\u05e8\u05d9\u05ea",
    "a" * 200, " " * 40 + "x" + " " * 40, "\U0010ffff",
)  # fmt: skip
"""Texts on which conversions of tokenizers are known to go wrong."""


@dataclasses.dataclass(frozen=True)
class TokenizerCheck:
    """On how many texts `tokenizer.json` gives the ids of `tokenizer.model`.

    Attributes:
      equal, texts: the numbers; None where the tokenizers library is not installed.
      example: the first text with other ids.
    """

    equal: int | None
    texts: int = len(HOSTILE)
    example: str | None = None

    def line(self) -> str:
        """The figure, for a person; with a warning where ids differ."""
        if self.equal is None:
            return f"{FAST}: not checked; pip install tokenizers to have it checked"
        text = f"{FAST}: the ids of {TOKENIZER} on {self.equal} of {self.texts} hostile strings"
        if self.example is None:
            return text
        return f"{text}\nwarning: the first that has other ids there is {self.example!a}"


def check_tokenizer(tokenizer: Tokenizer, content: bytes) -> TokenizerCheck:
    """Reads `tokenizer.json` with the tokenizers library, and compares ids.

    Raises:
      ConfigError: the library cannot read it.
    """
    try:
        import tokenizers
    except ImportError:
        return TokenizerCheck(None)
    try:
        fast = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{FAST}: the tokenizers library cannot read it ({reason})") from None
    wrong = [text for text in HOSTILE if fast.encode(text).ids != tokenizer.encode(text)]
    return TokenizerCheck(len(HOSTILE) - len(wrong), example=wrong[0] if wrong else None)


def tokenizer_files(
    tokenizer: Tokenizer, context_length: int, source: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Contents by file name.

    Args:
      source: files of the checkpoint that was imported. One that has `tokenizer.json` keeps its
        own; from another one come the settings, such as the side of the padding.
    """
    files = {TOKENIZER: tokenizer.model_bytes}
    if FAST in source:
        return files
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
    }
    named = {name: tokenizer.piece(number) for name, number in ids.items() if number >= 0}
    content = tokenizer_json(tokenizer)
    settings: dict[str, Any] = {
        "add_bos_token": False,  # the model was trained without
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **named,
        **_settings(source),
        "tokenizer_class": "LlamaTokenizer",
    }
    if content is not None:
        files[FAST] = _json(content)
        settings = {k: v for k, v in settings.items() if k not in _OF_OTHER_CLASSES} | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "split_special_tokens": True,  # a text may spell a special piece
        }
    files[SETTINGS] = _json(settings)
    if "special_tokens_map.json" not in source:
        files["special_tokens_map.json"] = _json(named)
    return files


def _settings(source: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        settings = json.loads(source.get(SETTINGS, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
