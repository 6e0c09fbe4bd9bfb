"""Plans: bytes and operations of a run that is not started, and what is refused."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import pytest
from helpers import flags, make_corpus, run_here

from pldr_jax.cli.training.train import train_main
from pldr_jax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    TaskConfig,
    TrainingConfig,
)
from pldr_jax.config.load import load_config
from pldr_jax.data.rows import row_shape
from pldr_jax.model import plga
from pldr_jax.model.counts.flops import forward_flops, repeated_flops, training_flops
from pldr_jax.model.decoder import init_params
from pldr_jax.model.lora import count_adapter_params
from pldr_jax.partition import build_mesh
from pldr_jax.training import loop
from pldr_jax.training.plan import compile as plans
from pldr_jax.training.plan import plan as planning
from pldr_jax.training.plan.chips import CHIPS, Chip, ChipName
from pldr_jax.training.plan.predict import predict
from pldr_jax.training.plan.settings import PlanConfig
from pldr_jax.training.step import create_state, loss_fn

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=64,
        num_layers=2,
        head_dim=8,
        num_residual_layers=1,
        num_gated_units=1,
        context_length=17,
        unroll=False,
    ),
    data=DataConfig(batch_size=8),
    training=TrainingConfig(steps=300),
    mesh=MeshConfig(2, 2, 2),
)
PLAN = plans.Plan(
    parameters=10**9,
    mesh={"data": 1, "fsdp": 8, "tensor": 1},
    compiler="",
    state_bytes=15 * 10**8,
    trained_bytes=5 * 10**8,
    step_bytes=10**10,
    saved_bytes=5 * 10**9,
    model_flops=1e14,
    device_flops=1.25e13,
    tokens=16_000,
)


@functools.cache
def planned(config: ExperimentConfig = CONFIG) -> plans.Plan:
    return plans.make_plan(config, build_mesh(CONFIG.mesh), "")


@pytest.mark.parametrize(
    "source, segments",
    [("learned", 1), ("identity", 1), ("random", 1), ("learned", 3), ("random", 3)],
)
def test_operations_are_those_of_the_unrolled_model(
    source: Any, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plga, "residual_unroll", lambda config: config.num_residual_layers)
    model = ModelConfig(
        num_layers=2, num_heads=4, head_dim=64, context_length=257, num_residual_layers=3,
        g_source=source,
    )  # fmt: skip
    data = DataConfig(packing="packed" if segments > 1 else "concat", max_segments=segments)
    config, rows = ExperimentConfig(model=model, data=data), 4
    params = nn.unbox(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    shape = (2, 1, 4, 64, 64)
    g_lm = jax.ShapeDtypeStruct(shape, "float32") if source == "random" else None
    batch = jax.ShapeDtypeStruct((rows, *row_shape(data.packing, 257)), "int32")
    grads = jax.jit(jax.grad(lambda p, g, b: loss_fn(config, p, g, b)[0]))
    counted = grads.lower(params, g_lm, batch).cost_analysis()["flops"]
    # What is over are element-wise operations.
    made = training_flops(model, rows, 256, segments) + repeated_flops(model, rows, 256, segments)
    assert 1 < counted / made < 1.02


def test_operations_of_the_published_model() -> None:
    model = load_config([Path(__file__).parents[1] / "configs" / "pldr_110m.gin"]).model
    parts = forward_flops(model, 1024)
    assert parts["ffn"] == 5 * 1024 * 6 * 896 * 2389
    assert parts["head"] == 1024 * 2 * 896 * 32000
    everything = dataclasses.replace(model, remat="full")
    residual_layers = 5 * 14 * 64 * 8 * 2 * 6 * 64 * 170
    assert repeated_flops(model, 1, 1024) == residual_layers
    whole = sum(parts.values()) - parts["head"]
    assert repeated_flops(everything, 1, 1024) == whole + residual_layers
    assert repeated_flops(dataclasses.replace(model, g_source="identity"), 1, 1024) == 0


def test_bytes_are_those_of_the_state_and_of_the_compiled_step() -> None:
    made, state = planned(), create_state(CONFIG, build_mesh(CONFIG.mesh))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert made.state_bytes == held
    assert made.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 0 < made.saved_bytes < made.step_bytes and made.tokens == 8 * 16
    # All of the model's operations, on 8 devices: every axis divides but F = 42 / 2 does too.
    repeated = repeated_flops(CONFIG.model, made.tokens // 16, 16)
    assert made.device_flops * 8 == pytest.approx(made.model_flops + repeated)
    # The logits of a device's 2 rows, of half of the vocabulary, and their gradient.
    assert made.step_bytes > 2 * 2 * 16 * 32 * 4


def test_a_plan_of_adapters_and_of_a_head() -> None:
    """Of the optimiser's state, only that of adapters, and of the head of a task, is there."""
    mesh = build_mesh(CONFIG.mesh)
    task = TaskConfig(kind="sequence", labels=("a", "b"))
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2), task=task)
    made = plans.make_plan(config, mesh, "")
    params = nn.unbox(init_params(config.model, jax.random.key(0)))
    state = create_state(config, mesh, None, params)
    sizes = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        for tree in (state, state.params)
    ]
    assert [made.state_bytes, made.trained_bytes] == sizes
    assert 3 * sizes[1] < sizes[0] and 0 < made.saved_bytes
    assert made.sample_bytes == 0 and made.evaluation_bytes > 0
    count = count_adapter_params(config.model, config.lora)
    assert (
        f"and {count:,} in adapters" in planning.plan_lines(config, made, None, None)["parameters"]
    )
    with pytest.raises(ConfigError, match=r"^Task.labels = \(\): a plan reads no text"):
        unnamed = dataclasses.replace(CONFIG, task=TaskConfig(kind="token"))
        plans.make_plan(unnamed, mesh, "")


def test_a_plan_of_rows_of_any_packing() -> None:

    def of(**fields: Any) -> plans.Plan:
        return planned(dataclasses.replace(CONFIG, data=DataConfig(batch_size=8, **fields)))

    pack, document = planned(), of(packing="document")
    assert document.model_flops == pack.model_flops
    few, more = (of(packing="packed", max_segments=k) for k in (2, 4))
    once = sum(forward_flops(CONFIG.model, 16).values())
    again = forward_flops(CONFIG.model, 16)["plga"]
    assert few.model_flops / pack.model_flops == pytest.approx(1 + again / once)
    assert more.model_flops / pack.model_flops == pytest.approx(1 + 3 * again / once)
    repeated = repeated_flops(CONFIG.model, 8, 16, segments=4)
    assert more.device_flops * 8 == pytest.approx(more.model_flops + repeated)
    assert document.bytes < few.bytes < more.bytes


def test_parts_that_do_not_divide_are_not_split() -> None:
    model = dataclasses.replace(CONFIG.model, num_heads=3, ffn_dim=42)
    config = dataclasses.replace(CONFIG, model=model)
    parts = forward_flops(model, 16)
    whole = parts["projections"] + parts["attention"] + parts["plga"]
    repeated = repeated_flops(model, 1, 16) / sum(parts.values())
    expected = 8 / 4 * (3 + repeated) * (whole + (parts["ffn"] + parts["head"]) / 2)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert plans._device_flops(config, sizes) == pytest.approx(expected)


def test_prediction_is_a_roofline() -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="bfloat16"))
    fast = Chip("fast", 1e14, 1e11, 1e30, 1e30, 1e30)
    exact = predict(config, PLAN, fast)
    assert exact.low == pytest.approx(1) and exact.high == pytest.approx(1)
    # 8 devices gather 4 GB of parameters twice and scatter 4 GB of gradients, 7/8 of them each.
    linked = predict(config, PLAN, dataclasses.replace(fast, link=1e10))
    assert linked.links == pytest.approx(3 * 4e9 * 7 / 8 / 1e10)
    assert linked.high == pytest.approx(0.125 / linked.links)
    assert linked.low == pytest.approx(0.125 / (0.125 + linked.links))
    # Over more than one node it is the network that counts.
    nodes = dataclasses.replace(fast, link=1e10, network=1e9, node=4)
    assert predict(config, PLAN, nodes).links == pytest.approx(10 * linked.links)


def test_what_does_not_fit_is_refused() -> None:
    planning.check_fits(PLAN, CHIPS["v5e"])
    with pytest.raises(ConfigError, match=r"does not fit v5e: 21.50 GB a chip \(state 1.50 GB"):
        planning.check_fits(dataclasses.replace(PLAN, step_bytes=2 * 10**10), CHIPS["v5e"])
    with pytest.raises(ConfigError, match="^Data.batch_size = 6: must be a multiple of the 4"):
        config = dataclasses.replace(CONFIG, data=DataConfig(batch_size=6))
        plans.make_plan(config, build_mesh(CONFIG.mesh), "")


def test_a_plan_counts_microbatches() -> None:
    training = dataclasses.replace(CONFIG.training, grad_accumulation=2)
    whole, half = planned(), planned(dataclasses.replace(CONFIG, training=training))
    assert half.saved_bytes < 0.6 * whole.saved_bytes
    assert (half.model_flops, half.state_bytes) == (whole.model_flops, whole.state_bytes)
    # The parameters of each microbatch are gathered anew; the products stay.
    slow = dataclasses.replace(CHIPS["h100"], link=1e6, network=1e6)
    one = predict(CONFIG, PLAN, slow)
    two = predict(dataclasses.replace(CONFIG, training=training), PLAN, slow)
    assert two.compute == one.compute and two.links > 1.9 * one.links
    assert two.memory > one.memory
    lines = planning.plan_lines(dataclasses.replace(CONFIG, training=training), half, None, None)
    assert "in 2 microbatches" in lines["batch"]


@pytest.mark.parametrize("parts,batch", [(1, 6), (2, 4), (3, 8)])
def test_a_plan_refuses_what_training_refuses_in_the_same_words(
    tmp_path: Path, parts: int, batch: int
) -> None:
    training = dataclasses.replace(CONFIG.training, grad_accumulation=parts)
    config = dataclasses.replace(CONFIG, training=training, data=DataConfig(batch_size=batch))
    with pytest.raises(ConfigError) as planned:
        plans.make_plan(config, build_mesh(CONFIG.mesh), "")
    with pytest.raises(ConfigError) as trained:
        loop.train(config, tmp_path / "run")
    assert str(planned.value) == str(trained.value) and "must be a multiple of" in str(
        trained.value
    )


def test_a_plan_reads_the_g_file_that_training_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    model = dataclasses.replace(CONFIG.model, g_source="external", g_file=str(tmp_path / "no.npz"))
    config = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(ConfigError, match="Model.g_file"):
        planning.plan_run(config, PlanConfig(devices=8))
    # A checkpoint that fine-tuning begins with holds its own.
    assert planning.plan_run(config, PlanConfig(devices=8), True, log=lambda line: None).parameters


def test_mesh_size() -> None:
    assert get_args(ChipName) == tuple(CHIPS)
    with pytest.raises(ConfigError, match="^Mesh: makes 4,611,686"):
        plans.mesh_size(MeshConfig(2**31 - 1, 2**31 - 1, 1), None)

    assert plans.mesh_size(MeshConfig(-1, 4, 2), None) == 8
    assert plans.mesh_size(MeshConfig(-1, 4, 2), 16) == 16
    with pytest.raises(ConfigError, match="must make 6, the number of devices"):
        plans.plan_mesh(MeshConfig(-1, 4, 1), 6, None)


FLAGS = (
    "--gin.Model.vocab_size=64", "--gin.Model.num_layers=1", "--gin.Model.head_dim=8",
    "--gin.Model.num_residual_layers=0", "--gin.Model.context_length=16",
    "--gin.Model.unroll=False", "--gin.Mesh.fsdp=2", "--gin.Model.dtype=bfloat16",
)  # fmt: skip


def test_program_prints_a_plan_and_refuses_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)  # 8 devices as they are
    arguments = ["--plan", "--chip=h100", "--devices=2", *FLAGS]
    status, out, err = run_here(capsys, train_main, *arguments)
    assert (status, err) == (0, "")
    for text in ("data 1 x fsdp 2 x tensor 1 = 2 devices", "state", "h100: 989", "predicted MFU"):
        assert text in out
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(planning, "make_plan", lambda *_: PLAN)
    tiny = dataclasses.replace(CHIPS["h100"], memory=1000)
    monkeypatch.setitem(CHIPS, "h100", tiny)
    status, out, err = run_here(capsys, train_main, *arguments)
    assert status == 2 and "together" in out
    assert err.startswith("error: Mesh = (1, 8, 1): does not fit h100: ") and err.count("\n") == 1
    shown: list[ExperimentConfig] = []
    monkeypatch.setattr(planning, "make_plan", lambda config, *_: shown.append(config) or PLAN)
    plan = ["--plan", "--gin.Data.packing=packed", "--gin.Data.max_segments=3", *FLAGS]
    assert "2 a device, 3 documents in each at" in run_here(capsys, train_main, *plan)[1]
    text = make_corpus(tmp_path / "text", 30)
    open_ = flags(text, {"Data.packing": "packed", "Data.cache_dir": tmp_path / "cache"})
    status, out, _ = run_here(capsys, train_main, "--plan", *open_)
    assert status == 0 and "Data.max_segments = 1: rows 9" in out
    assert [one.data.segments_per_row for one in shown] == [3, 1]
    for argument in ("--chip=v5e", "--devices=4"):
        status, _, err = run_here(capsys, train_main, argument)
        assert status == 2 and "needs --plan" in err


def test_the_largest_of_step_evaluation_and_sample_decides() -> None:
    """And each of them is compiled: a longer batch of held-out rows, a larger vocabulary."""
    made = planned()
    assert made.evaluation_bytes > 0 and made.sample_bytes > 0
    decode_weights = 4 * made.parameters // 8
    assert made.sample_bytes > decode_weights
    for name in ("step_bytes", "evaluation_bytes", "sample_bytes"):
        one = dataclasses.replace(PLAN, **{name: 2 * 10**10})
        assert one.bytes == PLAN.state_bytes + 2 * 10**10
        with pytest.raises(ConfigError, match="does not fit v5e: .* evaluation .* sample"):
            planning.check_fits(one, CHIPS["v5e"])
    training = dataclasses.replace(CONFIG.training, sample_prompt="")
    without = plans.make_plan(
        dataclasses.replace(CONFIG, training=training), build_mesh(CONFIG.mesh), ""
    )
    assert without.sample_bytes == 0
