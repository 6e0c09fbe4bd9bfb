"""Checkpoints that are damaged, hostile or of another kind: one line each, and nothing is written
or read outside of the named folders.
"""

import dataclasses
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import contents, run_here
from test_convert import MODEL, QUIET, TINY, own_run, refused, variant
from test_pth import save_pth

import pldr_jax
from pldr_jax.cli.convert import convert_main
from pldr_jax.config import ConfigError
from pldr_jax.config.load import config_to_dict
from pldr_jax.interop.card import Licences
from pldr_jax.interop.config_json import end_ids, model_from_json
from pldr_jax.interop.convert import export_run, import_checkpoint
from pldr_jax.interop.pth import read_pickled_g_lm
from pldr_jax.interop.record import inherited_files, read_record
from pldr_jax.interop.transformers import G_VALUES
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.runs.folder import write_run

RAW = json.loads((TINY / "config.json").read_text())


def config(**fields: Any) -> Any:
    return model_from_json(
        {k: v for k, v in (RAW | fields).items() if v != "absent"}, "config.json"
    )


# config.json


def test_rotary_fields_of_transformers_5() -> None:
    plain = config()
    assert config(rope_theta="absent", rope_parameters={"rope_type": "default"}) == plain
    for fields in (
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ):
        assert config(**fields).rope_theta == 5e5
    assert config(rope_scaling=None, rope_parameters=None, partial_rotary_factor=1.0) == plain
    for message, fields in {
        "rope_theta = 1.0 and rope_parameters.rope_theta = 2.0: must be the same": {
            "rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0},
        },
        "rope_parameters = .*'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "rope_parameters = .*factor": {"rope_parameters": {"rope_type": "default", "factor": 4.0}},
        "rope_parameters = 3": {"rope_parameters": 3},
        "rope_scaling = .*linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type = 'llama3'": {"rope_type": "llama3"},
        "rotary_pct = 0.5": {"rotary_pct": 0.5},
        "partial_rotary_factor = 0.5": {"partial_rotary_factor": 0.5},
        "rope_local_base_freq": {"rope_local_base_freq": 1e4},
        "reference_rope = 'false': must be true or false": {"reference_rope": "false"},
        "reference_rope = 0": {"reference_rope": 0},
        "sliding_window = 8": {"sliding_window": 8},
        "quantization_config = ": {"quantization_config": {"bits": 4}},
        "architectures = .*MultipleChoice": {"architectures": ["PldrllmForMultipleChoice"]},
        "architectures = .*PldrllmModel": {"architectures": ["PldrllmModel", "PldrllmForX"]},
        "rope_theta": {"rope_theta": "10000"},
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message) as error:
            config(**fields)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 10**6},
        {"head_dim": 10**6},
        {"num_denseA": 10**7},
        {"num_denseA": 1000, "num_reslayerA": 4000},
        {"num_hidden_layers": 4096, "num_reslayerA": 4096},
        {"num_attention_heads": 4096, "head_dim": 4096, "hidden_size": 2**24},
        {"vocab_size": 2**24},
        {"vocab_size": 10**400},
        {"custom_G_type": "external", "num_attention_heads": 4096, "head_dim": 4096,
         "hidden_size": None},
    ],
)  # fmt: skip
def test_wild_sizes_are_refused_before_anything_is_allocated(fields: Any, tmp_path: Path) -> None:
    variant(tmp_path / "wild", **fields)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(".", tmp_path / "wild", tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff{}", b"[]", b""])
def test_json_bombs(content: bytes, tmp_path: Path) -> None:
    variant(tmp_path / "bomb", shards=2)
    for name in ("model.safetensors.index.json", "config.json"):
        (tmp_path / "bomb" / name).write_bytes(content)
        refused(f"{name}: cannot be read as JSON", tmp_path / "bomb", tmp_path / "out")


def test_pipes_and_devices(tmp_path: Path) -> None:
    variant(tmp_path / "source")
    (tmp_path / "source" / "config.json").unlink()
    os.mkfifo(tmp_path / "source" / "config.json")
    refused("config.json: cannot be read", tmp_path / "source", tmp_path / "out")
    (tmp_path / "source" / "config.json").unlink()
    (tmp_path / "source" / "config.json").symlink_to("/dev/zero")
    refused("config.json: cannot be read", tmp_path / "source", tmp_path / "out")
    refused("no such folder or .pth", Path("/dev/zero"), tmp_path / "out")
    os.mkfifo(tmp_path / "model.pth")
    refused("model.pth: no such file", tmp_path / "model.pth", tmp_path / "out")


def test_end_ids_of_config_json(tmp_path: Path) -> None:
    for stated, expected in ((7, (7,)), ([7, 9], (7, 9)), (None, ()), ("x", ()), (True, ())):
        assert end_ids({"eos_token_id": stated}) == expected
    variant(tmp_path / "source", eos_token_id=7)
    assert open_checkpoint(tmp_path / "source").end_ids == (7,)
    variant(tmp_path / "wide", eos_token_id=[7, 61, 10**30])  # of a vocabulary of 61
    assert open_checkpoint(tmp_path / "wide").end_ids == (7,)
    import_checkpoint(tmp_path / "source", tmp_path / "run", **QUIET)
    assert open_checkpoint(tmp_path / "run").end_ids == (7,)
    lm = pldr_jax.load(tmp_path / "run")
    (whole,) = lm.generate([[1, 2, 3]], 8, stop_ids=[])
    end = whole.tokens[2]
    lm.end_ids = (end,)
    (cut,) = lm.generate([[1, 2, 3]], 8)
    assert cut.finish_reason == "stop" and len(cut.tokens) < 8


# Names and links


def test_a_record_writes_nothing_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    variant(tmp_path / "source")
    import_checkpoint(tmp_path / "source", tmp_path / "run", **QUIET)
    layout_file = tmp_path / "run" / "transformers" / "layout.json"
    layout = json.loads(layout_file.read_text())
    tensors = layout["files"]["model.safetensors"]
    (layout_file.parent / "source" / "link").symlink_to(secret)
    before = contents(tmp_path)
    for changed in (
        {"others": ["../../../x"]},
        {"others": [str(secret)]},
        {"others": ["link"]},
        {"others": [["a"]]},
        {"others": ["model.safetensors"]},
        {"others": ["nowhere.json"]},
        {"files": {"../../x.safetensors": tensors}},
        {"files": {"/tmp/x.safetensors": tensors}},
        {"files": {"README.md": tensors}},
        {"files": []},
        {"dtypes": {tensors[0]: "O"}},
        {"metadata": {"format": 1}},
        {"name": 3},
    ):
        layout_file.write_text(json.dumps(layout | changed))
        with pytest.raises(ConfigError, match="transformers: is damaged") as error:
            export_run(tmp_path / "run", tmp_path / "hub", **QUIET)
        assert "\n" not in str(error.value)
    layout_file.write_text(json.dumps(layout, indent=1) + "\n")
    assert contents(tmp_path) == before


def test_links_are_not_copied_but_those_of_the_hub_cache(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    variant(tmp_path / "source")
    (tmp_path / "source" / "notes.txt").symlink_to(secret)
    import_checkpoint(tmp_path / "source", tmp_path / "run", **QUIET)
    assert not [name for name, data in contents(tmp_path / "run").items() if data == b"secret"]
    # The hub's cache has links to blobs in the place of files.
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / "revision", model / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    variant(tmp_path / "sharded", shards=2)
    for file in (tmp_path / "sharded").iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    (snapshot / "notes.txt").symlink_to(secret)
    import_checkpoint(snapshot, tmp_path / "cached", **QUIET)
    record = read_record(tmp_path / "cached")
    assert record is not None and set(record.others) == {"config.json", "generation_config.json"}
    first = snapshot / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(first, outside)
    first.unlink()
    first.symlink_to(outside)
    refused("is a link to elsewhere", snapshot, tmp_path / "out")


# What an import keeps


@pytest.mark.parametrize("custom", ["external", "random", "identity"])
def test_bfloat16_with_a_predefined_g_lm(custom: str, tmp_path: Path) -> None:
    tensors = variant(tmp_path / "source", custom=custom, dtype=ml_dtypes.bfloat16, shards=2)
    import_checkpoint(tmp_path / "source", tmp_path / "run", **QUIET)
    export_run(tmp_path / "run", tmp_path / "back", **QUIET)
    again = tmp_path / "again"
    import_checkpoint(tmp_path / "back", again, **QUIET)
    record = read_record(again)
    assert record is not None and record.dtypes == dict.fromkeys(
        (n for n, x in tensors.items() if x.dtype == ml_dtypes.bfloat16 and n != G_VALUES),
        "bfloat16",
    )
    assert record.g_tensors[G_VALUES].tobytes() == tensors[G_VALUES].tobytes()


def test_what_is_made_of_an_import_keeps_its_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    code = {"AutoModelForCausalLM": "someone/code--modeling_pldrllm.PldrllmForCausalLM"}
    variant(source, auto_map=code, eos_token_id=7, rope_parameters={"rope_type": "default"})
    (source / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    import_checkpoint(source, tmp_path / "imported", **QUIET)
    opened = open_checkpoint(tmp_path / "imported")
    from_folder, from_run = inherited_files(source), inherited_files(tmp_path / "imported")
    assert from_folder == from_run and "transformers/source/chat_template.jinja" in from_run
    changed = {**opened.params, "head": {**opened.params["head"]}}
    changed["head"]["bias"] = changed["head"]["bias"] + 1
    write_run(tmp_path / "tuned", 5, changed, None, config_to_dict(opened.config), from_run)
    export_run(tmp_path / "tuned", tmp_path / "hub", **QUIET)
    files = contents(tmp_path / "hub")
    assert json.loads(files["config.json"])["auto_map"] == code
    assert json.loads(files["tokenizer_config.json"])["padding_side"] == "left"
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert "trained to step 5" in files["README.md"].decode()
    # Another model keeps what is not the model's.
    longer = dataclasses.replace(
        opened.config, model=dataclasses.replace(opened.config.model, context_length=96)
    )
    write_run(tmp_path / "long", 5, opened.params, None, config_to_dict(longer), from_run)
    export_run(tmp_path / "long", tmp_path / "hub2", **QUIET)
    raw = json.loads((tmp_path / "hub2" / "config.json").read_text())
    assert (raw["max_position_embeddings"], raw["eos_token_id"], raw["auto_map"]) == (96, 7, code)
    assert "rope_parameters" not in raw


def test_auto_map_of_own_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_run(tmp_path / "run", None, MODEL)
    run, hub = tmp_path / "run", tmp_path / "hub"
    status, _, error = run_here(capsys, convert_main, "export", run, hub, "--code_repository=a/b")
    assert (status, error) == (0, "")
    assert json.loads((hub / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "a/b--configuration_pldrllm.PldrllmConfig",
        "AutoModelForCausalLM": "a/b--modeling_pldrllm.PldrllmForCausalLM",
    }


@pytest.mark.parametrize(
    "licence",
    [
        "mit' --- evil: true",
        "mit\n---\nevil: true",
        'a"b\\',
        "\x00\x1b[2J",
        "- x",
        "\u2028: y",
        "|",
    ],
)
def test_the_model_card_is_text(licence: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    own_run(tmp_path / "run", None, MODEL)
    export_run(tmp_path / "run", tmp_path / "hub", licences=Licences(licence, licence), **QUIET)
    card = (tmp_path / "hub" / "README.md").read_bytes().decode()
    front = yaml.safe_load(card.split("\n---\n")[0])
    assert (front["license"], front["data_license"]) == (licence, licence)
    assert set(front) == {"license", "data_license", "library_name", "pipeline_tag", "tags"}
    assert "\x1b" not in card and "\n---\n" in card and card.count("\n---\n") == 1


# Files of torch


def test_state_dicts_by_other_names(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    tensors = {k: torch.from_numpy(x) for k, x in variant(tmp_path / "source").items()}
    given = ["Model.context_length=48"]
    for i, stored in enumerate(
        (
            tensors,
            {"app": {"model": tensors, "step": 3}},
            {"model": {f"_orig_mod.{k}": x for k, x in tensors.items()}},
            {"state_dict": {f"module.{k}": x for k, x in tensors.items()}},
        )
    ):
        torch.save(stored, tmp_path / f"{i}.pth")
        import_checkpoint(tmp_path / f"{i}.pth", tmp_path / f"run{i}", overrides=given, **QUIET)
    for stored in ({}, {"app": {"model": {}}}, [1], {"model_state_dict": {"a": 1}}):
        torch.save(stored, tmp_path / "x.pth")
        refused("holds no 'model_state_dict'", tmp_path / "x.pth", tmp_path / "out")
    half = {k: x.to(torch.float8_e4m3fn) for k, x in tensors.items()}
    torch.save(half, tmp_path / "x.pth")
    refused("has the dtype float8_e4m3fn; make it bfloat16", tmp_path / "x.pth", tmp_path / "out")
    from safetensors.torch import save_file as save_torch

    save_torch(half, tmp_path / "source" / "model.safetensors")
    refused("is F8_E4M3; make it bfloat16", tmp_path / "source", tmp_path / "out")


def test_refusals_are_in_our_words(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    torch.save({"model_state_dict": {}, "args": sys.exit}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"would run code \(sys.exit\)") as error:
        import_checkpoint(tmp_path / "x.pth", tmp_path / "out", **QUIET)
    text = str(error.value)
    assert "weights_only" not in text and "\n" not in text and "\x1b" not in text
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    refused("cannot be read, it is damaged", tmp_path / "x.pth", tmp_path / "out")
    (tmp_path / "x.pth").write_bytes(b"garbage")
    refused("cannot be read, it is damaged", tmp_path / "x.pth", tmp_path / "out")


def test_sizes_that_no_tensor_says_are_asked_for(tmp_path: Path) -> None:
    tensors = variant(tmp_path / "source", custom="identity")
    del tensors[G_VALUES], tensors[f"{G_VALUES}_status"]
    save_pth(tmp_path / "x.pth", tensors)
    path, out = tmp_path / "x.pth", tmp_path / "out"
    refused("no tensor says Model.context_length, Model.num_heads, Model.head_dim, Model.g_source",
            path, out)  # fmt: skip
    gin = tmp_path / "x.gin"
    gin.write_text("Model.context_length = 48\nModel.g_source = 'identity'\n")
    refused("no tensor says Model.num_heads, Model.head_dim; add --gin.Model.num_heads=", path, out,
            gin_files=[gin])  # fmt: skip
    gin.write_text(gin.read_text() + "Model.num_heads = 2\nModel.head_dim = 8\n")
    import_checkpoint(path, out, gin_files=[gin], **QUIET)
    wild = ["Model.context_length=48", "Model.num_heads=4096", "Model.head_dim=4096"]
    refused(
        "num_layers = 2: makes .* parameters",
        path,
        tmp_path / "o",
        overrides=[*wild, "Model.g_source=identity"],
    )


def test_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"x")
    (tmp_path / "dcp" / "__0_0.distcp").write_bytes(b"x")
    refused("dcp_to_torch .*dcp model.pth", tmp_path / "dcp", tmp_path / "out")
    with pytest.raises(ConfigError, match="dcp_to_torch"):
        pldr_jax.load(tmp_path / "dcp")


def test_pickled_g_lm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="pip install torch")
    g_lm = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    layers = [torch.from_numpy(x) for x in g_lm]
    zero = torch.zeros(1, 2, 4, 4)
    path, out = tmp_path / "g.pkl", tmp_path / "g.npz"
    for stored in (
        torch.from_numpy(g_lm),
        layers,
        tuple(x[None] for x in layers),
        [[zero, zero, x[None]] for x in layers],
        torch.from_numpy(np.stack([0 * g_lm, 0 * g_lm, g_lm], 1)),
        torch.from_numpy(np.stack([0 * g_lm, 0 * g_lm, g_lm], 1)[:, :, None]),
    ):
        path.write_bytes(pickle.dumps(stored))
        assert read_pickled_g_lm(path).tobytes() == g_lm.tobytes()
    status, shown, error = run_here(capsys, convert_main, "g_lm", path, out)
    assert (status, error) == (0, "") and "[3, 2, 4, 4]" in shown
    assert np.load(out)["G_LM"].tobytes() == g_lm.tobytes()
    harm = tmp_path / "harm"
    for stored, message in (
        ([os.system], "would run code"),
        ([layers[0], harm.touch], "would run code"),
        ({"G": layers}, "only tensors in lists"),
        ([1, 2], "only tensors in lists"),
        ([], "holds no G_LM"),
        ([layers[0], layers[1][:1]], "holds no G_LM"),
        ([torch.zeros(4)], "holds no G_LM"),
        (torch.zeros(()), "holds no"),
    ):
        path.write_bytes(pickle.dumps(stored))
        with pytest.raises(ConfigError, match=message) as raised:
            read_pickled_g_lm(path)
        assert "\n" not in str(raised.value)
    path.write_bytes(b"\x80\x04garbage")
    status, _, error = run_here(capsys, convert_main, "g_lm", path, tmp_path / "h.npz")
    assert status != 0 and "damaged" in error and error.count("\n") == 1
    assert not harm.exists() and not (tmp_path / "h.npz").exists()
    status, _, error = run_here(capsys, convert_main, "g_lm", path, out)
    assert status != 0 and "must be a new file" in error
