"""The syntax of gin files, the types of values, and the errors of both."""

import os
from pathlib import Path
from typing import Literal

import pytest
from helpers import config_error

from pldr_jax.config import ExperimentConfig
from pldr_jax.config.annotations import coerce
from pldr_jax.config.gin import parse_value, read_file
from pldr_jax.config.load import load_config


def test_no_files_gives_the_defaults():
    assert load_config([]) == ExperimentConfig()


def test_file_with_every_kind_of_statement(gin):
    gin("LR = 4e-3\nModel.num_layers = 2\n", "parts/base.gin")
    path = gin(
        "# a comment with 'a quote\n"
        "include 'parts/base.gin'  # relative to this file\n\n"
        "Model.num_layers = 7  # replaced\n"
        "Data.source = 'a # b %LR'\n"
        "Optimizer.learning_rate = %LR\n"
        "Mesh.data = -1\n"
        "Optimizer.weight_decay = (\n    0.25  # continued\n)\n"
        "Training.tensorboard = False\n"
        "Data.cache_dir = None\n"
    )
    config = load_config([path])
    assert (config.model.num_layers, config.data.source) == (7, "a # b %LR")
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (4e-3, 0.25)
    assert config.training.tensorboard is False and config.data.cache_dir is None


def test_include_is_relative_to_the_including_file(gin):
    gin("Model.num_layers = 4", "x/inner.gin")
    gin("Model.num_layers = 9", "inner.gin")
    assert load_config([gin("include 'inner.gin'", "x/outer.gin")]).model.num_layers == 4


def test_a_file_may_be_included_twice(gin):
    gin("Model.num_layers = 4", "base.gin")
    gin("include 'base.gin'", "b.gin")
    gin("include 'base.gin'", "c.gin")
    assert load_config([gin("include 'b.gin'\ninclude 'c.gin'")]).model.num_layers == 4


def test_a_macro_takes_its_last_value_and_may_use_another(gin):
    gin("SIZE = 2\nDEPTH = %SIZE\nModel.num_layers = %DEPTH", "base.gin")
    path = gin("include 'base.gin'\nSIZE = 6")
    assert load_config([path]).model.num_layers == 6
    assert load_config([path], ["SIZE=8"]).model.num_layers == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-3", -3),
        ("+2.5e-3", 2.5e-3),
        ("2_000", 2000),
        ("None", None),
        ("True", True),
        ("(1,\n 'a', (2.0,))", (1, "a", (2.0,))),
        ("[1, 2]", (1, 2)),
        (r"'it\'s \"%x\" \\ #'", 'it\'s "%x" \\ #'),
        ("()", ()),
    ],
)
def test_parse_value(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 2",
        "f'x'",
        "b'x'",
        "1j",
        "1 + 1",
        "x.y",
        "{1: 2}",
        "-True",
        "...",
        r"'\d'",
        "--1",
        "%",
        "3%A",
        "print('x')",
        "(" * 500,
    ],
)
def test_other_expressions_are_refused(text):
    with pytest.raises(ValueError):
        parse_value(text)


def test_lines_are_counted_over_comments_and_continuations(gin):
    path = gin("# one\n\nModel.num_layers = (\n 3 # (\n)\nDATA = '('\n Data.source = %DATA\n")
    assert [(b.key, b.where) for b in read_file(path)] == [
        ("Model.num_layers", "a.gin:3"),
        ("DATA", "a.gin:6"),
        ("Data.source", "a.gin:7"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\nModel.layrs = 3",
            "a.gin:2: Model.layrs: no such field; did you mean Model.num_layers?",
        ),
        ("Modle.num_layers = 3", "a.gin:1: Modle.num_layers: no such group; did you mean Model?"),
        ("Zzz.x = 3", "a.gin:1: Zzz.x: no such group; the groups are Model, Loss"),
        (
            "Model.learning_rate = 3",
            "a.gin:1: Model.learning_rate: no such field; did you mean Optimizer.learning_rate?",
        ),
        ("Model.num_layers = 'nine'", "a.gin:1: Model.num_layers: expected int, got 'nine'"),
        ("Model.num_layers = 2.5", "a.gin:1: Model.num_layers: expected int, got 2.5"),
        ("Model.num_layers = True", "a.gin:1: Model.num_layers: expected int, got True"),
        ("Model.ffn_dim = 2.0", "a.gin:1: Model.ffn_dim: expected int or None, got 2.0"),
        (
            "Optimizer.end_lr_fraction = True",
            "a.gin:1: Optimizer.end_lr_fraction: expected float, got True",
        ),
        ("Training.tensorboard = 1", "a.gin:1: Training.tensorboard: expected bool, got 1"),
        ("Data.source = None", "a.gin:1: Data.source: expected str, got None"),
        (
            "Model.dtype = 'bfloat32'",
            "a.gin:1: Model.dtype: expected one of 'float32', 'bfloat16', got 'bfloat32'; did you",
        ),
        (
            "Model.dtype = bfloat16",
            "a.gin:1: Model.dtype: bfloat16 is not a value; did you mean 'bf",
        ),
        (
            "Training.tensorboard = true",
            "a.gin:1: Training.tensorboard: true is not a value; did you mean True?",
        ),
        ("Model.num_layers = ", "a.gin:1: Model.num_layers: cannot read the value ''"),
        ("Model.num_layers = 3 4", "a.gin:1: Model.num_layers: cannot read the value '3 4'"),
        ("Model.num_layers == 3", "a.gin:1: expected Group.field = value"),
        ("import x", "a.gin:1: expected Group.field = value"),
        ("a/Model.num_layers = 3", "a.gin:1: expected Group.field = value"),
        ("\nData.source = 'x\n'", "a.gin:2: a string is not closed"),
        (
            "\nModel.num_layers = (3\n\n",
            "a.gin:2: a bracket is opened here, and its ')' is missing",
        ),
        ("Model.num_layers = 3)", "a.gin:1: ')' closes nothing"),
        ("Model.num_layers = (3]", "a.gin:1: ']' closes nothing"),
        (
            "Model.num_layers = 3\nModel.num_layers = 4",
            "a.gin:2: Model.num_layers: is already set on line 1",
        ),
        ("Model.num_layers = %L", "a.gin:1: Model.num_layers: %L is not defined"),
        (
            "RATE = 1\nOptimizer.end_lr_fraction = %RAET",
            "a.gin:2: Optimizer.end_lr_fraction: %RAET is not defined; did you mean %RATE?",
        ),
        (
            "num_layers = 3",
            "a.gin:1: num_layers: nothing uses %num_layers; did you mean Model.num_layers?",
        ),
        (
            "A = %B\nB = %A\nModel.num_layers = %A",
            "a.gin:2: B: %A is defined by itself: A -> B -> A",
        ),
        ("N = 'x'\nModel.num_layers = %N", "a.gin:2: Model.num_layers: expected int, got 'x'"),
        ("include 'no.gin'", "a.gin:1: include 'no.gin': no such file no.gin"),
        (
            "include 'a.gin'",
            "a.gin:1: include 'a.gin': a file cannot include itself: a.gin -> a.gin",
        ),
        ("include '.'", "a.gin:1: include '.': .: cannot be read"),
        ("include no.gin", "a.gin:1: expected Group.field = value"),
    ],
)
def test_errors_of_a_file_name_the_line(gin, text, message):
    assert config_error([gin(text)]).startswith(message)


def test_include_cycle_names_the_files(gin):
    gin("include 'a.gin'", "b.gin")
    path = gin("\ninclude 'b.gin'")
    message = "b.gin:1: include 'a.gin': a file cannot include itself: a.gin -> b.gin -> a.gin"
    assert config_error([path]) == message


def test_unreadable_files(gin):
    assert config_error(["no/such.gin"]) == "no/such.gin: no such file"
    near = config_error(["pldr_110.gin"])
    assert near == "pldr_110.gin: no such file, here or in the package; did you mean pldr_110m.gin?"
    assert "package; it has dag_110m, nano, nano_high_decay, onepass" in config_error(["!.gin"])
    gin("")
    Path("a.gin").write_bytes(b"Data.source = '\xff'")
    assert config_error(["a.gin"]) == "a.gin: is not UTF-8 text"


def test_a_replaced_value_is_checked_too(gin):
    assert config_error([gin("Model.num_layers = 2.5")], ["Model.num_layers=3"]).startswith(
        "a.gin:1: "
    )


# Types.


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        (3, float, 3.0),
        ((1, 2), tuple[int, ...], (1, 2)),
        ([1, 2], tuple[float, int], (1.0, 2)),
        (None, int | None, None),
        ("a", Literal["a", "b"] | None, "a"),
        ("1", int | str, "1"),
    ],
)
def test_coerce(value, annotation, result):
    assert repr(coerce(value, annotation)) == repr(result)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (True, int, "expected int, got True"),
        (True, Literal[1, 2], "expected one of 1, 2, got True"),
        (10**400, float, "expected float, got 1000"),
        ((1, "a"), tuple[int, ...], "expected int, got 'a'"),
        ((1,), tuple[int, int], "expected tuple"),
        (1, tuple[int, ...], "expected tuple"),
        ("c", Literal["a"] | None, "expected one of 'a' or None, got 'c'"),
    ],
)
def test_coerce_refuses(value, annotation, message):
    with pytest.raises(ValueError) as caught:
        coerce(value, annotation)
    assert str(caught.value).startswith(message)


# Files that are no gin files, or are made to do harm.


@pytest.mark.parametrize(
    "text",
    [
        "root:x:0:0:hunter2:/root:/bin/sh\n",
        "-----BEGIN PRIVATE KEY-----\nhunter2\n",
        "PASSWORD=hunter2\n",
        "PASSWORD=hunter2 and more\n",
        "PASSWORD = 'hunter2'\n",
        "PASSWORD = 'hunter2\n",
        "PASSWORD = (hunter2\n",
        "db.password = hunter2\n",
        "db.password = 'hunter2'\n",
        '{"password": "hunter2"}\n',
        "password: hunter2\n",
    ],
)
def test_errors_do_not_print_what_is_in_a_file_that_is_no_gin_file(gin, text):
    assert "hunter2" not in config_error([gin(text)])


def test_only_regular_files_of_a_readable_size_are_read(gin, tmp_path):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("binary").write_bytes(bytes(range(256)))
    with open("huge", "wb") as file:
        file.truncate(10**12)
    Path("loop").symlink_to("loop")
    for path, message in {
        "/dev/zero": "it is no regular file",
        "pipe": "it is no regular file",
        "folder": "it is a folder",
        "binary": "is not UTF-8 text",
        "huge": "is too large, 1,000,000,000,000 bytes",
        "loop": "cannot be read: ",
        "x" * 300: "cannot be read: ",
        "a\0b": "cannot be the name of a file",
    }.items():
        assert message in config_error([path])
        if "\0" not in path:
            assert message in config_error([gin(f"include {path!r}", "outer.gin")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Model.num_layers = " + "(" * 10**6 + ")" * 10**6, "cannot read the value"),
        ("Model.num_layers = " + "[" * 150 + "]" * 150, "expected int"),
        ("Model.num_layers = " + "-" * 10**6 + "1", "cannot read the value"),
        ("Model.num_layers = " + "1+" * 10**5 + "1", "Model.num_layers: "),
        ("Model.num_layers = 0x" + "f" * 10**5, "an integer of thousands of digits"),
        ("Model.num_layers = " + "9" * 10**5, "cannot read the value"),
        ("Optimizer.eps = 0x" + "f" * 10**5, "an integer of thousands of digits"),
        ("Model.num_layers = " + "x" * 10**6, "is not a value"),
        ("Model.dtype = '" + "x" * 10**6 + "'", "expected one of"),
        (
            "A0 = (1, 1, 1, 1)\n"
            + "".join(f"A{i + 1} = (%A{i}, %A{i}, %A{i}, %A{i})\n" for i in range(30))
            + "Data.mixture_weights = %A30",
            "macros make more than",
        ),
        (
            "A0 = 1\n"
            + "".join(f"A{i + 1} = %A{i}\n" for i in range(5000))
            + "Model.num_layers = %A5000",
            "macros lead to its value",
        ),
    ],
)
def test_a_value_made_to_take_all_time_or_memory_is_one_short_line(gin, text, message):
    error = config_error([gin(text)])
    assert message in error and len(error) < 400


def test_includes_are_bounded(gin):
    for i in range(12):  # 2^12 files to read
        gin(f"include 'f{i + 1}.gin'\ninclude 'f{i + 1}.gin'", f"f{i}.gin")
    gin("", "f12.gin")
    assert "more than 100 files are included" in config_error(["f0.gin"])
    for i in range(2000):
        gin(f"include 'g{i + 1}.gin'", f"g{i}.gin")
    assert "more than 100 files are included" in config_error(["g0.gin"])
