"""Conversions: no bit is lost in either direction, and what does not fit is named in one line."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDENS, Golden
from helpers import REPOSITORY, WORDS, assert_same_bits, contents, run_here
from safetensors.numpy import load_file, save_file

import pldr_jax
from pldr_jax.cli.convert import convert_main
from pldr_jax.config import ConfigError, ExperimentConfig, GenerationConfig, ModelConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.interop import native
from pldr_jax.interop.card import Licences
from pldr_jax.interop.check import check_logits
from pldr_jax.interop.convert import export_run, import_checkpoint
from pldr_jax.interop.tokenizer.fast import tokenizer_json
from pldr_jax.interop.transformers import G_STATUS, G_VALUES, open_transformers
from pldr_jax.model.decoder import init_params
from pldr_jax.runs.folder import write_run

TINY = GOLDENS / "tiny"
FORWARD = 2e-5
"""The tolerance of test_parity.py."""
QUIET: dict[str, Any] = {"log": lambda line: None}


def difference(actual: Any, expected: np.ndarray) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def assert_same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert tensor.tobytes() == other[name].tobytes(), name


def variant(
    folder: Path,
    custom: str | None = None,
    dtype: Any = np.float32,
    shards: int = 1,
    **fields: Any,
) -> dict[str, np.ndarray]:
    """A checkpoint made of the small golden: its tensors as they are in the files."""
    tensors = {name: x.astype(dtype) for name, x in load_file(TINY / "model.safetensors").items()}
    raw = json.loads((TINY / "config.json").read_text()) | {"custom_G_type": custom} | fields
    if custom is not None:
        plga = (".plgatt_layer.", ".reslayerAs.", ".mha1.layernorm1.")
        tensors = {k: v for k, v in tensors.items() if not any(part in k for part in plga)}
        values = np.random.default_rng(3).normal(size=(2, 3, 1, 2, 8, 8)).astype(dtype)
        if custom == "identity":
            values[:, 2] = np.eye(8)
        tensors |= {G_VALUES: values, G_STATUS: np.array([True, False])}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"max_length": 17}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    placed = {}
    for i in range(shards):
        names = sorted(tensors)[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_import_is_the_golden(case: Golden, tmp_path: Path) -> None:
    lines: list[str] = []
    check = import_checkpoint(case.folder, tmp_path / "run", log=lines.append)
    # the logit check: 3e-7 (tiny) and 2e-6 (deep) on an x86 CPU
    assert 0 < check.difference < FORWARD and check.agreement == 1
    assert f"{check.difference:.1e}" in lines[-1] and "warning" not in lines[-1]
    lm = pldr_jax.load(tmp_path / "run")
    assert_same_bits(lm.params, case.params)
    out = lm(case.rows[:, :-1])
    found = {"logits": out.logits, **dict(out.deductive.items())}
    assert len(found) == 5
    for name, actual in found.items():
        assert difference(actual, case.tensors[name]) < FORWARD, name


VARIANTS = {
    "v52, two files, bfloat16": {
        "reference_rope": False,
        "dtype": ml_dtypes.bfloat16,
        "shards": 2,
    },
    "identity": {"custom": "identity"},
    "random, float16": {"custom": "random", "dtype": np.float16},
    "external, v52, three files": {"custom": "external", "reference_rope": False, "shards": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_export_of_an_import_is_the_original(name: str, tmp_path: Path) -> None:
    source, run, back = tmp_path / "source", tmp_path / "run", tmp_path / "back"
    tensors = variant(source, **VARIANTS[name])
    check = import_checkpoint(source, run, **QUIET)
    assert check.difference < FORWARD
    lm, theirs = pldr_jax.load(run), pldr_jax.load(source)
    assert_same_bits((lm.params, lm.g_lm), (theirs.params, theirs.g_lm))
    assert lm.config == theirs.config
    v52, custom = "v52" in name, VARIANTS[name].get("custom")
    assert lm.config.rope_layout == ("half_split" if v52 else "interleaved")
    if custom in ("random", "external"):
        assert (lm.config.g_source, lm.config.g_file) == ("external", None)
        expected = tensors[G_VALUES][:, 2].astype(np.float32)
        assert np.asarray(lm.g_lm).tobytes() == expected.tobytes()
    shutil.rmtree(source)
    export_run(run, back, **QUIET)
    assert_same_tensors(tensors_of(back), tensors)
    assert json.loads((back / "config.json").read_text())["custom_G_type"] == custom
    assert (back / "generation_config.json").read_text() == '{"max_length": 17}'
    files = {path.name for path in back.glob("*.safetensors")}
    assert len(files) == VARIANTS[name].get("shards", 1)
    # An export can be imported again: bit for bit, too.
    again = open_transformers(back)
    assert_same_bits((again.params, again.g_lm), (lm.params, lm.g_lm))


MODEL = ModelConfig(
    vocab_size=300,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    ffn_dim=24,
    metric_dim=12,
    num_residual_layers=1,
    num_gated_units=1,
    context_length=24,
    rope_layout="half_split",
    layer_norm_eps=1e-5,
    unroll=False,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS * 40), "abcdefghijklmnopqrstuvwxyz\n" * 9], 300)


def own_run(folder: Path, tokenizer: Tokenizer | None, model: ModelConfig) -> ExperimentConfig:
    """A run folder of a model made here, its G_LM learned, the identity or from outside."""
    config = ExperimentConfig(model=model, generation=GenerationConfig(temperature=0.7, top_k=5))
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(model, jax.random.key(5)))
    g_lm = jax.random.normal(jax.random.key(6), (1, 1, 2, 8, 8))
    files = {} if tokenizer is None else {"tokenizer.model": tokenizer.model_bytes}
    given = None if model.g_source in ("learned", "identity") else g_lm
    write_run(folder, 40, params, given, config_to_dict(config), files)
    return config


@pytest.mark.parametrize("g_source", ["learned", "identity", "external", "random"])
def test_import_of_an_export_is_the_run(
    g_source: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own_run(tmp_path / "run", tokenizer, dataclasses.replace(MODEL, g_source=g_source))
    check = export_run(tmp_path / "run", tmp_path / "hub", **QUIET)
    assert check.difference < FORWARD
    import_checkpoint(tmp_path / "hub", tmp_path / "again", **QUIET)
    one, other = pldr_jax.load(tmp_path / "run"), pldr_jax.load(tmp_path / "again")
    assert_same_bits((one.params, one.g_lm), (other.params, other.g_lm))
    # Where it comes from is all that "random" says, and the layout does not hold the seed.
    same = {"g_source": "external"} if g_source == "random" else {}
    assert dataclasses.replace(one.config, **same) == other.config
    assert other.tokenizer is not None and one.tokenizer is not None
    assert other.tokenizer.digest == one.tokenizer.digest


def test_files_of_an_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = own_run(tmp_path / "run", tokenizer, MODEL)
    rows = [
        {"step": 20, "time": 1.0, "eval/loss": 9.5, "eval/causal_gap": 0.5},
        {"step": 40, "time": 2.0, "eval/loss": 2.25, "eval/causal_gap": 0.125}
        | {"eval/order_parameter/G_LM": 3e-5, "eval/tasks/quiz/acc": 0.75},
        {"step": 60, "time": 3.0, "eval/loss": 1.5},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export_run(tmp_path / "run", tmp_path / "hub", licences=Licences("mit", "it's free"), **QUIET)
    files = contents(tmp_path / "hub")
    assert set(files) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    raw = json.loads(files["config.json"])
    golden = json.loads((TINY / "config.json").read_text())
    assert set(golden) <= set(raw)
    assert raw["A_dff"] == 12 and raw["hidden_size"] == 16 and raw["reference_rope"] is False
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["pad_token_id"]) == (2, 3, 0)
    generation = json.loads(files["generation_config.json"])
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (
        True, 0.7, 5,
    )  # fmt: skip
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "[END]"
    card = files["README.md"].decode()
    assert card.startswith('---\nlicense: "mit"\ndata_license: "it\'s free"\n')
    for part in (
        "step 40", "2.2500", "0.1250", "3.00e-05", "causal gap is large", "| quiz/acc | 0.7500 |",
        f"Optimizer.learning_rate = {config.optimizer.learning_rate}", "Data.source = 'stdlib'",
        f"{40 * config.data.batch_size * 24:,}", tokenizer.digest, "Model.metric_dim = 12",
    ):  # fmt: skip
        assert part in card, part
    assert "9.5" not in card and "1.5000" not in card


def test_tokenizer_of_an_export_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reason = "the tokenizers library reads tokenizer.json; pip install tokenizers"
    library = pytest.importorskip("tokenizers", reason=reason)
    text = json.dumps(tokenizer_json(tokenizer))
    read = library.Tokenizer.from_str(text)
    for text in (
        "def return self", "  two  spaces\n\n\n and lines\n", "x", "\ttab", "", " ", "UPPER 0123",
        "na\u00efve \u4e2d\U0001f642", " ".join(WORDS),
    ):  # fmt: skip
        ids = tokenizer.encode(text)
        assert read.encode(text).ids == ids, text
        assert read.decode(ids) == text == tokenizer.decode(ids)
    assert read.token_to_id("[END]") == tokenizer.eos_id
    assert tokenizer_json(tokenizer)["model"]["unk_id"] == 1


def test_the_logit_check_sees_what_is_in_the_wrong_place() -> None:
    opened = open_transformers(TINY)
    tensors = dict(opened.source.tensors)

    def check(tensors: Any, config: ModelConfig = opened.config) -> Any:
        return check_logits(config, opened.params, None, tensors, "here")

    assert check(tensors).difference < FORWARD
    for one, other in (("wq.weight", "wk.weight"), ("dense.bias", "wv.bias")):
        a, b = (f"decoder.dec_layers.1.mha1.{name}" for name in (one, other))
        moved = check({**tensors, a: tensors[b], b: tensors[a]})
        assert moved.difference > 1e-3 and "warning" in moved.line()
    name = "decoder.dec_layers.0.mha1.wq.weight"
    assert check({**tensors, name: tensors[name].T}).difference > 1e-3
    split = dataclasses.replace(opened.config, rope_layout="half_split")
    assert check(tensors, split).difference < FORWARD  # both rotate as the config says
    with pytest.raises(ConfigError, match="not finite"):
        check({**tensors, "final_layer.bias": np.full((61,), np.nan, np.float32)})


def refused(message: str, path: Path, out: Path, **options: Any) -> None:
    """One line that says so, and nothing left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ConfigError, match=message) as error:
        import_checkpoint(path, out, **options, **QUIET)
    assert "\n" not in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sharded = tmp_path / "sharded"
    variant(sharded, shards=2)
    first = sharded / "model-00001-of-00002.safetensors"
    tensors, bytes_of_first = load_file(first), first.read_bytes()
    save_file({**tensors, "decoder.more": np.zeros(1, np.float32)}, first)
    refused("00001.*'decoder.more' is not in the index", sharded, out)
    name = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != name}, first)
    refused(f"00001.*'{name}' of the index is missing", sharded, out)
    first.unlink()
    refused("00001.*no such file", sharded, out)
    first.write_bytes(bytes_of_first[:100])
    refused("00001.*truncated", sharded, out)
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    refused("must be a file of the folder", sharded, out)
    index.write_text("{}")
    refused("has no weight_map", sharded, out)

    other = tmp_path / "other"
    values = variant(other, custom="external")
    path = other / "model.safetensors"
    save_file({k: v for k, v in values.items() if k != G_VALUES}, path)
    refused(f"'{G_VALUES}' is missing", other, out)
    save_file({**values, G_VALUES: values[G_VALUES][:, :2]}, path)
    refused(f"'{G_VALUES}' has the shape .*needs \\(2, 3, 1, 2, 8, 8\\)", other, out)
    save_file({**values, "final_layer.bias": np.zeros(61, np.int32)}, path)
    refused("'final_layer.bias' has the dtype int32", other, out)
    save_file({**values, "final_layer.bias": np.full(61, 0.1, np.float64)}, path)
    refused("'final_layer.bias' has float64 values that float32 cannot hold", other, out)
    save_file(values, path)
    raw = json.loads((other / "config.json").read_text())
    for field, value, message in (
        ("custom_G_type", "identity", "is not the identity"),
        ("custom_G_type", "other", "custom_G_type = 'other'"),
        ("custom_G_type", None, "layernorm1.weight' is missing"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling = "),
        ("hidden_size", 17, "hidden_size = 17: must be .*16"),
        ("vocab_size", "61", "Model.vocab_size"),
        ("vocab_size", 60, "'decoder.embedding.weight' has the shape .*needs \\(60, 16\\)"),
        ("head_dim", 7, "head_dim"),
    ):
        (other / "config.json").write_text(json.dumps(raw | {field: value}))
        refused(message, other, out)
    # past_G_values beside a learned G_LM has no place.
    learned = tmp_path / "learned"
    tensors = variant(learned)
    save_file({**tensors, G_VALUES: values[G_VALUES]}, learned / "model.safetensors")
    refused(f"unknown tensor '{G_VALUES}'", learned, out)
    refused("no such folder or .pth", tmp_path / "nowhere", out)
    refused("config.json says what the model is", TINY, out, overrides=["Model.num_layers=2"])


def test_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t.model")
    refused("300 pieces, more than .*vocabulary of 61", TINY, tmp_path / "out",
            tokenizer=tmp_path / "t.model")  # fmt: skip
    (tmp_path / "t.model").write_bytes(b"none")
    refused("is not a SentencePiece model", TINY, tmp_path / "out", tokenizer=tmp_path / "t.model")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, error = run_here(capsys, convert_main, "import", TINY, tmp_path / "run")
    assert (status, error) == (0, "") and "logit check: 48 tokens" in shown
    status, shown, error = run_here(
        capsys, convert_main, "export", tmp_path / "run", tmp_path / "hub", "--license=apache-2.0"
    )
    assert (status, error) == (0, "") and "exported step 0, 111 tensors" in shown
    original, back = (load_file(f / "model.safetensors") for f in (TINY, tmp_path / "hub"))
    assert_same_tensors(original, back)
    assert 'license: "apache-2.0"' in (tmp_path / "hub" / "README.md").read_text()
    before = contents(tmp_path / "hub")
    for arguments, message in (
        (("export", tmp_path / "run", tmp_path / "hub"), "is not an empty folder"),
        (("export", tmp_path / "nowhere", tmp_path / "x"), "no such folder"),
        (("export", tmp_path / "run"), "OUT is required"),
        (("import", TINY, tmp_path / "x", "--license=a"), "--license: no such flag"),
        (("export", tmp_path / "run", tmp_path / "x", "--gin.Model.num_layers=2"), "--gin: "),
        (("convert",), "must be 'import PATH OUT', 'export RUN OUT', "),
        ((), "must be 'import PATH OUT'"),
        (
            ("import", tmp_path, tmp_path / "x"),
            "has none; give a folder in the transformers layout",
        ),
    ):
        status, _, error = run_here(capsys, convert_main, *arguments)
        assert status != 0 and message in error and error.count("\n") == 1, error
    assert contents(tmp_path / "hub") == before and not (tmp_path / "x").exists()


def test_published_sizes() -> None:
    """The published .pth of 110M parameters: what its shapes say is its config."""
    shapes = {
        "decoder.embedding.weight": (32000, 896),
        "decoder.dec_layers.0.ffn.gluw1.weight": (2389, 896),
        "decoder.dec_layers.0.mha1.plgatt_layer.Wlst": (14, 64, 64),
        "decoder.dec_layers.0.mha1.reslayerAs.0.denseAs.0.gluw1.weight": (170, 64),
        "decoder.dec_layers.0.mha1.reslayerAs.7.denseAs.1.gluw1.weight": (170, 64),
        "decoder.dec_layers.0.mha1.reslayerAs.0.denseAs.1.gluw1.weight": (170, 64),
        "decoder.dec_layers.4.layernorm1.bias": (896,),
    }
    # One entry, however large the shape.
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    model = native.model_from_tensors(
        tensors, [REPOSITORY / "configs" / "pldr_110m.gin"], [], "x.pth"
    )
    inferred = native.model_from_tensors(tensors, [], ["Model.context_length=1024"], "x.pth")
    for field in ("vocab_size", "num_layers", "ffn_width", "metric_width", "num_heads"):
        assert getattr(inferred, field) == getattr(model, field)
    assert (inferred.num_residual_layers, inferred.num_gated_units) == (8, 2)
