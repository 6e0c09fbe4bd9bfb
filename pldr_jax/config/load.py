"""Reading and writing a config: the only place where text becomes an `ExperimentConfig`, and back.

`--gin_file=PATH` and `--gin.Group.field=VALUE` set the fields of the dataclasses in
`pldr_jax/config/`; the syntax is that of `pldr_jax/config/gin.py`, which says why the gin library
is not used. Values are checked against the annotations of the fields; flags win over files, and
later files over earlier ones. Every error is a `ConfigError` of one line.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pldr_jax.config import GROUPS, ConfigError, ExperimentConfig, MeshConfig, group_name
from pldr_jax.config.annotations import alternatives, choices, coerce, shorten, show, suggest
from pldr_jax.config.gin import (
    PACKAGED,
    Binding,
    Macro,
    format_value,
    macros_in,
    parse_override,
    read_file,
    resolve,
)

_ATTRIBUTES = {group_name(type(f.default)): f.name for f in dataclasses.fields(ExperimentConfig)}
FIELDS = {
    f"{group}.{name}": annotation
    for group, cls in GROUPS.items()
    for name, annotation in typing.get_type_hints(cls).items()
}
"""`Group.field` -> annotation."""

RENAMED = {
    "Optimizer.alpha": "Optimizer.end_lr_fraction",
    "Training.accumulate": "Training.grad_accumulation",
    "Checkpoint.every_steps": "Checkpoint.save_every",
    "Generation.rows": "Generation.batch_size",
}
"""Former names of fields; a config file or flag with one is told the new name, and the config that
an older run has stored is read with the new one."""
RENAMED_VALUES = {"Data.packing": {"pack": "concat", "segment": "packed"}}
"""The same for values."""


def _typed(binding: Binding, annotation: Any, macros: Mapping[str, Binding]) -> Any:
    """The value of a binding for a field; text of a command line may be an unquoted string."""
    optional = types.NoneType in alternatives(annotation)
    takes_text = any(
        c is str or isinstance(c, str) for c in alternatives(annotation) + choices(annotation)
    )
    if binding.raw is not None and takes_text and not isinstance(binding.value, (str, Macro)):
        if binding.value is not None or not optional:
            binding = dataclasses.replace(binding, value=binding.raw)
    value = resolve(binding, macros)
    renamed = RENAMED_VALUES.get(binding.key, {})
    if isinstance(value, str) and value in renamed:
        raise binding.error(f"{value!r} is called {renamed[value]!r} now")
    try:
        return coerce(value, annotation)
    except ValueError as error:
        raise binding.error(str(error)) from None


def unknown_field(key: str) -> str | None:
    """What is wrong with `Group.field`, or None where there is such a field."""
    group, _, name = key.partition(".")
    if key in FIELDS:
        return None
    if key in RENAMED:
        return f"is called {RENAMED[key]} now"
    if group not in GROUPS:
        hint = suggest(group, list(GROUPS)) or f"; the groups are {', '.join(GROUPS)}"
        return f"no such group{hint}"
    names = [key.partition(".")[2] for key in _in_group(group)]
    near = _same_field(name) or _initials(group, name) or suggest(name, names, f"{group}.")
    return f"no such field{near or f'; --help lists those of {group}'}"


def _in_group(group: str) -> list[str]:
    return [key for key in FIELDS if key.startswith(f"{group}.")]


def _same_field(name: str) -> str:
    """The suggestion of a field `name` of any group; empty where there is none."""
    same = [key for key in FIELDS if key.endswith(f".{name}")]
    return f"; did you mean {same[0]}?" if same else ""


def _initials(group: str, name: str) -> str:
    """The suggestion of the field that a short name such as `lr` stands for; empty without one."""
    for key in _in_group(group):
        if "".join(word[0] for word in key.partition(".")[2].split("_")) == name:
            return f"; did you mean {key}?"
    return ""


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
    return _bind(_bindings(gin_files, overrides), base or ExperimentConfig())


def load_run(
    gin_files: Sequence[str | Path],
    overrides: Sequence[str] = (),
    base: ExperimentConfig | None = None,
) -> ExperimentConfig:
    """The config of `train.py`: that of `load_config`, on top of the package's `nano.gin` where
    there are neither files nor a `base`. Where G_LM is predefined, the rate and the decay of the
    PLGA network are left out of that.

    Raises:
        ConfigError: as `load_config`.
    """
    if not gin_files and base is None:
        base = load_config([PACKAGED / "nano.gin"])
        if load_config([], overrides).model.g_source != "learned":
            base = base.without_generator()
    return load_config(gin_files, overrides, base)


def load_mesh(gin_files: Sequence[str | Path], overrides: Sequence[str] = ()) -> MeshConfig:
    """The mesh of `load_config`, without the other groups, which may need a checkpoint's model.

    Raises:
        ConfigError: as `load_config`, except for bounds of other groups.
    """
    bindings = _bindings(gin_files, overrides)
    groups, places = _typed_groups(bindings)
    return _build(ExperimentConfig(), {"Mesh": groups.get("Mesh", {})}, places).mesh


def _bindings(gin_files: Sequence[str | Path], overrides: Sequence[str]) -> list[Binding]:
    bindings = [binding for path in gin_files for binding in read_file(path, unknown_field)]
    return [*bindings, *(parse_override(text) for text in overrides)]


def load_stored(path: str | Path) -> ExperimentConfig:
    """The config in `config.gin` of a run folder, also of a run older than a field's name.

    Raises:
        ConfigError: as `load_config`.
    """
    bindings = read_file(path, lambda key: None if key in RENAMED else unknown_field(key))
    renamed = [dataclasses.replace(one, **_current(one.key, one.value)) for one in bindings]
    return _bind(renamed, ExperimentConfig())


def _current(key: str, value: Any) -> dict[str, Any]:
    """Key and value as they are called today."""
    key = RENAMED.get(key, key)
    names = RENAMED_VALUES.get(key, {})
    return {"key": key, "value": names.get(value, value) if isinstance(value, str) else value}


def _bind(bindings: Sequence[Binding], base: ExperimentConfig) -> ExperimentConfig:
    """`base` with what the bindings set."""
    return _build(base, *_typed_groups(bindings))


def _typed_groups(
    bindings: Sequence[Binding],
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Group -> field -> value, and `Group.field` -> the place that set it. Each binding is checked,
    also one that a later one replaces.
    """
    settings = [binding for binding in bindings if "." in binding.key]
    for binding in settings:
        if problem := unknown_field(binding.key):
            raise binding.error(problem)
    macros = {binding.key: binding for binding in bindings if "." not in binding.key}
    groups: dict[str, dict[str, Any]] = {}
    for binding in settings:
        group, _, name = binding.key.partition(".")
        groups.setdefault(group, {})[name] = _typed(binding, FIELDS[binding.key], macros)
    used = {name for binding in bindings for name in macros_in(binding.value)}
    for name, binding in macros.items():
        if name not in used:
            hint = _same_field(name) or suggest(name, sorted(used), "%")
            raise binding.error(f"nothing uses %{shorten(name)}{hint}")
    return groups, {b.key: b.where for b in settings}


def parse_values(text: str, flag: str) -> tuple[str, tuple[str, ...]]:
    """`Group.field=A,B` -> the field and its values, as texts for `load_config`. A value with a
    comma in it is quoted; tuples, of a field that takes one, stand in their brackets.

    Raises:
        ConfigError: there is no such field, or no value.
    """
    key, equals, values = text.partition("=")
    shown = f"{flag} {shorten(text)}"
    if not equals or "." not in key:
        raise ConfigError(f"{shown}: expected Group.field=A,B,...")
    if problem := unknown_field(key):
        raise ConfigError(f"{shown}: {problem}")
    tuples = any(typing.get_origin(kind) is tuple for kind in alternatives(FIELDS[key]))
    parts, depth = [""], 0
    for piece in re.findall(r"""\"[^\"]*\"|'[^']*'|.""", values, re.DOTALL):
        depth += tuples * ((piece in "([") - (piece in ")]"))
        if piece == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += piece
    stripped = tuple(part.strip() for part in parts)
    if not all(stripped):
        raise ConfigError(f"{shown}: a value is missing")
    return key, stripped


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
        lines = [f"# {group}: {summary_line(GROUPS[group])}"]
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
    """The config that `config_to_dict` made `data` of, in this version or an older one; a missing
    key takes its default.

    `source` says in messages where the data came from, for example a checkpoint's path.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type or is out of bounds.
    """
    groups: dict[str, dict[str, Any]] = {}
    for group, values in data.items():
        if group not in GROUPS:
            raise ConfigError(f"{source}: {group}: {unknown_field(group)}")
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{source}: {group}: expected the fields of the group, got {show(values)}"
            )
        for name, value in values.items():
            key, value = _current(f"{group}.{name}", value).values()
            if problem := unknown_field(key):
                raise ConfigError(f"{source}: {key}: {problem}")
            try:
                groups.setdefault(group, {})[key.partition(".")[2]] = coerce(value, FIELDS[key])
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


def summary_line(cls: type) -> str:
    """The first line of a group's docstring."""
    return (cls.__doc__ or "").strip().partition("\n")[0]
