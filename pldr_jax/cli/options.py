"""The command line: the only place that knows argparse.

Plain options of a program stand beside `--gin_file=PATH` and `--gin.Group.field=VALUE`, which set
the fields of the dataclasses in `pldr_jax/config/`; `pldr_jax/config/load.py` reads their values.
"""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pldr_jax.config import GROUPS, ConfigError, expand_home
from pldr_jax.config.annotations import (
    LONGEST_LINE,
    alternatives,
    choices,
    shorten,
    suggest,
    type_name,
)
from pldr_jax.config.fields import FlagGroup
from pldr_jax.config.gin import format_value, parse_override
from pldr_jax.config.load import FIELDS, summary_line, unknown_field
from pldr_jax.terminal import one_line

Group = typing.TypeVar("Group", bound=FlagGroup)
_WIDTH = 100
_DOC_COLUMN = 63
_SIGNS = (("low", ">="), ("above", ">"), ("high", "<="))

Options = argparse.Namespace
"""A parsed command line: plain options, `gin_files` and `overrides`."""

Fields = Sequence[str]
"""Config fields that a program takes, such as `Mesh` (all of the group) and `Data.cache_dir`."""

_PATHS = ("DIR", "FILE", "OUT", "PATH", "RUN")
"""What stands for a path in help; its value may begin with `~`."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A plain option of a program, such as `--run_dir PATH`.

    `name` is without its dashes, and is the attribute of the result. `repeat` collects the values
    in a list. An option of type bool takes no value. `place` is an argument without a flag, which
    must be given unless it has a default; several stand in their order, and one that repeats takes
    all that are left.
    """

    name: str
    doc: str
    type: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    repeat: bool = False
    choices: Sequence[str] | None = None
    metavar: str | None = None
    place: bool = False


def flags_of(config_class: type[FlagGroup]) -> tuple[Option, ...]:
    """The options that set the fields of a class; a tuple repeats."""
    return tuple(map(_flag, dataclasses.fields(config_class)))  # type: ignore[arg-type]


def _flag(field: dataclasses.Field[Any]) -> Option:
    kinds = [kind for kind in alternatives(field.type) if kind is not type(None)]
    repeat = typing.get_origin(kinds[0]) is tuple
    listed = choices(field.type)
    kind = typing.get_args(kinds[0])[0] if repeat else str if listed else kinds[0]
    return Option(
        field.name,
        field.metadata["doc"],
        kind,
        None if repeat else field.default,
        repeat=repeat,
        choices=listed or None,
        metavar=field.metadata["metavar"],
    )


def settings_of(config_class: type[Group], options: Options) -> Group:
    """The object that the options of `flags_of` describe.

    Raises:
      ConfigError: names the flag that is out of bounds.
    """
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: getattr(options, name) for name in names})


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError
    return value


_integer.__name__ = "int"  # argparse names it in errors


def _path(text: str) -> str:
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and the config fields in its help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shorten(one_line(message), LONGEST_LINE)}\n")

    fields: Fields = ()

    def format_help(self) -> str:
        fields = "\n" + describe_fields(self.fields) if self.fields else ""
        return super().format_help() + fields


def parse_args(
    argv: Sequence[str],
    program: str,
    description: str,
    options: Sequence[Option] = (),
    fields: Fields = tuple(GROUPS),
) -> argparse.Namespace:
    """The command line: an attribute for each option, `gin_files` and `overrides`.

    `argv` is without the program's name. The last two are for `load_config`, which checks the
    values of config fields; a field that is not among `fields` is refused, and not in the help.

    Raises:
        SystemExit: status 0 after printing the help for `--help`; status 2 after one line on
            stderr where a flag is unknown, malformed or missing.
    """
    parser = _parser(program, description, options, fields)
    try:
        plain, overrides = _split_overrides(argv, fields) if fields else (list(argv), [])
    except ConfigError as error:
        parser.error(str(error))
    # Only this one takes flags between the arguments of a place that repeats.
    several = any(option.place and option.repeat for option in options)
    parse = parser.parse_known_intermixed_args if several else parser.parse_known_args
    namespace, unknown = parse(plain)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            parser.error(f"{flag!r} follows no flag; --help lists them")
        known = ["--help", *(f"--{option.name}" for option in options)]
        near = suggest(flag, [*known, "--gin_file"] if fields else known)
        parser.error(f"{flag}: no such flag{near or '; --help lists them'}")
    for option in options:
        if (option.place or option.required) and getattr(namespace, option.name) in (None, []):
            name = option.metavar or option.name if option.place else f"--{option.name}"
            parser.error(f"{name} is required: {option.doc}")
    namespace.overrides = overrides
    return namespace


def _parser(program: str, description: str, options: Sequence[Option], fields: Fields) -> _Parser:
    places = [
        (option.metavar or option.name) + (" ..." if option.repeat else "")
        for option in options
        if option.place
    ]
    gin = ["[--gin_file=PATH ...] [--gin.Group.field=VALUE ...]"] if fields else []
    parser = _Parser(
        program,
        usage=" ".join([program, *places, *gin, "[options]"]),
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=28, width=_WIDTH
        ),
    )
    parser.fields = fields
    if fields:
        parser.add_argument(
            "--gin_file",
            action="append",
            default=[],
            dest="gin_files",
            metavar="PATH",
            type=_path,
            help="config file, or one of the package by its name, as pldr_110m.gin; repeatable, a "
            "later file wins, and --gin.* flags win over files",
        )
    for option in options:
        _add(parser, option)
    return parser


def _add(parser: _Parser, option: Option) -> None:
    """Adds an option to the parser."""
    is_path = option.metavar in _PATHS and option.type is str
    kind = _path if is_path else _integer if option.type is int else option.type
    if option.place:
        # Its absence is an error of `parse_args`, in the words of every other option.
        nargs = "*" if option.repeat else "?"
        parser.add_argument(
            option.name,
            nargs=nargs,
            type=kind,
            default=option.default,
            metavar=option.metavar,
            help=option.doc,
        )
        return
    note = " (required)" if option.required else " (repeatable)" if option.repeat else ""
    if option.default is not None and option.type is not bool:
        note += f" (default {option.default})"
    keywords: dict[str, Any] = {"help": (option.doc + note).replace("%", "%%")}
    if option.type is bool:
        keywords |= {"action": "store_true"}
    else:
        keywords |= {"type": kind, "choices": option.choices, "metavar": option.metavar}
        keywords |= {"action": "append", "default": []} if option.repeat else {}
        keywords.setdefault("default", option.default)
    parser.add_argument(f"--{option.name}", dest=option.name, **keywords)


def _takes(fields: Fields, name: str) -> bool:
    return name in fields or name.partition(".")[0] in fields


def _split_overrides(argv: Sequence[str], fields: Fields) -> tuple[list[str], list[str]]:
    """The arguments that are not `--gin.*`, and the overrides, each `Group.field=value`."""
    plain, overrides = [], []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("--gin."):
            plain.append(argument)
            continue
        text = argument.removeprefix("--gin.")
        key = text.partition("=")[0]
        if "." in key and (problem := unknown_field(key)):
            raise ConfigError(f"--gin.{shorten(key)}: {problem}")
        if "=" not in text:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                shown = shorten(argument)
                raise ConfigError(f"{shown}: needs a value, as in {shown}=VALUE")
            text = f"{key}={value}"
        parse_override(text)
        if "." in key and not _takes(fields, key):
            listed = ", ".join(fields)
            raise ConfigError(
                f"--gin.{shorten(text)}: is read from the checkpoint or a request; here {listed} "
                "can be set"
            )
        overrides.append(text)
    return plain, overrides


def describe_fields(fields: Fields = tuple(GROUPS)) -> str:
    """Config fields as flags: type, default, meaning, bounds and choices, in columns."""
    lines = ["config fields, each also a line of a gin file (Group.field = value):"]
    for group, cls in GROUPS.items():
        listed_fields = [f for f in dataclasses.fields(cls) if _takes(fields, f"{group}.{f.name}")]
        lines += ["", f"{group}: {summary_line(cls)}"] if listed_fields else []
        for field in listed_fields:
            annotation = FIELDS[f"{group}.{field.name}"]
            listed = choices(annotation)
            flag = f"--gin.{group}.{field.name}"
            kind = "choice" if listed else type_name(annotation, brief=True).replace(" or ", "|")
            default = field.default if listed else format_value(field.default)
            head = f"  {flag:<34} {kind:<8} {f'default {default}':<15} "
            notes = [
                f"{sign} {field.metadata[b]}" for b, sign in _SIGNS if field.metadata[b] is not None
            ]
            notes = [note.replace(" ", "\xa0") for note in notes]  # not broken by the wrapping
            notes += [" | ".join(map(str, listed))] if listed else []
            text = field.metadata["doc"] + (f" [{', '.join(notes)}]" if notes else "")
            wrapped = textwrap.wrap(text, _WIDTH - _DOC_COLUMN, break_on_hyphens=False)
            if len(head) > _DOC_COLUMN:
                lines.append(head.rstrip())
                head = ""
            for part in wrapped:
                lines.append(f"{head:<{_DOC_COLUMN}}{part}")
                head = ""
    return "\n".join(lines).replace("\xa0", " ") + "\n"
