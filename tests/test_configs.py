"""Every file of `configs/` builds, and says what it is meant to say."""

import dataclasses
import re
import tomllib
from pathlib import Path

import jax
import pytest
from helpers import config_error, run_here

from pldr_jax.cli.training import train
from pldr_jax.config import GROUPS, ConfigError, ExperimentConfig
from pldr_jax.config.gin import PACKAGED, read_file
from pldr_jax.config.load import describe_differences, load_config, load_run
from pldr_jax.model.decoder import init_params
from pldr_jax.training.sweep.settings import Command

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.gin"))

# Published settings: learning rate, warm-up steps, steps.
PUBLISHED = {
    "soc_110m_1": (1.2e-3, 2000, 250_000),
    "soc_110m_2": (1.0e-3, 1000, 250_000),
    "soc_110m_3": (9e-4, 2000, 250_000),
    "soc_110m_4": (8e-4, 4000, 250_000),
    "soc_110m_5": (1.1e-3, 2000, 1_250_000),
    "sub_110m_1": (6e-4, 6000, 250_000),
    "sub_110m_2": (3e-4, 2000, 250_000),
    "pldr_110m": (1.0e-3, 1000, 250_000),
}
PARAMETERS = {
    "sdpa_110m": 105_606_482,
    "pldr_104m": 104_237_120,
    "pldr_350m": 339_918_848,
    "pldr_1b": 1_077_820_544,
    "pldr_7b": 6_891_491_584,
    "onepass": 10_531_646,
    **dict.fromkeys(("study", "study_cell1", "study_cell3"), 20_620_604),
}
CHIPS = {"pldr_350m": 8, "pldr_1b": 32, "pldr_7b": 64}


def load(name: str) -> ExperimentConfig:
    return load_config([CONFIGS / f"{name}.gin"])


def test_the_expected_files_exist():
    names = {path.stem for path in FILES}
    assert names >= {"nano", "dag_110m", *PUBLISHED, *PARAMETERS}


def test_configs_of_the_studies():
    for name, rate, warmup in (("reference1", 1.2e-3, 2000), ("reference2", 1e-3, 1000)):
        config = load(name)
        optimizer = dataclasses.replace(
            load("pldr_110m").optimizer, learning_rate=rate, warmup_steps=warmup
        )
        assert config == dataclasses.replace(load("pldr_110m"), optimizer=optimizer)
    cells = {
        "study_cell1": (7.5e-4, "constant", 250, 12_000),
        "study": (1e-3, "cosine", 1000, 12_000),
        "study_cell3": (3e-4, "constant", 250, 24_000),
    }
    for name, (rate, schedule, warmup, steps) in cells.items():
        config, optimizer = load(name), load(name).optimizer
        assert (optimizer.learning_rate, optimizer.schedule) == (rate, schedule)
        assert (optimizer.warmup_steps, config.training.steps) == (warmup, steps)
        model = config.model
        assert (model.num_layers, model.num_heads, model.head_dim) == (3, 4, 64)
        assert (model.metric_width, model.context_length, config.data.batch_size) == (170, 256, 32)
        assert config.training.seed == config.data.seed == 1234
    config, optimizer = load("onepass"), load("onepass").optimizer
    assert (config.model.init, config.loss.targets, config.data.epochs) == ("normalized", "last", 1)
    assert config.model.context_length - 1 == 64
    assert optimizer.learning_rate == 3e-4 * 128 / config.model.model_dim
    assert optimizer.generator_learning_rate == 3e-4
    stated = (optimizer.eps, optimizer.weight_decay, optimizer.clip, optimizer.clip_threshold)
    assert (*stated, optimizer.schedule) == (1e-8, 0.01, "norm", 1.0, "constant")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_builds_and_its_header_gives_the_command(path):
    load_config([path])
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"python train.py --gin_file=configs/{path.name} --run_dir=runs/{path.stem}" in header
    assert re.search(r"expect|claimed", header, re.IGNORECASE) and re.search(r"\btime\b", header)


def test_configs_are_found_by_name_from_any_folder(gin):
    """In a checkout and in a wheel, whose package data they are."""
    assert load_config(["pldr_110m.gin"]) == load("pldr_110m")
    own = gin("include 'pldr_110m.gin'\nModel.num_layers = 2", "mine.gin")
    model = dataclasses.replace(load("pldr_110m").model, num_layers=2)
    assert load_config([own]).model == model
    # A file that is there wins, and only a bare name is looked for.
    gin("Model.num_layers = 7", "pldr_110m.gin")
    assert load_config(["pldr_110m.gin"]).model.num_layers == 7
    assert config_error(["x/nano.gin"]) == "x/nano.gin: no such file"
    packaged = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())
    assert packaged["tool"]["setuptools"]["package-data"]["pldr_jax"] == ["configs/*.gin"]
    assert sorted(path.name for path in PACKAGED.glob("*.gin")) == [path.name for path in FILES]


def test_nano_states_every_field_and_differs_from_the_defaults_in_four():
    stated = {binding.key for binding in read_file(CONFIGS / "nano.gin")}
    groups = ("Model", "Optimizer", "Data", "Training", "Checkpoint")
    assert stated == {f"{g}.{f.name}" for g in groups for f in dataclasses.fields(GROUPS[g])}
    assert describe_differences(ExperimentConfig(), load("nano")) == [
        "Optimizer.learning_rate: 0.015 -> 0.006",
        "Optimizer.generator_learning_rate: None -> 0.002",
        "Optimizer.weight_decay: 1.0 -> 0.1",
        "Optimizer.metric_learner_weight_decay: None -> 10.0",
    ]
    assert load("nano_high_decay") == ExperimentConfig()


IDENTITY = "Model.g_source=identity"


@pytest.mark.parametrize(
    "arguments,expected",
    [
        ([], lambda: load("nano")),
        (["--gin.Model.num_layers=2"], lambda: load_config(["nano.gin"], ["Model.num_layers=2"])),
        (["--gin_file=phase.gin"], lambda: load("phase")),
        (["--gin_file=nano_high_decay.gin"], ExperimentConfig),
        (
            [f"--gin.{IDENTITY}"],
            lambda: load_config([], ["Optimizer.learning_rate=6e-3", "Optimizer.weight_decay=0.1",
                                     IDENTITY]),
        ),
    ],
)  # fmt: skip
def test_train_without_a_file_begins_with_nano(arguments, expected, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(train.planning, "plan", lambda options, config: planned.append(config))
    status, _, error = run_here(capsys, train.train_main, "--plan", *arguments)
    assert (status, error, planned) == (0, "", [expected()])
    # The runs of a sweep are such commands.
    files = [one.removeprefix("--gin_file=") for one in arguments if "--gin_file" in one]
    point = [one.removeprefix("--gin.").split("=") for one in arguments if "--gin." in one]
    assert Command(files).config(point) == expected()


def test_a_rate_of_the_generator_is_refused_where_there_is_none():
    stated = ["Optimizer.generator_learning_rate=1e-3", IDENTITY]
    with pytest.raises(ConfigError, match="generator_learning_rate.*has no generator"):
        load_run([], stated)
    fine_tuned = load_run([], base=ExperimentConfig())
    assert fine_tuned == ExperimentConfig()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    config, base = load(name), load("pldr_110m")
    settings = config.optimizer.learning_rate, config.optimizer.warmup_steps, config.training.steps
    assert settings == PUBLISHED[name]
    assert (config.model, config.data) == (base.model, base.data)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-5)
    assert (optimizer.weight_decay, optimizer.clip, optimizer.clip_threshold) == (0.1, "value", 1.0)
    assert (optimizer.end_lr_fraction, optimizer.decay_steps, optimizer.decay_mask) == (
        0.1,
        None,
        "all",
    )
    assert (config.data.batch_size, config.model.context_length) == (32, 1024)
    assert config.model.dtype == "bfloat16" and config.loss == base.loss


def test_variants_change_what_they_are_named_for():
    base, dag = load("pldr_110m"), load("dag_110m")
    assert (dag.loss.dag_a_lm, dag.loss.dag_a_p, dag.loss.dag_g_lm) == (0.05, 0.05, 0.05)
    assert dataclasses.replace(dag, loss=base.loss) == base
    sdpa = load("sdpa_110m")
    assert sdpa.model == dataclasses.replace(base.model, g_source="identity")
    assert dataclasses.replace(sdpa, model=base.model) == base
    small = load("pldr_104m")
    assert small.model == dataclasses.replace(base.model, num_layers=7, num_heads=12)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameter_counts(path):
    config = load_config([path])
    shapes = jax.eval_shape(lambda key: init_params(config.model, key), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    if path.stem in ("nano", "nano_high_decay", "phase"):
        assert count < 1_000_000
    else:
        assert count == PARAMETERS.get(path.stem, 109_689_362)
    stated = re.findall(r"([\d,]{7,}) parameters", path.read_text(encoding="utf-8"))
    assert not stated or [int(text.replace(",", "")) for text in stated] == [count]


@pytest.mark.parametrize("name", CHIPS)
def test_larger_shapes_state_a_mesh_that_divides(name):
    config = load(name)
    mesh, model = config.mesh, config.model
    assert mesh.data * mesh.fsdp * mesh.tensor == CHIPS[name]
    assert f"on {CHIPS[name]} chips" in (CONFIGS / f"{name}.gin").read_text(encoding="utf-8")
    assert config.data.batch_size % (mesh.data * mesh.fsdp) == 0
    widths = (model.num_heads, model.ffn_width, model.vocab_size)
    assert all(width % mesh.tensor == 0 for width in widths) and model.model_dim % mesh.fsdp == 0
