"""Config files and flags: syntax, types, precedence, errors and round trips."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Literal

import pytest

from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import (
    GROUPS,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.config.gin import coerce, parse_value, read_file
from pldr_jax.config.load import (
    config_from_dict,
    config_to_dict,
    describe_differences,
    dump_config,
    load_config,
)

OPTIONS = (
    Option("run_dir", "folder of the run", required=True),
    Option("prompt", "a prompt, 100% yours", repeat=True),
    Option("count", "how many", type=int, default=2),
    Option("force", "overwrite", type=bool, default=False),
)


@pytest.fixture
def gin(tmp_path, monkeypatch):
    """Writes a gin file into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.gin") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def error_of(files=(), overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Syntax of files.


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
    assert error_of([gin(text)]).startswith(message)


def test_include_cycle_names_the_files(gin):
    gin("include 'a.gin'", "b.gin")
    path = gin("\ninclude 'b.gin'")
    message = "b.gin:1: include 'a.gin': a file cannot include itself: a.gin -> b.gin -> a.gin"
    assert error_of([path]) == message


def test_unreadable_files(gin):
    assert error_of(["no/such.gin"]) == "no/such.gin: no such file"
    gin("")
    Path("a.gin").write_bytes(b"Data.source = '\xff'")
    assert error_of(["a.gin"]) == "a.gin: is not UTF-8 text"


def test_a_replaced_value_is_checked_too(gin):
    assert error_of([gin("Model.num_layers = 2.5")], ["Model.num_layers=3"]).startswith("a.gin:1: ")


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


# Overrides, precedence and validation.


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("Model.dtype=bfloat16", "bfloat16"),
        ("Model.dtype='bfloat16'", "bfloat16"),
        ("Data.source=/some/path", "/some/path"),
        ('Data.source="/some/path"', "/some/path"),
        ("Data.source=123", "123"),
        ("Data.source=a=b", "a=b"),
        ("Data.source=50%off", "50%off"),
        ("Data.source='%X'", "%X"),
        ("Data.source=None", "None"),
        ("Data.cache_dir=None", None),
        ("Data.cache_dir='None'", "None"),
        ("Training.sample_prompt=", ""),
        ("Training.sample_prompt='Tis", "'Tis"),
        ("Training.sample_prompt=two\nlines ", "two\nlines "),
        ("Model.ffn_dim=None", None),
        ("Optimizer.learning_rate=3e-3", 3e-3),
        ("Optimizer.learning_rate=1", 1.0),
        ("Mesh.data=-1", -1),
        ("Checkpoint.keep_best=False", False),
    ],
)
def test_override_values(override, value):
    group, _, field = override.partition("=")[0].partition(".")
    result = config_to_dict(load_config([], [override]))[group][field]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("Model.num_layers=nine", "--gin.Model.num_layers=nine: expected int, got 'nine'"),
        ("Model.num_layers=", "--gin.Model.num_layers=: expected int, got ''"),
        ("Model.num_layers=2.5", "--gin.Model.num_layers=2.5: expected int, got 2.5"),
        ("Model.layrs=3", "--gin.Model.layrs=3: no such field; did you mean Model.num_layers?"),
        ("Model.dtype=float16", "--gin.Model.dtype=float16: expected one of 'float32', 'bfloat16'"),
        ("Checkpoint.keep_best=no", "--gin.Checkpoint.keep_best=no: expected bool, got 'no'"),
        ("Model.num_layers", "--gin.Model.num_layers: expected Group.field=value"),
        ("Model.num_layers = 3", "--gin.Model.num_layers = 3: expected Group.field=value"),
        ("=3", "--gin.=3: expected Group.field=value"),
        ("Model=a\nb", "--gin.Model=a\\nb: nothing uses %Model"),
        ("Data.source=%X", "--gin.Data.source=%X: %X is not defined"),
        (
            "Model.num_layers=0",
            "--gin.Model.num_layers=0: Model.num_layers = 0: must be at least 1",
        ),
        (
            "Optimizer.end_lr_fraction=1e999",
            "--gin.Optimizer.end_lr_fraction=1e999: Optimizer.end_lr_fraction = inf: must be fin",
        ),
        ("Training.steps=100", "Optimizer.warmup_steps = 200: must be below the 100 steps"),
    ],
)
def test_errors_of_an_override_name_the_flag(override, message):
    assert error_of([], [override]).startswith(message)


def test_validation_errors_name_the_setting_that_won(gin):
    first, second = gin("Model.head_dim = 31", "1.gin"), gin("\nModel.head_dim = 33", "2.gin")
    assert error_of([first, second]).startswith("2.gin:2: Model.head_dim = 33: must be even")
    assert error_of([first], ["Model.head_dim=35"]).startswith("--gin.Model.head_dim=35: ")


def test_fields_that_depend_on_each_other_are_validated_together():
    config = load_config([], ["Model.g_source=external", "Model.g_file=g.npz"])
    assert (config.model.g_source, config.model.g_file) == ("external", "g.npz")


def test_later_files_win_and_overrides_win_over_files(gin):
    first = gin("Model.num_layers = 4\nModel.num_heads = 4", "1.gin")
    files = [first, gin("Model.num_layers = 5", "2.gin")]
    assert load_config(files).model == ModelConfig(num_layers=5, num_heads=4)
    assert load_config(files[::-1]).model.num_layers == 4
    overrides = ["Model.num_layers=6", "Model.num_layers=7"]
    assert load_config(files, overrides).model == ModelConfig(num_layers=7, num_heads=4)


def test_base_is_kept_where_nothing_is_set(gin):
    base = ExperimentConfig(model=ModelConfig(num_layers=9, num_heads=3))
    config = load_config([gin("Model.num_layers = 2")], ["Data.seed=5"], base=base)
    assert config.model == ModelConfig(num_layers=2, num_heads=3) and config.data.seed == 5


# The command line.


def test_parse_args_separates_options_files_and_overrides():
    argv = (
        "--gin.Model.num_layers=5 --gin_file a.gin --run_dir=r --gin.Mesh.data -1 --force "
        "--gin_file=b.gin --prompt x --prompt y --gin.Data.source /p"
    ).split()
    args = parse_args([*argv, "--gin.Training.sample_prompt", "Once upon"], "train.py", "", OPTIONS)
    assert args.gin_files == ["a.gin", "b.gin"]
    assert args.overrides == [
        "Model.num_layers=5",
        "Mesh.data=-1",
        "Data.source=/p",
        "Training.sample_prompt=Once upon",
    ]
    assert (args.run_dir, args.prompt, args.count, args.force) == ("r", ["x", "y"], 2, True)


def test_parse_args_defaults_are_not_shared():
    first = parse_args(["--run_dir=r", "--prompt=x", "--gin_file=a"], "p", "", OPTIONS)
    second = parse_args(["--run_dir=r"], "p", "", OPTIONS)
    assert first.prompt == ["x"] and second.prompt == [] and second.gin_files == []
    assert second.force is False


def test_flags_win_over_files_whatever_their_order(gin):
    path = gin("Model.num_layers = 4")
    argv = ["--gin.Model.num_layers=6", f"--gin_file={path}"]
    for order in (argv, argv[::-1]):
        args = parse_args(order, "p", "")
        assert load_config(args.gin_files, args.overrides).model.num_layers == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rundir=r"], "--rundir: no such flag; did you mean --run_dir?"),
        (["--run-dir", "r"], "--run-dir: no such flag; did you mean --run_dir?"),
        (["--run", "r"], "--run: no such flag"),
        (["--gin_fil=x"], "--gin_fil: no such flag; did you mean --gin_file?"),
        (
            ["--gin.Model.layrs=3"],
            "--gin.Model.layrs: no such field; did you mean Model.num_layers?",
        ),
        (["--gin.Model.num_layers"], "--gin.Model.num_layers: needs a value"),
        (["--gin.Model.num_layers", "--force"], "--gin.Model.num_layers: needs a value"),
        (["--gin.=3"], "--gin.=3: expected Group.field=value"),
        (["--run_dir=r", "stray"], "'stray' follows no flag"),
        (["--run_dir=r", "--count=x"], "argument --count: invalid int value: 'x'"),
        ([], "--run_dir is required: folder of the run"),
    ],
)
def test_errors_of_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv, "train.py", "", OPTIONS)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"train.py: error: {message}")


def test_help_lists_options_and_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"], "train.py", "Trains a model.", OPTIONS)
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "Trains a model." in text
    assert "folder of the run (required)" in text and "100% yours (repeatable)" in text
    flat = " ".join(text.split())
    for group, config_class in GROUPS.items():
        for field in dataclasses.fields(config_class):
            assert f"--gin.{group}.{field.name} " in flat
            assert " ".join(field.metadata["doc"].split()) in flat
    assert "--gin.Model.num_layers int default 3 decoder layers (L) [>= 1]" in flat
    assert "--gin.Model.ffn_dim int|None default None" in flat
    assert "[> 0, <= 0.5]" in flat and "[none | dots | full]" in flat
    assert "\xa0" not in text
    fields = text.split("config fields")[1].splitlines()
    assert max(len(line) for line in fields if line.startswith(" ")) <= 100


# Writing configs.

STRINGS = [
    "",
    " ",
    "def ",
    "it's",
    '"',
    "a\"b'c",
    "back\\slash\\",
    "\\'",
    "# no",
    "%NAME",
    "é漢🙂",
    "\n\r\t\0",
    "\u2028\x85",
    "\ud800",
    "None",
    "'''",
    "(",
    "a = b",
]


def _awkward(rng: random.Random) -> ExperimentConfig:
    def text() -> str:
        return "".join(rng.choices(STRINGS, k=rng.randint(0, 4)))

    def number() -> float:
        return rng.choice(
            [rng.random(), 10 ** rng.uniform(-300, 300), 5e-324, 0.1 + 0.2, 1e16, 7.0]
        )

    return ExperimentConfig(
        model=ModelConfig(
            num_layers=rng.randint(1, 10**12),
            ffn_dim=rng.choice([None, 7]),
            rope_theta=number(),
            dtype=rng.choice(["float32", "bfloat16"]),
            g_source="external",
            g_file=text(),
        ),
        loss=LossConfig(),
        optimizer=OptimizerConfig(
            learning_rate=number(), eps=number(), end_lr_fraction=rng.random()
        ),
        data=DataConfig(source=text(), tokenizer=rng.choice([None, text()])),
        mesh=MeshConfig(data=rng.choice([-1, 3])),
        checkpoint=CheckpointConfig(keep_best=rng.random() < 0.5),
        training=TrainingConfig(sample_prompt=text()),
    )


@pytest.mark.parametrize("seed", range(100))
def test_dump_and_dict_round_trip(gin, seed):
    config = _awkward(random.Random(seed))
    text = dump_config(config)
    loaded = load_config([gin(text)], base=_awkward(random.Random(seed + 1000)))
    assert loaded == config and repr(loaded) == repr(config)
    data = json.loads(json.dumps(config_to_dict(config)))
    assert repr(config_from_dict(data)) == repr(config)


def test_dump_states_every_field_once_with_its_meaning(gin):
    text = dump_config(ExperimentConfig())
    names = [f"{group}.{f.name}" for group, cls in GROUPS.items() for f in dataclasses.fields(cls)]
    assert [binding.key for binding in read_file(gin(text))] == names
    assert "# Optimizer: AdamW with linear warm-up and cosine decay.\n" in text
    assert "# decoder layers (L)\n" in text


def test_dict_takes_defaults_for_what_is_missing():
    config = config_from_dict({"Model": {"num_layers": 5}, "Loss": {}})
    assert config == ExperimentConfig(model=ModelConfig(num_layers=5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"Modle": {}}, "ckpt: Modle: no such group; did you mean Model?"),
        (
            {"Model": {"layers": 3}},
            "ckpt: Model.layers: no such field; did you mean Model.num_layers?",
        ),
        ({"Model": {"num_layers": 3.0}}, "ckpt: Model.num_layers: expected int, got 3.0"),
        ({"Model": {"num_layers": 0}}, "ckpt: Model.num_layers = 0: must be at least 1"),
        ({"Model": 3}, "ckpt: Model: expected the fields of the group, got 3"),
    ],
)
def test_dict_errors(data, message):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(data, "ckpt")
    assert str(caught.value) == message


def test_describe_differences():
    before = ExperimentConfig()
    after = load_config([], ["Model.num_layers=5", "Model.dtype=bfloat16", "Data.seed=1"])
    model = ["Model.num_layers: 3 -> 5", "Model.dtype: 'float32' -> 'bfloat16'"]
    assert describe_differences(before, after) == [*model, "Data.seed: 0 -> 1"]
    assert describe_differences(before, after, ["Model"]) == model
    assert describe_differences(before, before) == []
