"""Pages of the documentation site that are made from the code: the Python API, every config field,
every command's --help, and the files at the root of the repository.
"""

import dataclasses
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import mkdocs_gen_files

import pldr_jax
from pldr_jax.config import GROUPS

ROOT = Path(__file__).parents[2]
BOUNDS = (("low", "at least"), ("above", "above"), ("high", "at most"))


def api() -> str:
    """The public names, each with its docstring."""
    names = [name for name in pldr_jax.__all__ if not name.startswith("__")]
    blocks = []
    for name in names:
        target = getattr(pldr_jax, name)
        blocks.append(f"::: {target.__module__}.{target.__qualname__}")
    head = "# Python\n\nWhat `import pldr_jax` offers; everything else may change without notice.\n"
    return "\n\n".join([head, *blocks]) + "\n"


def config_fields() -> str:
    """A table for each group."""
    lines = ["# Config fields", "", "Set by gin files and by `--gin.Group.field=VALUE`.", ""]
    for group, cls in GROUPS.items():
        summary = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())
        lines += [f"## {group}", "", summary, "", "| field | default | meaning |", "|---|---|---|"]
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            notes = [
                f"{word} {field.metadata[bound]}"
                for bound, word in BOUNDS
                if field.metadata.get(bound) is not None
            ]
            if typing.get_origin(hints[field.name]) is typing.Literal:
                notes += ["one of " + ", ".join(map(repr, typing.get_args(hints[field.name])))]
            meaning = "; ".join([field.metadata.get("doc", ""), *notes]).replace("|", "\\|")
            default = f"`{field.default!r}`".replace("|", "\\|")
            lines.append(f"| `{group}.{field.name}` | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The --help of each console script; the config fields have a page of their own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = ["# Commands", "", "`train.py` is `pldr-train`, and `infer.py` is `pldr-infer`.", ""]
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        code = f"import {module} as m; m.{function}()"
        printed = subprocess.run(
            [sys.executable, "-c", code, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        printed = printed.partition("config fields, each also a line")[0].rstrip()
        lines += [f"## {name}", "", "```text", printed, "```", ""]
    return "\n".join(lines)


def root_file(name: str) -> str:
    """A file of the repository's root, with its links as they are from about/."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](../\1)", text)
    for other in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG"):
        text = text.replace(f"]({other}.md", f"]({other.lower()}.md")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|\.\./|\w+\.md)[^)]+\)", r"\1", text)


for path, text in {
    "reference/api.md": api(),
    "reference/config.md": config_fields(),
    "reference/commands.md": commands(),
    "about/architecture.md": root_file("ARCHITECTURE.md"),
    "about/contributing.md": root_file("CONTRIBUTING.md"),
    "about/changelog.md": root_file("CHANGELOG.md"),
}.items():
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)
