"""Training laws: initialisers, schedules, rates of groups, targets, freezing, update rules."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, config_error, one_device_mesh

from pldr_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from pldr_jax.config.load import config_from_dict, config_to_dict, dump_config, load_config
from pldr_jax.model.decoder import init_params
from pldr_jax.runs.folder import check_same_run
from pldr_jax.training.laws.groups import groups_of, has_generator_rate
from pldr_jax.training.laws.schedule import learning_rate_schedule
from pldr_jax.training.laws.targets import chosen_position
from pldr_jax.training.losses import PAD_ID
from pldr_jax.training.optimizer import build_optimizer
from pldr_jax.training.step import (
    TrainState,
    abstract_state,
    accumulated_gradients,
    create_state,
    train_step,
)

MESH = one_device_mesh(MeshConfig())
ROWS = np.random.default_rng(0).integers(1, 64, (4, 4, 16)).astype(np.int32)
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=64,
        num_layers=1,
        num_heads=2,
        head_dim=8,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=16,
        unroll=False,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.1),
    data=DataConfig(batch_size=4),
    training=TrainingConfig(steps=12),
)


@functools.cache
def begin(config: ExperimentConfig = CONFIG) -> TrainState:
    return create_state(config, MESH)


@functools.cache
def compiled(config: ExperimentConfig) -> Any:
    return jax.jit(functools.partial(train_step, config))


def changed(config: ExperimentConfig, group: str, **fields: Any) -> ExperimentConfig:
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields)}
    )


# Initialisers


def drawn(init: str, heads: int, head_dim: int = 64) -> tuple[dict[str, np.ndarray], ModelConfig]:
    """Initial parameters of a model of one layer, by our names."""
    model = ModelConfig(
        init=init,  # type: ignore[arg-type]
        vocab_size=96,
        num_layers=1,
        num_heads=heads,
        head_dim=head_dim,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=8,
    )
    params = nn.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(3)))
    leaves = jax.tree.leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}, model


def assert_uniform(value: np.ndarray, limit: float, name: str) -> None:
    """Its bound is reached and not exceeded, and its moments are those of a uniform law."""
    assert limit * (1 - 30 / value.size) < np.abs(value).max() <= limit * (1 + 1e-6), name
    assert value.std() * math.sqrt(3) / limit == pytest.approx(
        1, abs=5 * math.sqrt(0.2 / value.size)
    )
    assert abs(value.mean()) < 5 * limit / math.sqrt(3 * value.size), name


@pytest.mark.parametrize("heads", [2, 4, 14])
def test_initialisers_have_the_stated_bounds(heads: int) -> None:
    H, N = 64, heads
    port, model = drawn("native_port", heads)
    scaled, _ = drawn("normalized", heads)
    D, F, V, M = N * H, model.ffn_width, 96, model.metric_width
    for name in ("W", "P", "a"):
        path = f"layers/attention/plga/{name}"
        assert_uniform(port[path], math.sqrt(6 / (H * H + N * H)), name)
        assert_uniform(scaled[path], math.sqrt(6 / (H * (H + 2))), name)
    attention = [(f"attention/{name}", D, D, 128, 128) for name in ("q", "k", "v", "out")]
    ffn = [("ffn/w1", D, F, 128, 341), ("ffn/w2", D, F, 128, 341), ("ffn/w3", F, D, 341, 128)]
    linears = [(f"layers/{name}", *fans) for name, *fans in attention + ffn]
    for name, fan_in, fan_out, r_in, r_out in (*linears, ("head", D, V, 128, V)):
        glorot = math.sqrt(6 / (fan_in + fan_out))
        factor = math.sqrt(r_in * (fan_in + fan_out) / (fan_in * (r_in + r_out)))
        assert_uniform(port[f"{name}/kernel"], glorot, name)
        assert_uniform(scaled[f"{name}/kernel"], glorot * factor, name)
    alone = "layers/attention/plga/residual/unit_0/w1/kernel"
    assert_uniform(scaled[alone], math.sqrt(6 / (H + M)), alone)
    for name, value in port.items():
        if heads == 2 or "residual" in name or "norm" in name or name == "embedding/table":
            np.testing.assert_array_equal(value, scaled[name], name)


# Schedules


def rates(config: OptimizerConfig, steps: int, peak: float | None = None) -> np.ndarray:
    schedule = learning_rate_schedule(config, steps, peak)
    return np.asarray([float(schedule(step)) for step in range(steps + 3)])


def test_constant_and_wsd_schedules() -> None:
    constant = OptimizerConfig(schedule="constant", learning_rate=2.0, warmup_steps=4)
    np.testing.assert_allclose(rates(constant, 6)[:6], [0.5, 1, 1.5, 2, 2, 2], rtol=1e-6)
    sudden = dataclasses.replace(constant, warmup_steps=0)
    assert (rates(sudden, 6) == 2).all()
    wsd = OptimizerConfig(
        schedule="wsd", learning_rate=2.0, warmup_steps=2, hold_until=4, end_lr_fraction=0.5
    )
    np.testing.assert_allclose(rates(wsd, 8), [0, 1, 2, 2, 2, 1.75, 1.5, 1.25, 1, 1, 1], rtol=1e-6)
    root = rates(dataclasses.replace(wsd, decay_shape="1-sqrt"), 8)
    np.testing.assert_allclose(root[4:9], 2 - np.sqrt([0, 0.25, 0.5, 0.75, 1]), rtol=1e-6)
    # None is four fifths of the way
    late = rates(dataclasses.replace(wsd, hold_until=None), 10)
    np.testing.assert_allclose(late[7:11], [2, 2, 1.5, 1], rtol=1e-6)


def test_pulses_replace_the_scheduled_rate() -> None:
    plain = OptimizerConfig(learning_rate=0.1, warmup_steps=2)
    pulsed = dataclasses.replace(plain, pulses=((1, 2, 0.7), (6, 1, 0.0)))
    before, after = rates(plain, 10), rates(pulsed, 10)
    inside = np.isin(np.arange(len(before)), [1, 2, 6])
    np.testing.assert_allclose(after[inside], [0.7, 0.7, 0], rtol=1e-6)
    np.testing.assert_array_equal(after[~inside], before[~inside])
    generator = rates(pulsed, 10, peak=0.3)
    np.testing.assert_allclose(generator, 3 * after, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["Optimizer.hold_until=5"], "hold_until = 5: is only read by 'hold' and 'wsd'"),
        (["Optimizer.schedule=hold", "Optimizer.hold_until=1000"], "hold_until = 1000: the peak"),
        (["Optimizer.pulses=((5, 3, 1e-3), (7, 1, 1e-3))"], "two of them share a step"),
        (["Optimizer.pulses=((5, 0, 1e-3),)"], "Optimizer.pulses = ((5, 0, 0.001),): a step is"),
        (["Optimizer.pulses=(5, 1, 1e-3)"], "Optimizer.pulses"),
        (["Training.freeze=(('ffn', 1), ('ffn', 2))"], "names a group twice"),
        (["Training.freeze=(('ffn', -1),)"], "a step is 0 or more"),
        (["Training.freeze=(('fnn', 1),)"], "Training.freeze"),
        (["Training.freeze=(('couplings', 1),)", "Model.g_source=identity"], "has none of"),
        (["Optimizer.generator_learning_rate=1e-3", "Model.g_source=identity"], "no generator"),
        (["Optimizer.metric_learner_weight_decay=1.0", "Model.g_source=identity"], "no generator"),
        (["Loss.targets=last", "Data.packing=packed"], "rows with segments know 'all' alone"),
        (["Optimizer.name=adam"], "did you mean adamw?"),
    ],
)
def test_laws_that_cannot_be_are_one_line(overrides: list[str], message: str) -> None:
    assert message in config_error(overrides=overrides)


def test_laws_are_read_back_as_they_were_written(gin: Any) -> None:
    """From `config.gin`, from a checkpoint's JSON, from a flag; and what older runs have stored."""
    fields = [
        "Training.freeze=(('generator', 6), ('ffn', 0))",
        "Optimizer.pulses=((5, 3, 1e-3), (9, 1, 0.0))",
        "Optimizer.average_decay=0.9",
        "Data.order=a.npy",
    ]
    config = load_config([], fields)
    assert config.training.freeze == (("generator", 6), ("ffn", 0))
    assert load_config([gin(dump_config(config))]) == config
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(stored) == config
    older = config_to_dict(ExperimentConfig())
    for group, name in (("Model", "init"), ("Loss", "targets"), ("Data", "order")):
        del older[group][name]
    for name in ("name", "schedule", "pulses", "average_decay"):
        del older["Optimizer"][name]
    for name in ("generator_learning_rate", "metric_learner_weight_decay"):
        del older["Optimizer"][name]
    del older["Training"]["freeze"]
    assert config_from_dict(older) == ExperimentConfig()


# Targets


def test_the_chosen_target_is_the_last_one_or_one_before_it() -> None:
    targets = np.full((4, 6), PAD_ID, np.int32)
    for row, places in enumerate(([0, 1, 2, 3, 4, 5], [1, 3, 4], [2], [])):
        targets[row, places] = 7
    assert chosen_position(targets, None).tolist() == [5, 4, 2, 6]
    seen = [
        chosen_position(targets, np.full(4, draw, np.float32)).tolist()
        for draw in np.linspace(0, 1, 50, endpoint=False)
    ]
    assert [sorted(set(places)) for places in zip(*seen, strict=True)] == [
        [0, 1, 2, 3, 4], [1, 3], [6], [6],
    ]  # fmt: skip
    assert [row[0] for row in seen].count(2) == 10  # equally often


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["last", "random_one"])
def test_one_target_a_row_in_microbatches(targets: str) -> None:
    """The same loss and gradient as in one batch, of one target a row, other ones each step."""
    config = changed(CONFIG, "loss", targets=targets)
    params, rows = begin().params, ROWS[0]
    whole, parts = (
        jax.jit(functools.partial(accumulated_gradients, each))
        for each in (config, changed(config, "training", grad_accumulation=2))
    )
    one, two = whole(params, None, rows, 5), parts(params, None, rows, 5)
    assert float(one[1].count) == float(two[1].count) == 4
    assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-6)
    head = [np.asarray(result[3]["head"]["kernel"]) for result in (one, two)]
    assert np.abs(head[0] - head[1]).max() < 1e-5 * np.abs(head[0]).max()
    later = whole(params, None, rows, 6)
    assert (float(later[0]) == float(one[0])) == (targets == "last")


def test_the_last_target_costs_no_other_logits() -> None:
    for targets, everywhere in (("last", False), ("all", True)):
        config = changed(CONFIG, "loss", targets=targets)
        compute = jax.jit(functools.partial(accumulated_gradients, config))
        program = compute.lower(begin().params, None, ROWS[0]).compile().as_text()
        assert ("f32[4,15,64]" in program or "f32[60,64]" in program) == everywhere


# Freezing


def test_every_parameter_has_the_groups_of_its_place() -> None:
    found: dict[tuple[str, ...], set[str]] = {}
    for path, _ in jax.tree.leaves_with_path(begin().params):
        name = "/".join(key.key for key in path).removeprefix("layers/")
        found.setdefault(groups_of(path), set()).add(name.split("/unit")[0])
    plga = "attention/plga"
    assert found == {
        ("generator", "couplings"): {f"{plga}/{name}" for name in ("W", "b_W", "P", "a", "b_a")},
        ("generator", "metric_learner"): {
            f"{plga}/density_norm/bias", f"{plga}/density_norm/scale",
            f"{plga}/residual", f"{plga}/residual/norm/bias", f"{plga}/residual/norm/scale",
        },
        ("attention",): {
            f"attention/{name}/{kind}" for name in ("q", "k", "v", "out")
            for kind in ("kernel", "bias")
        },
        ("ffn",): {f"ffn/w{k}/{kind}" for k in (1, 2, 3) for kind in ("kernel", "bias")},
        ("embedding",): {"embedding/table"},
        ("head",): {"head/kernel", "head/bias"},
        (): {
            f"{place}norm/{kind}" for place in ("attention_", "ffn_", "embedding/")
            for kind in ("bias", "scale")
        },
    }  # fmt: skip


def test_a_frozen_leaf_keeps_its_bits() -> None:
    """From its step on, with decay and momentum; and nothing is remembered of what is frozen from
    the start.
    """
    freeze = (("couplings", 2), ("ffn", 0), ("head", 0), ("attention", 1))
    config = changed(CONFIG, "training", freeze=freeze)
    config = changed(config, "optimizer", average_decay=0.5)
    states = [begin(config)]
    for rows in ROWS:
        states.append(compiled(config)(states[-1], rows)[0])
    params = states[0].params
    for path, _ in jax.tree.leaves_with_path(params):
        values = [leaf_at(state.params, path).tobytes() for state in states]
        start = min((step for group, step in freeze if group in groups_of(path)), default=9)
        moved = [one != other for one, other in zip(values, values[1:], strict=False)]
        assert moved == [step < start for step in range(4)], path
        average = leaf_at(states[-1].opt_state.average, path)
        assert (average.tobytes() == values[0]) == (start == 0)

    def memory(config: ExperimentConfig) -> int:
        state = abstract_state(changed(config, "optimizer", average_decay=None), MESH)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.opt_state))

    still = [
        math.prod(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(params)
        if {"ffn", "head"} & set(groups_of(path))
    ]
    assert memory(CONFIG) - memory(config) == 2 * sum(still)


def leaf_at(tree: Any, path: Any) -> np.ndarray:
    for key in path:
        tree = tree[key.key]
    return np.asarray(tree)


@pytest.mark.parametrize(
    "group,before,after",
    [
        ("training", {"freeze": (("ffn", 5),)}, {"freeze": (("ffn", 0),)}),
        ("optimizer", {}, {"name": "lion"}),
        ("optimizer", {"generator_learning_rate": 1e-3}, {"generator_learning_rate": None}),
        ("optimizer", {}, {"metric_learner_weight_decay": 0.5}),
        ("optimizer", {}, {"average_decay": 0.9}),
    ],
)
def test_a_run_goes_on_with_what_its_optimiser_remembers(
    tmp_path: Path, group: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    saved, other = changed(CONFIG, group, **before), changed(CONFIG, group, **after)
    with pytest.raises(ConfigError, match=f"{next(iter(after))} = .*another --run_dir"):
        check_same_run(tmp_path, saved, other, b"")
    check_same_run(tmp_path, saved, saved, b"")
    later = changed(CONFIG, "training", freeze=(("ffn", 7),))
    check_same_run(tmp_path, changed(CONFIG, "training", freeze=(("ffn", 5),)), later, b"")


# Update rules


@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_metric_learner_decays_at_its_own_rate(rate: float | None) -> None:
    """Without gradients an update is minus rate times decay times the parameter."""
    config = OptimizerConfig(
        schedule="constant", warmup_steps=0, learning_rate=0.1, weight_decay=0.5,
        metric_learner_weight_decay=2.0, generator_learning_rate=rate,
    )  # fmt: skip
    params = jax.tree.map(jnp.ones_like, begin().params)
    rule = build_optimizer(config, 10)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    for path, update in jax.tree.leaves_with_path(updates):
        decay = 2.0 if "metric_learner" in groups_of(path) else 0.5
        expected = -decay * ((rate if has_generator_rate(path) else None) or 0.1)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "muon", "adafactor", "lion"])
def test_update_rules_lower_the_loss_and_have_a_place_for_all_they_remember(name: str) -> None:
    rate = {"sgd": 0.1, "muon": 3e-3, "adafactor": 3e-3, "lion": 1e-3}[name]
    config = changed(CONFIG, "optimizer", name=name, learning_rate=rate, weight_decay=0.0,
                     schedule="constant", generator_learning_rate=rate)  # fmt: skip
    config = changed(config, "training", freeze=(("embedding", 0),))
    state = first = begin(config)
    planned = abstract_state(config, MESH)
    assert jax.tree.structure(planned) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(planned), jax.tree.leaves(state), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    losses = []
    for _ in range(4):
        state, metrics = compiled(config)(state, ROWS[0])
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < losses[0] - 0.02, losses
    assert_same_bits(state.params["embedding"]["table"], first.params["embedding"]["table"])


@pytest.mark.slow
def test_muon_makes_orthogonal_updates_of_matrices_alone() -> None:
    """The update of W and a, head by head, and of joined heads of q has singular values near one
    size; P, an exponent, is no matrix.
    """
    config = changed(CONFIG, "optimizer", name="muon", weight_decay=0.0)
    after = compiled(config)(begin(config), ROWS[0])[0].params
    moved = jax.tree.map(lambda new, old: np.asarray(new - old), after, begin(config).params)
    attention = moved["layers"]["attention"]
    q = attention["q"]["kernel"].reshape(1, 16, 16)
    for matrices in (q, attention["plga"]["W"], attention["plga"]["a"]):
        values = np.linalg.svd(matrices, compute_uv=False)
        assert (values[..., 0] < 2.5 * values[..., -2]).all(), values
    # A first step of AdamW is of one size, but for eps.
    sizes = [np.abs(attention["plga"][name]) for name in ("P", "W")]
    assert [size.max() < 1.1 * np.median(size) for size in sizes] == [True, False]
