"""Adapters: what is trained and saved, the base that stays, merging, PEFT's layout."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import (
    assert_equal_runs,
    assert_same_bits,
    contents,
    corpus_of,
    finished_run,
    flags,
    one_device_mesh,
    run_here,
    tiny_config,
    train_here,
)

from pldr_jax.api import load
from pldr_jax.cli.convert import convert_main
from pldr_jax.cli.infer import infer_main
from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError, ExperimentConfig, LoraConfig, MeshConfig, TaskConfig
from pldr_jax.config.load import config_to_dict, load_config
from pldr_jax.interop.names import to_tensors
from pldr_jax.interop.peft import export_adapter, merge_run
from pldr_jax.interop.tensors import read_safetensors
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.model.decoder import init_params
from pldr_jax.model.lora import (
    count_adapter_params,
    digest_of,
    init_adapters,
    target_shapes,
)
from pldr_jax.partition import build_mesh
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.folder import write_run
from pldr_jax.training.finetune.begin import start_from
from pldr_jax.training.step import create_state, jit_train_step, loss_fn

TOKENS = np.asarray([[5, 40, 99, 7, 12, 130, 9, 4]])
TARGETS = ("q", "v", "head")
FIELDS = {
    "Lora.rank": 2,
    "Lora.targets": TARGETS,
    "Training.steps": 4,
    "Training.eval_every": 4,
    "Training.sample_prompt": "",
    "Checkpoint.save_every": 2,
    "Optimizer.warmup_steps": 1,
    "Optimizer.decay_steps": 4,
    "Optimizer.weight_decay": 0.0,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def base(session: Path) -> Path:
    return finished_run(session)[0]


def flags_of(session: Path, base: Path, **fields: Any) -> list[str]:
    return [f"--init_from={base}", *flags(corpus_of(session), FIELDS | fields)]


@pytest.fixture(scope="module")
def adapted(session: Path, base: Path) -> Path:
    """A run of adapters on the finished run; nothing may change it."""
    run_dir = session / "adapted"
    overrides = [flag.removeprefix("--gin.") for flag in flags(corpus_of(session), FIELDS)]
    config, initial = start_from(base, run_dir, [], overrides)
    train_here(config, run_dir, initial=initial)
    return run_dir


def test_counts_of_the_published_shape() -> None:
    model = load_config(["pldr_110m.gin"]).model
    for targets in (
        TARGETS,
        (r"layers\.attention\.[qv]", "hea."),
        ("attention.(q|v)$", "head.kernel"),
    ):
        lora = LoraConfig(rank=4, targets=targets)
        assert count_adapter_params(model, lora) == 203_264
    shapes = target_shapes(model, LoraConfig(rank=1, targets=("out", r"unit_1\.w3")))
    assert shapes["layers", "attention", "out"] == (5, 896, 896)
    assert shapes["layers", "attention", "plga", "residual", "unit_1", "w3"] == (5, 8, 170, 64)
    for target in ("qq", "W", "embedding.table", "norm", "a"):
        with pytest.raises(
            ConfigError, match=r"Lora\.targets = .*is no linear map; there are head, "
        ):
            target_shapes(model, LoraConfig(rank=1, targets=(target,)))
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        LoraConfig(targets=("(",))


def config_of(**lora: Any) -> ExperimentConfig:
    config = tiny_config(Path("x"), {"Model.num_layers": 1, "Model.unroll": False})
    return dataclasses.replace(config, lora=LoraConfig(**lora))


def test_a_step_trains_the_adapters_alone() -> None:
    """Gradients through the sum are those of W + scale A B, by hand; the base keeps its bits."""
    config = config_of(rank=2, alpha=6.0, targets=("out", "w1", "head"))
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=0, weight_decay=0.0)
    )
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(1)))
    kept = jax.device_get(params)
    mesh = one_device_mesh(config.mesh)
    rows = np.random.default_rng(0).integers(4, 300, (8, 32)).astype(np.int32)
    with jax.set_mesh(mesh):
        state = create_state(config, mesh, None, params)
        names = {path[:-1] for path in flatten_dict(state.params)}
        assert names == set(target_shapes(config.model, config.lora)) and len(names) == 5
        moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
        assert sorted(moments) == sorted(2 * [x.shape for x in jax.tree.leaves(state.params)])
        grads = jax.device_get(
            jax.jit(jax.grad(lambda p: loss_fn(config, p, None, rows)[0]))(params)
        )
        before = jax.device_get(state.params)
        after, _ = jit_train_step(config, mesh, state)(state, rows)
    assert_same_bits(jax.device_get(after.base), kept)
    first = before["head"]["a"]
    assert (before["head"]["b"] == 0).all() and 0 < abs(first).max() <= 1 / 4
    assert (after.params["head"]["a"] == first).all()  # B is 0, and so is the gradient of A
    by_hand = 3.0 * first.T @ grads["head"]["kernel"]
    moved = np.asarray(after.params["head"]["b"])
    rate, eps = config.optimizer.learning_rate, config.optimizer.eps
    np.testing.assert_allclose(moved, -rate * by_hand / (abs(by_hand) + eps), rtol=2e-3, atol=1e-7)


@pytest.mark.slow
def test_a_step_on_a_mesh_is_that_of_one_device() -> None:
    config = config_of(rank=2, targets=("q", "out", "w1", "head"))
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, warmup_steps=0)
    )
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(1)))
    params = jax.device_get(params)
    rows = np.random.default_rng(0).integers(4, 300, (8, 32)).astype(np.int32)
    results = []
    for mesh in (one_device_mesh(config.mesh), build_mesh(MeshConfig(2, 2, 2))):
        with jax.set_mesh(mesh):
            state = create_state(config, mesh, None, params)
            state, metrics = jit_train_step(config, mesh, state)(state, rows)
            results.append(jax.device_get((state.params, metrics["train/loss"], state.base)))
            kernel = state.base["layers"]["attention"]["q"]["kernel"]
            assert kernel.sharding.is_fully_replicated == (mesh.size == 1)
    (one, loss, base), (other, other_loss, other_base) = results
    assert abs(loss - other_loss) < 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), one, other)
    assert_same_bits(base, other_base)


@pytest.mark.slow
def test_merged_is_unmerged(adapted, base) -> None:
    """The head's adapter applied beside the head; and, of all of them, W + scale A B by hand."""
    lm, plain, weights = load(adapted), open_checkpoint(base), read_weights(adapted)
    assert set(weights.params) == {"layers", "head"}
    flat, old, new = (flatten_dict(x) for x in (weights.params, plain.params, lm.params))
    for path, kernel in new.items():
        a = flat.get((*path[:-1], "a"))
        if path[-1] != "kernel" or a is None:
            assert (np.asarray(kernel) == np.asarray(old[path])).all()
            continue
        b = flat[*path[:-1], "b"]
        change = 2.0 * np.einsum("...ir,...ro->...io", np.float64(a), np.float64(b))
        assert abs(change).max() > 1e-4
        np.testing.assert_allclose(
            kernel, np.asarray(old[path]) + change.reshape(kernel.shape), atol=1e-6
        )
    out = lm(TOKENS)
    head, adapter = plain.params["head"], weights.params["head"]
    beside = out.hidden @ head["kernel"] + 2.0 * (out.hidden @ adapter["a"]) @ adapter["b"]
    np.testing.assert_allclose(beside + head["bias"], out.logits, atol=1e-5)
    assert abs(np.asarray(load(base)(TOKENS).logits) - np.asarray(out.logits)).max() > 1e-3


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_and_the_name_of_its_base(adapted, base) -> None:
    before = digest_of(*(lambda x: (x.params, x.g_lm))(open_checkpoint(base)))
    config = LoraConfig(**read_weights(adapted).config_dict["Lora"])
    assert (config.base, config.base_step) == (str(base.resolve()), 12)
    assert config.base_digest == before
    size = sum(len(data) for name, data in contents(adapted / "checkpoints" / "4").items())
    whole = sum(len(data) for name, data in contents(base / "checkpoints" / "12").items())
    assert size < whole / 2


@pytest.mark.slow
def test_a_stopped_run_of_adapters_goes_on_bit_for_bit(session, adapted, base, tmp_path) -> None:
    other = Path(shutil.copytree(adapted, tmp_path / "other"))
    shutil.rmtree(other / "checkpoints" / "4")
    overrides = [flag.removeprefix("--gin.") for flag in flags(corpus_of(session), FIELDS)]
    config, initial = start_from(base, other, [], overrides)
    train_here(config, other, resume="required", initial=initial)
    assert_equal_runs(adapted, other)


@pytest.mark.slow
def test_another_base_and_other_adapters_are_refused(
    session, adapted, base, tmp_path, capsys, monkeypatch
) -> None:
    """In one line, and nothing is written."""
    other = Path(shutil.copytree(adapted, tmp_path / "other"))
    before = contents(other)

    def train(*arguments: str) -> str:
        status, _, error = run_here(capsys, train_main, f"--run_dir={other}", *arguments)
        assert status == 2 and error.count("\n") == 1 and contents(other) == before, error
        return str(error)

    line = train(*flags_of(session, base, **{"Lora.alpha": 3.0}))
    assert "Lora.alpha = 3.0: the run in" in line
    line = train(*flags_of(session, base, **{"Lora.targets": ("q",)}))
    assert "Lora.targets = ('q',): the run in" in line
    moved, merged = tmp_path / "moved", open_checkpoint(adapted)  # merged, it is another model
    files = {"tokenizer.model": (base / "tokenizer.model").read_bytes()}
    write_run(moved, 12, merged.params, None, config_to_dict(merged.config), files)
    line = train(*flags_of(session, moved))
    assert (
        f"--init_from={moved}: has not the weights that the adapters of {other} belong to" in line
    )
    assert "Lora.rank = 2: adapters need the weights" in train(*flags(corpus_of(session), FIELDS))
    status, _, error = run_here(
        capsys, train_main, f"--run_dir={tmp_path / 'new'}", *flags(corpus_of(session), FIELDS)
    )
    assert status == 2 and "Lora.rank = 2: adapters need the weights" in error
    (other / "base").symlink_to(moved)
    with pytest.raises(ConfigError, match=f"{other}/base: has not the weights that the adapters"):
        load(other)
    (other / "base").unlink()
    (other / "base").symlink_to(base)
    expected = load(adapted).params
    monkeypatch.setattr("pldr_jax.interop.weights.Path", _moved(base))
    assert_same_bits(load(other).params, expected)
    with pytest.raises(ConfigError, match=r"belong to .*, which is not there; put that, or a link"):
        load(adapted)


def _moved(base: Path) -> Any:
    """`Path`, as if the base lay elsewhere now."""

    def path(name: Any) -> Path:
        return Path("/nowhere") if str(name) == str(base.resolve()) else Path(name)

    return path


@pytest.mark.slow
def test_programs_merge_export_and_import(adapted, base, tmp_path, capsys) -> None:
    def convert(*arguments: object) -> tuple[Any, ...]:
        return run_here(capsys, convert_main, *arguments)

    merged, peft, back = (tmp_path / name for name in ("merged", "peft", "back"))
    assert convert("merge", adapted, merged)[0] == 0
    expected = load(adapted)
    assert_same_bits(load(merged).params, expected.params)
    assert open_checkpoint(merged).config.lora == LoraConfig()
    assert "has no adapters; there is" in convert("merge", merged, tmp_path / "no")[2]
    assert convert("export", merged, tmp_path / "no", "--adapter")[0] == 2
    assert convert("export", adapted, peft, "--adapter")[0] == 0
    settings = json.loads((peft / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (2, 4.0, "LORA")
    tensors, _ = read_safetensors(peft / "adapter_model.safetensors")
    prefix = "base_model.model.decoder.dec_layers.1.mha1.wq"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (2, 16)
    assert tensors["base_model.model.final_layer.lora_B.weight"].shape == (300, 2)
    assert len(tensors) == 2 * len(settings["target_modules"]) == 10
    assert (
        convert("import", peft, back)[2]
        == "error: --base: name the checkpoint that the adapters belong to\n"
    )
    assert convert("import", peft, back, f"--base={base}")[0] == 0
    assert_same_bits(load(back).params, expected.params)
    assert convert("export", back, tmp_path / "again", "--adapter")[0] == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (peft / name).read_bytes()
    status, _, error = convert("import", peft, tmp_path / "no", f"--base={merged}")
    assert status == 2 and "has not the weights that the adapters of" in error
    settings["use_dora"] = True
    (peft / "adapter_config.json").write_text(json.dumps(settings))
    status, _, error = convert("import", peft, tmp_path / "no", f"--base={base}")
    assert status == 2 and "adapter_config.json: asks for use_dora" in error
    assert not (tmp_path / "no").exists()
    arguments = (f"--checkpoint={adapted}", "--prompt=def", "--max_new_tokens=4")
    status, out, _ = run_here(capsys, infer_main, *arguments)
    (text,) = expected.generate("def", max_new_tokens=4)
    assert status == 0 and text.text in out


@pytest.mark.slow
def test_peft_reads_the_layout(adapted, tmp_path, capsys) -> None:
    peft = pytest.importorskip("peft", reason="reads the adapters as others do")
    assert run_here(capsys, convert_main, "export", adapted, tmp_path / "peft", "--adapter")[0] == 0
    config = peft.PeftConfig.from_pretrained(tmp_path / "peft")
    assert (config.r, config.lora_alpha) == (2, 4.0)


@pytest.mark.parametrize("task", [None, "token"])
def test_peft_merges_to_the_same_weights(task: Any, tmp_path: Path) -> None:
    """PEFT itself loads what was exported into torch modules of the published names."""
    peft = pytest.importorskip("peft", reason="merges the adapters as others do")
    torch = pytest.importorskip("torch", reason="PEFT needs it")
    lora = LoraConfig(rank=2, alpha=6.0, targets=("q", "w1"), base=str(tmp_path / "base"))
    config = config_of()
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(1)))
    write_run(tmp_path / "base", 0, params, None, config_to_dict(config), {})
    lora = dataclasses.replace(lora, base_step=0, base_digest=digest_of(params, None))
    labels = ("a", "b", "c")
    model = dataclasses.replace(config.model, task=task, num_labels=3 if task else 0)
    data = dataclasses.replace(config.data, packing="document" if task else "concat")
    named = TaskConfig(labels=labels if task else ())
    config = dataclasses.replace(config, model=model, lora=lora, task=named, data=data)
    adapters = init_adapters(model, lora, jax.random.key(2))
    noise = jax.random.key(3)
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(noise, x.shape), adapters)
    if task:
        adapters["head"] = {
            "kernel": params["head"]["kernel"][:, :3],
            "bias": np.arange(3.0, dtype="f"),
        }
    write_run(tmp_path / "run", 0, adapters, None, config_to_dict(config), {})
    export_adapter(tmp_path / "run", tmp_path / "peft", None)
    merge_run(tmp_path / "run", tmp_path / "merged", None)
    ours = to_tensors(model, open_checkpoint(tmp_path / "merged", tasks=True).params)

    module, before = (
        torch.nn.Module(),
        to_tensors(model, {**params, "head": adapters.get("head", params["head"])}),
    )
    for name, tensor in before.items():
        *parents, leaf = name.split(".")
        place = module
        for parent in parents[:-1]:
            if not hasattr(place, parent):
                place.add_module(parent, torch.nn.Module())
            place = getattr(place, parent)
        if leaf == "weight" and tensor.ndim == 2 and "embedding" not in name:
            linear = torch.nn.Linear(*tensor.shape[::-1], bias=f"{name[:-6]}bias" in before)
            place.add_module(parents[-1], linear)
            linear.weight.data = torch.tensor(0 * tensor if "score" in name else tensor)
    settings = peft.LoraConfig.from_pretrained(tmp_path / "peft")
    assert settings.modules_to_save == (["score"] if task else None)
    theirs = peft.PeftModel(module, settings)
    weights = peft.utils.load_peft_weights(tmp_path / "peft")
    result = peft.set_peft_model_state_dict(theirs, weights)
    assert not result.unexpected_keys
    merged = {k: v.numpy() for k, v in theirs.merge_and_unload().state_dict().items()}
    moved = [name for name in before if name in merged and (before[name] != ours[name]).any()]
    assert len(moved) == 4  # the w1 of the metric learner too
    for name in merged:
        if name.endswith("weight"):
            np.testing.assert_allclose(merged[name], ours[name], atol=1e-6, err_msg=name)
    assert task is None or (merged["score.bias"] == [0, 1, 2]).all()
