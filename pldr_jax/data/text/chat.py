"""Conversations as text: chat templates, and which of the tokens are the answers.

A template is Jinja, as transformers keeps it in `tokenizer_config.json`. It is run in a sandbox
that changes nothing it is given, and without a loader, so that it can read no file. What a
template writes of the special pieces becomes those pieces; what a message spells of them stays
text.

A conversation with several answers gives one pair of prompt and answer for each, whose prompt is
all that came before it: what decoding reads when it is asked for that answer.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.config.annotations import show
from pldr_jax.copies import readable_path
from pldr_jax.data.text.tokenizer import BOS_PIECE, EOS_PIECE, PAD_PIECE, UNK_PIECE, Tokenizer
from pldr_jax.files import TOKENIZER_CONFIG, read_regular_file

DEFAULT_TEMPLATE = (
    r"{% for message in messages %}{{ '' if loop.first else '\n\n' }}"
    r"{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}{% endfor %}"
    r"{{ '\n\n### Assistant:\n' if add_generation_prompt else '' }}"
)
"""Where no template is named. It needs no special piece, so that every tokenizer can write it."""

_JINJA = "chat_template.jinja"
_GUARD = "\0"
"""Stands in what a message spells of a special piece, until the text is tokenised."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant", "content": TEXT}."""
Pair = tuple[str, str]
"""Texts of a prompt and of its answer, in which special pieces are spelled."""


class ChatError(ConfigError):
    """A conversation that cannot be written; `kind` is one of `readers.PROBLEMS`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason if kind == "roles" else f"the chat template: {reason}")
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """How conversations become text, and that text tokens.

    Attributes:
      template: Jinja.
      bos_token, eos_token, pad_token, unk_token: pieces that the template can name.
      special: every piece that stands for itself where a template writes it.
    """

    template: str = DEFAULT_TEMPLATE
    bos_token: str = BOS_PIECE
    eos_token: str = EOS_PIECE
    pad_token: str = PAD_PIECE
    unk_token: str = UNK_PIECE
    special: tuple[str, ...] = (BOS_PIECE, EOS_PIECE, PAD_PIECE)

    @classmethod
    def of(cls, template: str | None, tokenizer: Tokenizer | None) -> "ChatFormat":
        """The format of a tokenizer; None is one that will be trained here. A template of None is
        the default one.
        """
        template = DEFAULT_TEMPLATE if template is None else template
        if tokenizer is None:
            return cls(template)
        ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id)
        bos, eos, pad, unk = ("" if number < 0 else tokenizer.piece(number) for number in ids)
        return cls(template, bos, eos, pad, unk, tokenizer.control_pieces)

    def pairs(self, row: Mapping[str, Any]) -> tuple[Pair, ...]:
        """Prompts and answers of a row of JSONL: one of each, written as they are, or one of each
        for every answer of its messages.

        Raises:
          ChatError: fields of another type, messages out of order, or a template that fails.
        """
        if "messages" not in row:
            pair = row["prompt"], row["completion"]
            if not all(isinstance(text, str) for text in pair):
                raise ChatError("roles", "prompt and completion must be strings")
            return ((self._guarded(pair[0]), self._guarded(pair[1])),)
        messages = row["messages"]
        check_messages(messages, last="assistant")
        pairs = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, whole = self.prompt(messages[:k]), self._render(messages[: k + 1], False)
            if not whole.startswith(prompt):
                raise ChatError("template", f"message {k + 1} does not continue what is before it")
            pairs.append((prompt, whole[len(prompt) :]))
        return tuple(pairs)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the next answer follows.

        Raises:
          ChatError: the template fails.
        """
        return self._render(messages, True)

    def encode_pair(self, tokenizer: Tokenizer, pair: Pair) -> tuple[list[int], list[int]]:
        """Ids of a prompt, as decoding reads it, and of its answer up to the end piece, which is
        added where the template does not write it.
        """
        prompt, answer = pair
        before, both = self.encode(tokenizer, prompt), self.encode(tokenizer, prompt + answer)
        joined = both[: len(before)] == before
        after = both[len(before) :] if joined else self.encode(tokenizer, answer)
        if tokenizer.eos_id in after:
            after = after[: after.index(tokenizer.eos_id)]
        return before, [*after, tokenizer.eos_id]

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of a text that this format has written."""
        parts = re.split(f"({self._pattern})", text) if self.special else [text]
        ids: list[int] = []
        for k, part in enumerate(parts):
            if k % 2:
                ids.append(tokenizer.id_of(part))
            elif part:
                ids += tokenizer.encode(part.replace(_GUARD, ""))
        return ids

    @property
    def _pattern(self) -> str:
        return "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))

    def _guarded(self, text: str) -> str:
        text = text.replace(_GUARD, "")
        if not self.special:
            return text
        return re.sub(self._pattern, lambda match: match[0][0] + _GUARD + match[0][1:], text)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        escaped = [{"role": m["role"], "content": self._guarded(m["content"])} for m in messages]
        pieces = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: getattr(self, name) for name in pieces}
        template = compiled(self.template)
        try:
            return str(
                template.render(
                    messages=escaped, add_generation_prompt=add_generation_prompt, **special
                )
            )
        except Exception as error:
            raise ChatError("template", " ".join(str(error).split())[:200]) from None


def check_messages(messages: Any, last: str) -> None:
    """Messages must be a system message or none, then user and assistant in turn.

    Args:
      last: whose the last message must be.

    Raises:
      ChatError: they are not.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ChatError("roles", "messages must be a list of {'role': ..., 'content': ...}")
    wanted = "user"
    for k, message in enumerate(messages):
        fields = message if isinstance(message, Mapping) else {}
        role = fields.get("role")
        if not isinstance(role, str) or not isinstance(fields.get("content"), str):
            raise ChatError(
                "roles", f"message {k + 1} must have a role and a content, both strings"
            )
        if k == 0 and role == "system":
            continue
        if role != wanted:
            raise ChatError("roles", f"message {k + 1} is of {show(role)}, expected {wanted!r}")
        wanted = "user" if wanted == "assistant" else "assistant"
    if messages[-1]["role"] != last:
        raise ChatError("roles", f"the last message is of {messages[-1]['role']!r}, not {last!r}")


def prompt_ids(tokenizer: Tokenizer | None, messages: Sequence[Message]) -> list[int]:
    """Token ids that the next answer of a conversation follows.

    Raises:
      ConfigError: there is no tokenizer, messages are out of order, or the template fails.
    """
    if tokenizer is None:
        raise ConfigError("messages: this checkpoint has no tokenizer")
    check_messages(messages, last="user")
    chat = ChatFormat.of(tokenizer.chat_template, tokenizer)
    return chat.encode(tokenizer, chat.prompt(messages))


def is_conversation(row: Any) -> bool:
    """Whether a row of JSONL has the fields of a conversation."""
    return isinstance(row, dict) and ("messages" in row or {"prompt", "completion"} <= row.keys())


@functools.lru_cache(16)
def compiled(template: str) -> Any:
    """A template, ready to run; ConfigError, naming the line, where it is no Jinja."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(f"the chat template: line {line}: {error.message}") from None


def template_in(folder: Path) -> str | None:
    """The chat template of a folder with a tokenizer, a run folder or one in the transformers
    layout; None where it has none.
    """
    for place in (folder, folder / "transformers" / "source"):
        try:
            if (place / _JINJA).is_file():  # which transformers reads first, too
                return read_regular_file(place / _JINJA).decode()
            settings = json.loads(read_regular_file(place / TOKENIZER_CONFIG))
        except (OSError, ValueError, RecursionError):
            continue
        template = settings.get("chat_template") if isinstance(settings, dict) else None
        if isinstance(template, list):  # several by name, as some tokenizers have them
            templates = {
                one.get("name"): one.get("template") for one in template if isinstance(one, dict)
            }
            template = templates.get("default")
        if isinstance(template, str):
            return template
    return None


def find_template(path: str | None, tokenizer: str | None) -> str:
    """The template of a file, or the one beside a tokenizer, or the default one.

    Raises:
      ConfigError: the file cannot be read, or what is found is no template.
    """
    where = f"Data.chat_template = {path!r}"
    if path is None:
        found, beside = None, (TOKENIZER_CONFIG, _JINJA)
        if tokenizer:
            found = template_in(readable_path(tokenizer, "Data.tokenizer", beside).parent)
        template, where = found or DEFAULT_TEMPLATE, f"{tokenizer}"
    else:
        try:
            template = read_regular_file(readable_path(path, "Data.chat_template")).decode()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: is not UTF-8") from None
    try:
        compiled(template)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return template


def template_file(template: str) -> bytes:
    """`tokenizer_config.json` of a run folder: the template, where transformers looks for it."""
    return (json.dumps({"chat_template": template}, indent=1, ensure_ascii=False) + "\n").encode()
