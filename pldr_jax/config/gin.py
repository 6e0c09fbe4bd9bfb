"""The gin syntax: reading settings from files and flags, and writing values back.

The grammar is the useful part of gin's: `Group.field = value`, `NAME = value` with `%NAME` for
macros, `include 'file'`, comments, and values that continue over lines inside brackets. As in gin,
a macro takes its last value, also where it was used before. The gin library itself is not used: it
is no longer maintained, keeps its bindings in global state that changes how classes are built
anywhere in the program, and accepts values of the wrong type. Nothing here knows which groups
exist; `pldr_jax/config/load.py` does. What a file holds is shown in messages only where it sets a
known field, so that a file named by mistake gives nothing away.
"""

import ast
import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pldr_jax.config.annotations import shorten, show, suggest
from pldr_jax.config.fields import ConfigError, expand_home
from pldr_jax.config.reading import read_small_file

_STRING = r"\"(?:\\[^\n]|[^\"\\\n])*\"|'(?:\\[^\n]|[^'\\\n])*'"
_TOKEN = re.compile(rf"(?P<string>{_STRING})|(?P<comment>\#[^\n]*)|(?P<other>.)", re.DOTALL)
_MACRO = re.compile(rf"(?P<string>{_STRING})|%(?P<name>[A-Za-z_]\w*)")
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?")
_ASSIGNMENT = re.compile(rf"(?P<key>{_KEY.pattern})\s*=(?!=)(?P<value>.*)", re.DOTALL)
_INCLUDE = re.compile(rf"include\s*(?P<file>{_STRING})\s*")
_MARK = "_macro_reference_"
_CLOSING = {"(": ")", "[": "]", "{": "}"}
PACKAGED = Path(__file__).parents[1] / "configs"
"""The configs of the published runs, found by their names from any folder."""
_MOST_FILES, _DEEPEST, _MOST_ELEMENTS = 100, 100, 100_000
"""Files that includes may read, macros that one value may lead through, and its elements."""


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
        place = self.where if self.raw is not None else f"{self.where}: {shorten(self.key)}"
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
        raise ValueError(f"cannot read the value {show(text.strip())}") from None


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
            word = name.capitalize() if name.lower() in ("true", "false", "none") else show(name)
            raise ValueError(f"{name[:80]} is not a value; did you mean {word}?")
    raise ValueError("expected a number, a quoted string, True, False, None or a tuple of these")


def format_value(value: object) -> str:
    """`value` as text that `parse_value` reads back to an equal value of the same type."""
    return repr(value)


def parse_override(text: str) -> Binding:
    """The binding of a `Group.field=value` string, as it stands after `--gin.` on a command line.

    Raises:
        ConfigError: there is no `=`, or no name before it.
    """
    shown = "--gin." + shorten(text)
    key, equals, raw = text.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"{shown}: expected Group.field=value, without a space before '='")
    try:
        value = parse_value(raw)
    except ValueError:
        value = raw
    return Binding(key, value, shown, raw)


def read_file(
    path: str | Path, problem: Callable[[str], str | None] = lambda key: None
) -> list[Binding]:
    """The settings of a gin file and of the files it includes, in order; later ones are to win.

    Args:
        path: of a file, or the name of a config that the package has, such as "pldr_110m.gin".
        problem: what is wrong with a name `Group.field`, None if nothing is.

    Raises:
        ConfigError: a file is missing, unreadable or malformed, includes itself, or sets a name
            twice.
    """
    name = str(path)
    found = _find(name, _home(name, shorten(name)))
    try:
        os.lstat(found)
    except FileNotFoundError:
        if os.path.basename(name) == name:
            raise ConfigError(f"{shorten(name)}: no such file{_packaged(name)}") from None
    except (OSError, ValueError):
        pass  # said by what reads it
    return list(_Reader(problem).read(found, (), ""))


class _Reader:
    """Reads a file and what it includes."""

    def __init__(self, problem: Callable[[str], str | None]) -> None:
        self._problem, self._files = problem, 0

    def read(self, path: str, including: tuple[str, ...], prefix: str) -> Iterator[Binding]:
        """The settings of `path`; `including` are the files that led to it, and `prefix` the place.

        Raises:
            ConfigError: as `read_file`.
        """
        if any(os.path.realpath(path) == os.path.realpath(other) for other in including):
            chain = " -> ".join((*including, path))
            raise ConfigError(f"{prefix}a file cannot include itself: {chain}")
        self._files += 1
        if self._files > _MOST_FILES:
            raise ConfigError(f"{prefix}more than {_MOST_FILES} files are included")
        try:
            text = read_small_file(path, prefix).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError(f"{prefix}{path}: is not UTF-8 text") from None
        lines: dict[str, int] = {}
        for line, statement in _statements(text.replace("\r\n", "\n").replace("\r", "\n"), path):
            where = f"{path}:{line}"
            if include := _INCLUDE.fullmatch(statement):
                place = f"{where}: include {include['file']}"
                name = _home(str(parse_checked(include["file"], f"{where}: include")), place)
                target = _find(name, os.path.normpath(Path(path).parent / name))
                yield from self.read(target, (*including, path), f"{place}: ")
            elif assignment := _ASSIGNMENT.fullmatch(statement):
                key = assignment["key"]
                if key in lines:
                    raise ConfigError(
                        f"{where}: {shorten(key)}: is already set on line {lines[key]}"
                    )
                lines[key] = line
                yield self._binding(key, assignment["value"], where)
            else:
                raise ConfigError(
                    f"{where}: expected Group.field = value, NAME = value or include 'file'"
                )

    def _binding(self, key: str, text: str, where: str) -> Binding:
        if "." in key:
            if problem := self._problem(key):
                raise ConfigError(f"{where}: {shorten(key)}: {problem}")
            return Binding(key, parse_checked(text, f"{where}: {key}"), where)
        try:
            return Binding(key, parse_value(text), where)
        except ValueError:
            raise ConfigError(f"{where}: {shorten(key)}: cannot read the value") from None


def _packaged(name: str) -> str:
    """What the package has instead of a config of that name."""
    known = sorted(config.stem for config in PACKAGED.glob("*.gin"))
    near = suggest(name.removesuffix(".gin"), known).replace("?", ".gin?")
    return f", here or in the package{near or '; it has ' + ', '.join(known)}"


def _find(name: str, path: str) -> str:
    """`path`, or where there is no such file, the config of that name that the package has."""
    packaged = os.path.join(PACKAGED, name)
    bare = os.path.basename(name) == name and not os.path.lexists(path)
    return packaged if bare and os.path.isfile(packaged) else path


def _home(path: str, where: str) -> str:
    try:
        return os.path.normpath(expand_home(path))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


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
        ConfigError: a macro is not defined, or is defined by itself, or the value is too long.
    """

    elements = 0

    def replace(value: object, user: Binding, trail: tuple[str, ...]) -> object:
        nonlocal elements
        elements += 1
        if elements > _MOST_ELEMENTS:
            raise user.error(f"macros make more than {_MOST_ELEMENTS:,} elements of it")
        if isinstance(value, tuple):
            return tuple(replace(element, user, trail) for element in value)
        if not isinstance(value, Macro):
            return value
        if len(trail) > _DEEPEST:
            raise user.error(f"more than {_DEEPEST} macros lead to its value")
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
