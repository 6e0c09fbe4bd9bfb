"""Values against the annotations of config fields, and both in the words of messages."""

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

_LONGEST_SHOWN, LONGEST_LINE = 80, 1000
"""Characters of a value in a message, and of a whole message, at most."""


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
        raise ValueError(f"expected {type_name(annotation)}, got {show(value)}{near}")
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
            return tuple(coerce(x, each) for x, each in zip(value, expected, strict=True))
    elif annotation is float and type(value) in (int, float):
        try:
            return float(value)  # type: ignore[arg-type]
        except OverflowError:
            pass
    elif type(value) is annotation:
        return value
    raise ValueError(f"expected {type_name(annotation)}, got {show(value)}")


def type_name(annotation: Any, brief: bool = False) -> str:
    """An annotation in the words of messages: `int`, `int or None`, `tuple[int, ...]`; where it is
    to be `brief`, values that it lists are `choice`.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument, brief) for argument in arguments)
    if origin is Literal:
        return "choice" if brief else f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple:
        return f"tuple[{', '.join(type_name(argument, brief) for argument in arguments)}]"
    if annotation is types.NoneType:
        return "None"
    if annotation is ...:
        return "..."
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def choices(annotation: Any) -> tuple[Any, ...]:
    """The values that the Literals of an annotation list."""
    literals = (a for a in alternatives(annotation) if typing.get_origin(a) is Literal)
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


def suggest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` for the nearest of `known`, or nothing where none is near."""
    folded = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{folded[near[0].lower()]}?" if near else ""


def show(value: object) -> str:
    """`repr(value)` on one line of bounded length."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "an integer of thousands of digits"
    except RecursionError:
        text = f"a nested {type(value).__name__}"
    return shorten(text)


def shorten(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """The text on one line of bounded length."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= longest else f"{text[:longest]}..."
