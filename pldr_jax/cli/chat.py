"""`infer.py --chat`: a conversation in the terminal, or of the lines of a pipe."""

import dataclasses
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pldr_jax.cli.common import FAILURE, keep_compiled_programs, open_model
from pldr_jax.cli.options import Options
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.terminal import is_terminal, print_line

if TYPE_CHECKING:
    from pldr_jax.api import LanguageModel

NEW, ASK = "/new", "> "
_OTHERS = ("prompt", "prompt_file", "output", "resume", "retry_failed", "stream", "logprobs")


def chat(options: Options, config: ExperimentConfig) -> None:
    """Answers every line of stdin, with all that was said before it, until stdin ends.

    What cannot be answered is one line on stderr, and the conversation goes on without it.

    Raises:
      ConfigError: options of other uses of the program.
      SystemExit: status 1 where stdin is no terminal and a message was not answered.
    """
    for name in _OTHERS:
        if getattr(options, name):
            raise ConfigError(f"--{name}: is not for --chat; leave it out")
    if options.format != "text":
        raise ConfigError("--format: is not for --chat, which prints text; leave it out")
    keep_compiled_programs(config.data.cache_dir)
    lm, at_terminal, failed = open_model(options, config), is_terminal(sys.stdin), False
    first = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(first)
    for line in _lines(at_terminal):
        if line.strip() == NEW:
            messages = list(first)
        if not line.strip() or line.strip() == NEW:
            continue
        question = [*messages, {"role": "user", "content": line}]
        try:
            answer = _answer(lm, question, config.generation)
        except ConfigError as error:
            print_line(f"error: {error}", to_stderr=True)
            failed = True
            continue
        messages = [*question, {"role": "assistant", "content": answer}]
    if failed and not at_terminal:
        raise SystemExit(FAILURE)


def _lines(at_terminal: bool) -> Iterator[str]:
    """The lines of stdin, after a sign where somebody types them."""
    from pldr_jax.inference.batch import print_text

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        if at_terminal:
            print_text(ASK)
        line = sys.stdin.readline()
        if not line:
            if at_terminal:
                print_line("")
            return
        yield line.removesuffix("\n").removesuffix("\r")


def _answer(lm: "LanguageModel", messages: list[dict[str, str]], generation: Any) -> str:
    """Prints an answer as it grows.

    Raises:
      ConfigError: there can be none.
    """
    from pldr_jax.data.text.chat import prompt_ids
    from pldr_jax.inference.batch import decode_options, print_text, shared_g_lm, stable_text

    prompt, sampling, shown = prompt_ids(lm.tokenizer, messages), generation.sampling, ""
    request = lm.request(prompt, sampling, generation.truncate == "left")
    g_lm, _ = shared_g_lm(lm, iter(()), generation)
    options = dataclasses.replace(decode_options(generation), steps=1, batch_size=1)
    for _, result in lm.run([request], options, g_lm):
        if result.error is not None:
            raise ConfigError(result.error)
        text = result.text if result.finish_reason else stable_text(result.text, sampling.stop)
        if text.startswith(shown):
            print_text(text[len(shown) :])
            shown = text
    print_text("\n")
    return shown.strip()
