"""Configs from files and flags: precedence, validation, round trips, and those of older runs."""

import dataclasses
import json
import random

import numpy as np
import pytest
from helpers import config_error

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
from pldr_jax.config.gin import read_file
from pldr_jax.config.load import (
    FIELDS,
    RENAMED,
    config_from_dict,
    config_to_dict,
    describe_differences,
    dump_config,
    load_config,
    load_mesh,
    load_stored,
)


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
    assert config_error([], [override]).startswith(message)


def test_validation_errors_name_the_setting_that_won(gin):
    first, second = gin("Model.head_dim = 31", "1.gin"), gin("\nModel.head_dim = 33", "2.gin")
    assert config_error([first, second]).startswith("2.gin:2: Model.head_dim = 33: must be even")
    assert config_error([first], ["Model.head_dim=35"]).startswith("--gin.Model.head_dim=35: ")


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

    def path() -> str:
        """No file has an empty name, a NUL or half a character in it."""
        return "/" + text().replace("\0", "").replace("\ud800", "")

    def number() -> float:
        return rng.choice(
            [rng.random(), 10 ** rng.uniform(-300, 300), 5e-324, 0.1 + 0.2, 1e16, 7.0]
        )

    return ExperimentConfig(
        model=ModelConfig(
            num_layers=rng.randint(1, 4096),
            ffn_dim=rng.choice([None, 7]),
            rope_theta=number(),
            dtype=rng.choice(["float32", "bfloat16"]),
            g_source="external",
            g_file=path(),
        ),
        loss=LossConfig(),
        optimizer=OptimizerConfig(
            learning_rate=number(), eps=number(), end_lr_fraction=rng.random()
        ),
        data=DataConfig(source=path(), tokenizer=rng.choice([None, path()])),
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
    assert "# Optimizer: The update rule and its learning rate; by default AdamW" in text
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


OLDER = {
    "Optimizer": {"alpha": 0.25},
    "Training": {"accumulate": 4},
    "Checkpoint": {"every_steps": 7},
}


@pytest.mark.parametrize(
    ("old", "new"), [("pack", "concat"), ("segment", "packed"), ("document", "document")]
)
def test_the_config_of_an_older_run_is_read_with_the_names_of_today(gin, old, new):
    stored = {**OLDER, "Data": {"packing": old}}
    config = config_from_dict(stored, "ckpt")
    assert (config.optimizer.end_lr_fraction, config.training.grad_accumulation) == (0.25, 4)
    assert (config.checkpoint.save_every, config.data.packing) == (7, new)
    lines = [f"{g}.{name} = {value!r}" for g, v in stored.items() for name, value in v.items()]
    assert load_stored(gin("\n".join(lines))) == config


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_one_line_with_the_new_one(gin, old):
    assert config_error([gin(f"{old} = 1")]) == f"a.gin:1: {old}: is called {RENAMED[old]} now"
    assert config_error([], [f"{old}=1"]).endswith(f"is called {RENAMED[old]} now")


@pytest.mark.parametrize(("old", "new"), [("pack", "concat"), ("segment", "packed")])
def test_an_old_packing_is_one_line_with_the_new_one(gin, old, new):
    said = f"Data.packing: {old!r} is called {new!r} now"
    assert config_error([gin(f"Data.packing = {old!r}")]) == f"a.gin:1: {said}"
    assert config_error([gin(f"P = {old!r}\nData.packing = %P")]) == f"a.gin:2: {said}"
    assert config_error([], [f"Data.packing={old}"]).endswith(f"is called {new!r} now")


# Python values.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_layers="7"), "Model.num_layers = '7': must be int"),
        (lambda: ModelConfig(num_layers=True), "Model.num_layers = True: must be int"),
        (lambda: ModelConfig(num_layers=2.0), "Model.num_layers = 2.0: must be int"),
        (lambda: ModelConfig(num_layers=None), "Model.num_layers = None: must be int"),
        (lambda: ModelConfig(ffn_dim="9"), "Model.ffn_dim = '9': must be int or None"),
        (lambda: ModelConfig(unroll=1), "Model.unroll = 1: must be bool"),
        (lambda: ModelConfig(dtype=None), "Model.dtype = None: is not one of 'float32', 'bfl"),
        (lambda: ModelConfig(dtype=[]), "Model.dtype = []: is not one of 'float32', 'bfl"),
        (lambda: OptimizerConfig(eps="1"), "Optimizer.eps = '1': must be float"),
        (lambda: OptimizerConfig(eps=True), "Optimizer.eps = True: must be float"),
        (lambda: OptimizerConfig(eps=float("nan")), "Optimizer.eps = nan: must be finite"),
        (lambda: DataConfig(source=3), "Data.source = 3: must be str"),
        (lambda: DataConfig(mixture="a"), "Data.mixture = 'a': must be tuple[str, ...]"),
        (lambda: DataConfig(mixture_weights=("1",)), "Data.mixture_weights = ('1',): must be tup"),
        (lambda: TrainingConfig(steps=10**5000), "Training.steps = an integer of thousands"),
        (lambda: TrainingConfig(sample_prompt=b"x"), "Training.sample_prompt = b'x': must be str"),
        (lambda: ExperimentConfig(model=ModelConfig), "Model = <class"),
        (lambda: ExperimentConfig(data=None), "Data = None: must be a DataConfig"),
    ],
)
def test_a_python_value_of_another_type_is_one_line(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_numbers_of_numpy_lists_and_paths_become_pythons(tmp_path):
    config = ModelConfig(num_layers=np.int64(3), rope_theta=np.float32(2), layer_norm_eps=1)
    values = (config.num_layers, config.rope_theta, config.layer_norm_eps)
    assert repr(values) == "(3, 2.0, 1.0)"
    data = DataConfig(source=tmp_path, mixture=[tmp_path], mixture_weights=[1])
    assert (data.source, data.mixture) == (str(tmp_path), (str(tmp_path),))
    assert repr(data.mixture_weights) == "(1.0,)"
    json.dumps(config_to_dict(ExperimentConfig(model=config, data=data)))


# Bounds.


@pytest.mark.parametrize("field", ["Model.g_seed", "Data.seed", "Training.seed", "Generation.seed"])
def test_seeds_have_32_bits(field):
    load_config([], [f"{field}={2**32 - 1}"])
    for value in (2**32, 2**63, 2**64, 10**30, -1):
        assert config_error([], [f"{field}={value}"]).startswith(f"--gin.{field}={value}: {field}")


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_heads": 10**6},
        {"head_dim": 10**6},
        {"num_gated_units": 10**7},
        {"metric_dim": 10**7},
        {"ffn_dim": 10**12},
        {"num_layers": 10**9},
        {"num_residual_layers": 2**31},
        {"vocab_size": 10**15},
        {"context_length": 2**40},
        {"num_heads": 4096, "head_dim": 4096, "num_layers": 4096},
        {"metric_dim": 65536, "num_gated_units": 1024, "num_residual_layers": 4096},
    ],
)
def test_sizes_that_no_model_has_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"^Model\.\w+ = \d+: .* at most"):
        ModelConfig(**sizes)


def test_every_number_of_a_config_is_bounded():
    """So that none reaches an array, a loop or a shift that it breaks."""
    for key, annotation in FIELDS.items():
        if "int" in str(annotation) or annotation is int:
            group, _, name = key.partition(".")
            with pytest.raises(ConfigError, match=name):
                GROUPS[group](**{name: 10**18})


# Paths.


@pytest.mark.parametrize(
    "field",
    ["Data.source", "Data.tokenizer", "Data.cache_dir", "Model.g_file", "Generation.g_file"],
)
def test_a_tilde_means_home_in_every_path(monkeypatch, field):
    monkeypatch.setenv("HOME", "/home/ada")
    group, _, name = field.partition(".")
    source = {"Model.g_file": ["Model.g_source=external"]}.get(field, [])
    source += {"Generation.g_file": ["Generation.g_mode=frozen"]}.get(field, [])
    config = load_config([], [*source, f"{field}=~/x"])
    assert config_to_dict(config)[group][name] == "/home/ada/x"
    assert config_error([], [*source, f"{field}=~nobody-here/x"]).endswith(
        "there is no home folder for '~nobody-here'; write it out"
    )
    assert config_error([], [*source, f"{field}="]).endswith("is empty; give a path")
    assert config_error([], [*source, f"{field}='a\\0'"]).endswith("the name of a file")


def test_every_field_that_names_a_file_is_a_path():
    paths = {
        f"{group}.{field.name}"
        for group, cls in GROUPS.items()
        for field in dataclasses.fields(cls)
        if field.metadata["path"]
    }
    assert paths == {
        "Data.source", "Data.mixture", "Data.tokenizer", "Data.cache_dir", "Data.chat_template",
        "Data.order", "Model.g_file", "Generation.g_file", "Lora.base", "Task.held_out",
    }  # fmt: skip
    named = {key for key in FIELDS if key.endswith(("_file", "_dir", "source", "tokenizer"))}
    assert named - {"Model.g_source"} <= paths


def test_a_tilde_in_the_name_of_a_config_file(gin, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    gin("include '~/b.gin'")
    gin("Model.num_layers = 5", "b.gin")
    assert load_config(["~/a.gin"]).model.num_layers == 5
    assert "no home folder for '~nobody-here'" in config_error(["~nobody-here/a.gin"])


def test_the_mesh_needs_no_model() -> None:
    """A command line may be right for a checkpoint's model alone."""
    overrides = ["Mesh.tensor=2", "Model.num_layers=0"]
    with pytest.raises(ConfigError, match="num_layers"):
        load_config([], overrides)
    assert load_mesh([], overrides) == MeshConfig(tensor=2)
    for override, message in (("Mesh.tensor=x", "Mesh.tensor"), ("Nope.a=1", "no such group")):
        with pytest.raises(ConfigError, match=message):
            load_mesh([], [override])
