"""Every command line of the README and the guides is one that its program takes."""

import importlib
import itertools
import re
import shlex
from typing import Any

import pytest
from helpers import REPOSITORY

from pldr_jax.config.load import load_config

PROGRAMS = {
    "train.py": ("training.train", "train_main"),
    "infer.py": ("infer", "infer_main"),
    "pldr-freeze": ("freeze", "freeze_main"),
    "pldr-convert": ("convert", "convert_main"),
    "pldr-data": ("data", "data_main"),
    "pldr-eval": ("evaluate", "evaluate_main"),
    "pldr-analyze": ("analyze", "analyze_main"),
    "pldr-verify": ("verify", "verify_main"),
    "pldr-serve": ("serve", "serve_main"),
}
COMMAND = re.compile(rf"(?:^|\s|bin/)({'|'.join(map(re.escape, PROGRAMS))})(?=\s)(.*)")


def words(text: str) -> list[str]:
    """The arguments of a command, up to the next one of its line; places to fill in are 0."""
    text = re.sub(r"\\?\$[A-Z_]+\b|\$?\bI\b", "0", text.replace("$SWEEP", ""))
    if text.count('"') % 2:  # inside the quotes of another command
        text = text.rpartition('"')[0]
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    return list(itertools.takewhile(lambda word: not set(word) <= set(";&|<>"), lexer))


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, program and arguments."""
    found = []
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                command = COMMAND.search(line)
                if command and "gcloud" not in line and "[-" not in line:
                    found.append((page.stem, command[1], words(command[2])))
    return found


class Parsed(Exception):
    """The command line was read."""


@pytest.mark.parametrize(
    ("page", "program", "arguments"),
    commands(),
    ids=lambda value: value if isinstance(value, str) else "...",
)
def test_a_command_of_the_guides_is_understood(
    page: str, program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module_name, main = PROGRAMS[program]
    module = importlib.import_module(f"pldr_jax.cli.{module_name}")
    parse = module.parse_args

    def parse_only(*args: Any, **kwargs: Any) -> Any:
        options = parse(*args, **kwargs)
        load_config(getattr(options, "gin_files", ()), options.overrides)
        raise Parsed

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(module, "parse_args", parse_only)
    with pytest.raises(Parsed):
        getattr(module, main)(arguments)
