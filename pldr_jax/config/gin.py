"""The gin syntax: reading settings from files and flags, and writing values back.

The grammar is the useful part of gin's: `Group.field = value`, `NAME = value` with `%NAME` for
macros, `include 'file'`, comments, and values that continue over lines inside brackets. As in gin,
a macro takes its last value, also where it was used before. The gin library itself is not used: it
is no longer maintained, keeps its bindings in global state that changes how classes are built
anywhere in the program, and accepts values of the wrong type. Nothing here knows which groups
exist; `pldr_jax/cli/options.py` does.
"""

import ast
import dataclasses
import difflib
import os
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pldr_jax.config import ConfigError

_STRING = r"\"(?:\\[^\n]|[^\"\\\n])*\"|'(?:\\[^\n]|[^'\\\n])*'"
_TOKEN = re.compile(rf"(?P<string>{_STRING})|(?P<comment>\#[^\n]*)|(?P<other>.)", re.DOTALL)
_MACRO = re.compile(rf"(?P<string>{_STRING})|%(?P<name>[A-Za-z_]\w*)")
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?")
_ASSIGNMENT = re.compile(rf"(?P<key>{_KEY.pattern})\s*=(?!=)(?P<value>.*)", re.DOTALL)
_INCLUDE = re.compile(rf"include\s*(?P<file>{_STRING})\s*")
_MARK = "_macro_reference_"
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class Macro:
    """A `%NAME` that has not been replaced by its value yet."""

    name: str


@dataclasses.dataclass(frozen=True)
class Binding:
    """One setting: `key` is `Group.field` or a macro's name, `where` the place that messages name.

    `raw` is the text as typed on a command line, where strings may be unquoted; None in a file.
    """

    key: str
    value: object
    where: str
    raw: str | None = None

    def error(self, message: str) -> ConfigError:
        """The one-line error about this setting."""
        place = self.where if self.raw is not None else f"{self.where}: {self.key}"
        return ConfigError(f"{place}: {message}")


def parse_value(text: str) -> object:
    """The number, string, True, False, None, `Macro` (for `%NAME`) or tuple written in `text`.

    Raises:
        ValueError: `text` is anything else.
    """
    marked = _MACRO.sub(
        lambda m: m[0] if m["name"] is None else f" {_MARK}{m['name']} ", text.strip()
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an unknown escape such as '\d' is refused
            return _evaluate(ast.parse(marked.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"cannot read the value {text.strip()!r}") from None


def _evaluate(node: ast.expr) -> object:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.UnaryOp(
            op=ast.USub() | ast.UAdd(), operand=ast.Constant(value=int() | float() as number)
        ):
            if not isinstance(number, bool):
                return -number if isinstance(node.op, ast.USub) else number
        case ast.Tuple() | ast.List():
            return tuple(_evaluate(element) for element in node.elts)
        case ast.Name(id=name) if name.startswith(_MARK):
            return Macro(name.removeprefix(_MARK))
        case ast.Name(id=name):
            constant = (
                name.capitalize() if name.lower() in ("true", "false", "none") else repr(name)
            )
            raise ValueError(f"{name} is not a value; did you mean {constant}?")
    raise ValueError("expected a number, a quoted string, True, False, None or a tuple of these")


def format_value(value: object) -> str:
    """`value` as text that `parse_value` reads back to an equal value of the same type."""
    return repr(value)


def parse_override(text: str) -> Binding:
    """The binding of a `Group.field=value` string, as it stands after `--gin.` on a command line.

    Raises:
        ConfigError: there is no `=`, or no name before it.
    """
    shown = "--gin." + text.replace("\n", "\\n").replace("\r", "\\r")
    key, equals, raw = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{shown}: expected Group.field=value, without a space before '='")
    try:
        value = parse_value(raw)
    except ValueError:
        value = raw
    return Binding(key, value, shown, raw)


def read_file(path: str | Path) -> list[Binding]:
    """The settings of a gin file and of the files it includes, in order; later ones are to win.

    Raises:
        ConfigError: a file is missing, unreadable or malformed, includes itself, or sets a name
            twice.
    """
    return list(_read(os.path.normpath(path), (), ""))


def _read(path: str, including: tuple[str, ...], prefix: str) -> Iterator[Binding]:
    if any(os.path.realpath(path) == os.path.realpath(other) for other in including):
        raise ConfigError(
            f"{prefix}a file cannot include itself: {' -> '.join((*including, path))}"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{prefix or f'{path}: '}no such file{f' {path}' if prefix else ''}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{prefix}{path}: is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{prefix}{path}: cannot be read: {error.strerror}") from None
    lines: dict[str, int] = {}
    for line, statement in _statements(text, path):
        where = f"{path}:{line}"
        if include := _INCLUDE.fullmatch(statement):
            name = parse_checked(include["file"], f"{where}: include")
            target = os.path.normpath(Path(path).parent / str(name))
            yield from _read(target, (*including, path), f"{where}: include {include['file']}: ")
        elif assignment := _ASSIGNMENT.fullmatch(statement):
            key = assignment["key"]
            if key in lines:
                raise ConfigError(f"{where}: {key}: is already set on line {lines[key]}")
            lines[key] = line
            yield Binding(key, parse_checked(assignment["value"], f"{where}: {key}"), where)
        else:
            shown = " ".join(statement.split())
            raise ConfigError(
                f"{where}: expected Group.field = value, NAME = value or include 'file',"
                f" got {shown!r}"
            )


def parse_checked(text: str, where: str) -> object:
    """`parse_value` with the place in the message.

    Raises:
        ConfigError: `text` is not a value.
    """
    try:
        return parse_value(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _statements(text: str, path: str) -> Iterator[tuple[int, str]]:
    """The statements of a file without comments, each with the line on which it starts."""
    line, start, pieces = 1, 1, ""
    open_brackets: list[tuple[str, int]] = []
    for match in _TOKEN.finditer(text + "\n"):
        token = match[0]
        if match["comment"] is not None:
            continue
        if match["string"] is None:
            if token in "\"'":
                raise ConfigError(f"{path}:{line}: a string is not closed on its line")
            if token in _CLOSING:
                open_brackets.append((_CLOSING[token], line))
            elif token in _CLOSING.values() and (
                not open_brackets or open_brackets.pop()[0] != token
            ):
                raise ConfigError(f"{path}:{line}: {token!r} closes nothing")
        if token == "\n":
            line += 1
            if not open_brackets:
                if pieces.strip():
                    yield start, pieces.strip()
                pieces = ""
                continue
        if not pieces.strip():
            start = line
        pieces += token
    if open_brackets:
        closing, opened = open_brackets[-1]
        raise ConfigError(
            f"{path}:{opened}: a bracket is opened here, and its {closing!r} is missing"
        )


def resolve(binding: Binding, macros: Mapping[str, Binding]) -> object:
    """The value of `binding` with every `%NAME` replaced.

    Raises:
        ConfigError: a macro is not defined, or is defined by itself.
    """

    def replace(value: object, user: Binding, trail: tuple[str, ...]) -> object:
        if isinstance(value, tuple):
            return tuple(replace(element, user, trail) for element in value)
        if not isinstance(value, Macro):
            return value
        if value.name in trail:
            raise user.error(
                f"%{value.name} is defined by itself: {' -> '.join((*trail, value.name))}"
            )
        if value.name not in macros:
            raise user.error(
                f"%{value.name} is not defined{suggest(value.name, list(macros), '%')}"
            )
        macro = macros[value.name]
        return replace(macro.value, macro, (*trail, value.name))

    return replace(binding.value, binding, ())


def macros_in(value: object) -> set[str]:
    """Names of the macros that `value` refers to."""
    if isinstance(value, tuple):
        return {name for element in value for name in macros_in(element)}
    return {value.name} if isinstance(value, Macro) else set()


def coerce(value: object, annotation: Any) -> Any:
    """`value` as the annotated type: an int serves as a float, a list as a tuple, nothing else.

    Raises:
        ValueError: the value has another type; the message is `expected int, got 2.5`.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        near = suggest(value, arguments) if isinstance(value, str) else ""
        raise ValueError(f"expected {type_name(annotation)}, got {value!r}{near}")
    if origin in (types.UnionType, typing.Union):
        for argument in arguments:
            try:
                return coerce(value, argument)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, (tuple, list)):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        expected = arguments[:1] * len(value) if repeated else arguments
        if len(expected) == len(value):
            return tuple(
                coerce(element, each) for element, each in zip(value, expected, strict=True)
            )
    elif annotation is float and type(value) in (int, float):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    elif type(value) is annotation:
        return value
    raise ValueError(f"expected {type_name(annotation)}, got {value!r}")


def type_name(annotation: Any) -> str:
    """An annotation in the words of messages: `int`, `int or None`, `tuple[int, ...]`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument) for argument in typing.get_args(annotation))
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(annotation)))}"
    if annotation is types.NoneType:
        return "None"
    return (
        annotation.__name__
        if isinstance(annotation, type) and not typing.get_args(annotation)
        else str(annotation)
    )


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that the Literals of an annotation list."""
    return tuple(
        c
        for a in alternatives(annotation)
        if typing.get_origin(a) is Literal
        for c in typing.get_args(a)
    )


def suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` for the nearest of `known`, or nothing where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        folded = {other.lower(): other for other in known}
        near = [
            folded[m]
            for m in difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
        ]
    return f"; did you mean {prefix}{near[0]}?" if near else ""
