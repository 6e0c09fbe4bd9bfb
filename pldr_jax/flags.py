"""Config files and flags: the only place where text becomes an `ExperimentConfig`, and back.

`--gin_file=PATH` and `--gin.Group.field=VALUE` set the fields of the dataclasses in
`pldr_jax/config.py`; the syntax is that of `pldr_jax/gin.py`, which says why the gin library is not
used. Values are checked against the annotations of the fields; flags win over files, and later
files over earlier ones. Every error is a `ConfigError` of one line.
"""

import argparse
import dataclasses
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pldr_jax.config import GROUPS, ConfigError, ExperimentConfig, group_name
from pldr_jax.gin import (
    Binding,
    Macro,
    alternatives,
    choices,
    coerce,
    format_value,
    macros_in,
    parse_override,
    read_file,
    resolve,
    suggest,
    type_name,
)

_WIDTH = 100
_DOC_COLUMN = 63
_SIGNS = (("low", ">="), ("above", ">"), ("high", "<="))
_VALUE = re.compile(r"""(?:^|(?<=,))((?:"[^"]*"|'[^']*'|[^,])*)""")
_ATTRIBUTES = {group_name(type(f.default)): f.name for f in dataclasses.fields(ExperimentConfig)}
_FIELDS = {
    f"{group}.{name}": annotation
    for group, cls in GROUPS.items()
    for name, annotation in typing.get_type_hints(cls).items()
}
"""`Group.field` -> annotation."""


def _typed(binding: Binding, annotation: Any, macros: Mapping[str, Binding]) -> Any:
    """The value of a binding for a field; text of a command line may be an unquoted string."""
    optional = types.NoneType in alternatives(annotation)
    takes_text = any(
        c is str or isinstance(c, str) for c in alternatives(annotation) + choices(annotation)
    )
    if binding.raw is not None and takes_text and not isinstance(binding.value, (str, Macro)):
        if binding.value is not None or not optional:
            binding = dataclasses.replace(binding, value=binding.raw)
    try:
        return coerce(resolve(binding, macros), annotation)
    except ConfigError:
        raise
    except ValueError as error:
        raise binding.error(str(error)) from None


def _unknown(key: str) -> str | None:
    """What is wrong with `Group.field`, or None where there is such a field."""
    group, _, name = key.partition(".")
    if key in _FIELDS:
        return None
    if group not in GROUPS:
        hint = suggest(group, list(GROUPS)) or f"; the groups are {', '.join(GROUPS)}"
        return f"no such group{hint}"
    return f"no such field{_same_field(name) or suggest(key, _in_group(group))}"


def _in_group(group: str) -> list[str]:
    return [key for key in _FIELDS if key.startswith(f"{group}.")]


def _same_field(name: str) -> str:
    """The suggestion of a field `name` of any group; empty where there is none."""
    same = [key for key in _FIELDS if key.endswith(f".{name}")]
    return f"; did you mean {same[0]}?" if same else ""


def load_config(
    gin_files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    base: ExperimentConfig | None = None,
) -> ExperimentConfig:
    """What `gin_files`, then `overrides` ("Model.num_layers=5"), make of `base` or the defaults.

    Raises:
        ConfigError: a file cannot be read, a name is unknown, or a value has the wrong type or is
            out of bounds; the message starts with the file and line, or the flag, that set it.
    """
    bindings = [binding for path in gin_files for binding in read_file(path)]
    bindings += [parse_override(text) for text in overrides]
    settings = [binding for binding in bindings if "." in binding.key]
    for binding in settings:
        if problem := _unknown(binding.key):
            raise binding.error(problem)
    macros = {binding.key: binding for binding in bindings if "." not in binding.key}
    groups: dict[str, dict[str, Any]] = {}
    for binding in settings:  # each is checked, also one that a later one replaces
        group, _, name = binding.key.partition(".")
        groups.setdefault(group, {})[name] = _typed(binding, _FIELDS[binding.key], macros)
    used = {name for binding in bindings for name in macros_in(binding.value)}
    for name, binding in macros.items():
        if name not in used:
            hint = _same_field(name) or suggest(name, sorted(used), "%")
            raise binding.error(f"nothing uses %{name}{hint}")
    return _build(base or ExperimentConfig(), groups, {b.key: b.where for b in settings})


def parse_values(text: str, flag: str) -> tuple[str, tuple[str, ...]]:
    """`Group.field=A,B` -> the field and its values, as texts for `load_config`; a value with a
    comma in it is quoted.

    Raises:
        ConfigError: there is no such field, or no value.
    """
    key, equals, values = text.partition("=")
    shown = f"{flag} {text}"
    if not equals or "." not in key:
        raise ConfigError(f"{shown}: expected Group.field=A,B,...")
    if problem := _unknown(key):
        raise ConfigError(f"{shown}: {problem}")
    parts = tuple(part.strip() for part in _VALUE.findall(values))
    if not all(parts):
        raise ConfigError(f"{shown}: a value is missing")
    return key, parts


def _build(
    base: ExperimentConfig, groups: Mapping[str, Mapping[str, Any]], places: Mapping[str, str]
) -> ExperimentConfig:
    """`base` with typed values replaced; a validation error names the place that set the field."""
    try:
        changed = {
            _ATTRIBUTES[g]: dataclasses.replace(getattr(base, _ATTRIBUTES[g]), **v)
            for g, v in groups.items()
        }
        return dataclasses.replace(base, **changed)
    except ConfigError as error:
        named = re.match(r"(\w+\.\w+) = ", str(error))
        place = places.get(named[1]) if named else None
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None


def dump_config(config: ExperimentConfig) -> str:
    """The config as gin text that states every field; `load_config` reads an equal one back."""
    blocks = []
    for group, attribute in _ATTRIBUTES.items():
        lines = [f"# {group}: {_summary(GROUPS[group])}"]
        for field in dataclasses.fields(GROUPS[group]):
            value = format_value(getattr(getattr(config, attribute), field.name))
            setting = f"{group}.{field.name} = {value}"
            lines.append(f"{setting:<44}  # {field.metadata['doc']}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def config_to_dict(config: ExperimentConfig) -> dict[str, dict[str, Any]]:
    """The config as plain values, `{"Model": {"num_layers": 5, ...}, ...}`, which JSON can hold."""
    return {
        group: dataclasses.asdict(getattr(config, attribute))
        for group, attribute in _ATTRIBUTES.items()
    }


def config_from_dict(
    data: Mapping[str, Mapping[str, Any]], source: str = "config"
) -> ExperimentConfig:
    """The config that `config_to_dict` made `data` of; a missing key takes its default.

    `source` says in messages where the data came from, for example a checkpoint's path.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of bounds.
    """
    groups: dict[str, dict[str, Any]] = {}
    for group, values in data.items():
        if group not in GROUPS:
            raise ConfigError(f"{source}: {group}: {_unknown(group)}")
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{source}: {group}: expected the fields of the group, got {values!r}"
            )
        for name, value in values.items():
            key = f"{group}.{name}"
            if problem := _unknown(key):
                raise ConfigError(f"{source}: {key}: {problem}")
            try:
                groups.setdefault(group, {})[name] = coerce(value, _FIELDS[key])
            except ValueError as error:
                raise ConfigError(f"{source}: {key}: {error}") from None
    places = {f"{group}.{name}": source for group, values in groups.items() for name in values}
    return _build(ExperimentConfig(), groups, places)


def describe_differences(
    before: ExperimentConfig, after: ExperimentConfig, groups: Sequence[str] = tuple(GROUPS)
) -> list[str]:
    """`Model.num_layers: 3 -> 5` for each field of `groups` that differs."""
    old, new = config_to_dict(before), config_to_dict(after)
    return [
        f"{group}.{name}: {format_value(value)} -> {format_value(new[group][name])}"
        for group in groups
        for name, value in old[group].items()
        if value != new[group][name]
    ]


Options = argparse.Namespace
"""A parsed command line: plain options, `gin_files` and `overrides`."""


@dataclasses.dataclass(frozen=True)
class Option:
    """A plain option of a program, such as `--run_dir PATH`.

    `name` is without its dashes, and is the attribute of the result. `repeat` collects the values
    in a list. An option of type bool takes no value. `place` is an argument without a flag, which
    must be given; several stand in their order, and one that repeats takes all that are left.
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


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and the config fields in its help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    fields = True

    def format_help(self) -> str:
        fields = "\n" + describe_fields() if self.fields else ""
        return super().format_help() + fields


def parse_args(
    argv: Sequence[str],
    program: str,
    description: str,
    options: Sequence[Option] = (),
    fields: bool = True,
) -> argparse.Namespace:
    """The command line: an attribute for each option, `gin_files` and `overrides`.

    `argv` is without the program's name. The last two are for `load_config`, which checks the
    values of config fields; `fields` False is a program that takes none.

    Raises:
        SystemExit: status 0 after printing the help for `--help`; status 2 after one line on
            stderr where a flag is unknown, malformed or missing.
    """
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
            help="config file; repeatable, a later file wins, and --gin.* flags win over files",
        )
    for option in options:
        if option.place:
            # Its absence is reported below, in the words of every other option.
            nargs = "*" if option.repeat else "?"
            parser.add_argument(
                option.name, nargs=nargs, type=option.type, metavar=option.metavar, help=option.doc
            )
            continue
        note = " (required)" if option.required else " (repeatable)" if option.repeat else ""
        if option.default is not None and option.type is not bool:
            note += f" (default {option.default})"
        keywords: dict[str, Any] = {"help": (option.doc + note).replace("%", "%%")}
        if option.type is bool:
            keywords |= {"action": "store_true"}
        else:
            keywords |= {"type": option.type, "choices": option.choices, "default": option.default}
            keywords |= {"metavar": option.metavar}
            keywords |= {"action": "append", "default": []} if option.repeat else {}
        parser.add_argument(f"--{option.name}", dest=option.name, **keywords)
    try:
        plain, overrides = _split_overrides(argv) if fields else (list(argv), [])
    except ConfigError as error:
        parser.error(str(error))
    # Only this one takes flags between the arguments of a place that repeats.
    several = any(option.place and option.repeat for option in options)
    parse = parser.parse_known_intermixed_args if several else parser.parse_known_args
    namespace, unknown = parse(plain)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [
            *(["--gin_file"] if fields else []),
            "--help",
            *(f"--{option.name}" for option in options),
        ]
        parser.error(
            f"{flag}: no such flag{suggest(flag, known)}"
            if flag.startswith("-")
            else f"{flag!r} follows no flag"
        )
    for option in options:
        if option.place and getattr(namespace, option.name) in (None, []):
            parser.error(f"{option.metavar or option.name} is required: {option.doc}")
        if option.required and getattr(namespace, option.name) in (None, []):
            parser.error(f"--{option.name} is required: {option.doc}")
    namespace.overrides = overrides
    return namespace


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are not `--gin.*`, and the overrides, each `Group.field=value`."""
    plain, overrides = [], []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("--gin."):
            plain.append(argument)
            continue
        text = argument.removeprefix("--gin.")
        key = text.partition("=")[0]
        if "." in key and (problem := _unknown(key)):
            raise ConfigError(f"--gin.{key}: {problem}")
        if "=" not in text:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{argument}: needs a value, as in {argument}=VALUE")
            text = f"{key}={value}"
        parse_override(text)
        overrides.append(text)
    return plain, overrides


def describe_fields() -> str:
    """Every config field as a flag: type, default, meaning, bounds and choices, in columns."""
    lines = ["config fields, each also a line of a gin file (Group.field = value):"]
    for group, cls in GROUPS.items():
        lines += ["", f"{group}: {_summary(cls)}"]
        for field in dataclasses.fields(cls):
            annotation = _FIELDS[f"{group}.{field.name}"]
            listed = choices(annotation)
            flag = f"--gin.{group}.{field.name}"
            kind = "choice" if listed else type_name(annotation).replace(" or ", "|")
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


def _summary(cls: type) -> str:
    """The first line of a group's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]
