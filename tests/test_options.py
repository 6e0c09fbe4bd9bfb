"""The command line: options, flags of config fields, help and one-line errors."""

import dataclasses

import pytest

from pldr_jax.analysis.sections import SECTIONS
from pldr_jax.cli.analyze import analyze_main
from pldr_jax.cli.evaluate import evaluate_main
from pldr_jax.cli.freeze import freeze_main
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.cli.serve import serve_main
from pldr_jax.config import GROUPS
from pldr_jax.config.load import load_config

OPTIONS = (
    Option("run_dir", "folder of the run", required=True),
    Option("prompt", "a prompt, 100% yours", repeat=True),
    Option("count", "how many", type=int, default=2),
    Option("force", "overwrite", type=bool, default=False),
)


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
        (["--gin.Optimizer.lr=1"], "--gin.Optimizer.lr: no such field; did you mean Optimizer.lea"),
        (["--gin.Data.\u00e9=1"], "--gin.Data.\u00e9: no such field; --help lists those of Data"),
        (["--zzz=1"], "--zzz: no such flag; --help lists them"),
        (["--gin.Model.num_layers"], "--gin.Model.num_layers: needs a value"),
        (["--gin.Model.num_layers", "--force"], "--gin.Model.num_layers: needs a value"),
        (["--gin.=3"], "--gin.=3: expected Group.field=value"),
        (["--run_dir=r", "stray"], "'stray' follows no flag"),
        (["--run_dir=r", "--count=x"], "argument --count: invalid int value: 'x'"),
        (["--run_dir=r", f"--count={2**63}"], "argument --count: invalid int value"),
        ([], "--run_dir is required: folder of the run"),
    ],
)
def test_errors_of_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv, "train.py", "", OPTIONS)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"train.py: error: {message}")


@pytest.mark.parametrize(
    ("main", "flag"),
    [
        (evaluate_main, "--gin.Model.num_layers=4"),
        (analyze_main, "--gin.Optimizer.eps=1"),
        (freeze_main, "--gin.Training.steps=4"),
        (serve_main, "--gin.Generation.temperature=1.0"),
    ],
)
def test_a_program_refuses_the_fields_that_it_does_not_read(main, flag, capsys):
    """They were ignored, as if the model had been changed."""
    with pytest.raises(SystemExit) as ended:
        main([flag])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{flag}: is read from the checkpoint or a request; " in error
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--gin.Mesh.data" in shown and flag.partition("=")[0] not in shown


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
    assert "--gin.Model.num_layers int default 3 decoder layers (L) [>= 1, <= 4096]" in flat
    assert "--gin.Model.ffn_dim int|None default None" in flat
    assert "[> 0, <= 0.5]" in flat and "[none | dots | full]" in flat
    assert "\xa0" not in text
    fields = text.split("config fields")[1].splitlines()
    assert max(len(line) for line in fields if line.startswith(" ")) <= 100


def test_the_help_of_the_analysis_names_every_section(capsys):
    with pytest.raises(SystemExit):
        analyze_main(["--help"])
    shown = capsys.readouterr().out
    assert [key for key in SECTIONS if key not in shown] == []
