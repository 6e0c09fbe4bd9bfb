"""Training on prepared shards and mixtures of them: the same rows, refusals, damage named."""

import json
import shutil

import numpy as np
import pytest
from helpers import (
    QUICK,
    WORDS,
    contents,
    make_corpus,
    record_batches,
    rows_of,
    stored,
    tiny_config,
    train_here,
)

from pldr_jax.config import ConfigError, DataConfig
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.pipeline import train_iterator
from pldr_jax.data.rows import TokenRows, make_rows
from pldr_jax.data.shards.build import BuildSettings, build
from pldr_jax.data.shards.prepared import ShardedTokens, read_prepared
from pldr_jax.data.shards.records import DataError
from pldr_jax.data.shards.units import UnitSettings
from pldr_jax.data.text.inputs import find_inputs
from pldr_jax.data.text.tokenizer import Tokenizer

VOCAB = 300


def write_text(folder, name: str, seed: int, documents: int = 200) -> None:
    rng = np.random.default_rng(seed)
    texts = [f"{name} {k} " + " ".join(rng.choice(WORDS, 1 + k % 60)) for k in range(documents)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))


def prepare(folder, name: str, output, tokenizer: str = "t", **settings) -> None:
    units = UnitSettings(**{"validation_fraction": 0.2, **settings})
    build(
        find_inputs([f"{folder}/{name}.jsonl"]),
        Tokenizer.load(folder / f"{tokenizer}.model"),
        output,
        BuildSettings(units, unit_bytes=8_000),
        lambda line: None,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared texts `a` and `b` of one tokenizer, and `c` of another."""
    folder = tmp_path_factory.mktemp("prepared")
    for seed, name in enumerate("abc"):
        write_text(folder, name, seed)
    for name in ("t", "u"):
        texts = [line for line in (folder / "a.jsonl").read_text().splitlines() if name != line[0]]
        Tokenizer.train(texts[:150] if name == "t" else texts, VOCAB).save(folder / f"{name}.model")
    for name, tokenizer in (("a", "t"), ("b", "t"), ("c", "u")):
        prepare(folder, name, folder / name, tokenizer)
    return folder


def test_rows_of_shards_are_those_of_one_flat_text(folder) -> None:
    manifest = read_prepared(folder / "a")
    tokens = ShardedTokens(manifest, "train")
    assert len(manifest.splits["train"]) > 3
    whole = tokens.read(0, tokens.n_tokens)
    rows = TokenRows(tokens, 32)
    np.testing.assert_array_equal(
        np.concatenate([rows[k] for k in range(len(rows))]), whole[: len(rows) * 32]
    )


def test_one_text_or_several_by_weight(folder) -> None:
    lines: list[str] = []
    one = open_training_text(DataConfig(source=str(folder / "a")), VOCAB, lines.append)
    assert one.weights == (1.0,) and "100.0% of the rows" in lines[0]
    manifest = DataConfig(source=str(folder / "a" / "manifest.json"))
    assert open_training_text(manifest, VOCAB, lines.append).digest == one.digest
    paths = tuple(str(folder / name) for name in "ab")
    by_size = open_training_text(DataConfig(mixture=paths), VOCAB, lines.append)
    sizes = [part.train.n_tokens for part in by_size.texts]
    assert by_size.weights == pytest.approx(np.divide(sizes, sum(sizes)))
    config = DataConfig(mixture=paths, mixture_weights=(3.0, 1.0))
    weighted = open_training_text(config, VOCAB, lines.append)
    assert weighted.weights == (0.75, 0.25)
    assert len({one.digest, by_size.digest, weighted.digest}) == 3
    assert weighted.digest == open_training_text(config, VOCAB, lines.append).digest


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"source": "a"}, r"^Model\.vocab_size = 301: .*set Model\.vocab_size = 300"),
        ({"mixture": ("a", "c")}, r"^Data\.mixture = '.*c': was made with another tokenizer"),
        ({"mixture": ("a", "no")}, r"^Data\.mixture = '.*no': .*cannot be read"),
        ({"source": "a", "tokenizer": "u.model"}, r"^Data\.tokenizer = .*is not the one"),
        ({"mixture": ("a",), "mixture_weights": (1.0, 2.0)}, r"^Data\.mixture_weights = .*one a"),
        ({"mixture": ("a",), "mixture_weights": (0.0,)}, r"^Data\.mixture_weights = .*greater"),
    ],
)
def test_refusals_name_the_field(folder, fields, message) -> None:
    def full(value):
        return str(folder / value) if isinstance(value, str) else value

    fields = {
        name: tuple(map(full, value)) if isinstance(value, tuple) else full(value)
        for name, value in fields.items()
    }
    vocab = 301 if list(fields) == ["source"] else VOCAB
    with pytest.raises(ConfigError, match=message):
        open_training_text(DataConfig(**fields), vocab, lambda line: None)


def test_without_held_out_documents_there_is_nothing_to_evaluate(folder, tmp_path) -> None:
    prepare(folder, "a", tmp_path / "a", validation_fraction=0.0)
    with pytest.raises(ConfigError, match="has no validation documents; prepare it anew"):
        open_training_text(DataConfig(source=f"{tmp_path}/a"), VOCAB, lambda line: None)


@pytest.mark.parametrize("packing", ["concat", "packed"])
def test_a_corrupted_shard_is_named_with_its_record_while_training(
    folder, tmp_path, packing: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder / "a", copy)
    shard = copy / "train-000001.array_record"
    content = bytearray(shard.read_bytes())
    content[1_000] ^= 255
    shard.write_bytes(content)
    config = DataConfig(packing=packing, max_segments=4)  # type: ignore[arg-type]
    rows = make_rows(ShardedTokens(read_prepared(copy), "train"), 16, config)
    with (
        train_iterator([rows], 8, 0) as iterator,
        pytest.raises(DataError, match=r"train-000001\.array_record: record \d+: ") as error,
    ):
        for _ in range(len(rows) // 8 + 1):
            next(iterator)
    assert "\n" not in str(error.value)


def test_a_run_on_a_mixture_in_segments(folder, tmp_path) -> None:
    """Trained, evaluated and saved; packing and weights are part of what is continued."""
    paths = tuple(str(folder / name) for name in "ab")
    fields = {
        "Data.mixture": repr(paths),
        "Data.mixture_weights": "(0.75, 0.25)",
        "Data.packing": "packed",
        "Data.max_segments": 3,
        "Model.num_layers": 1,
        "Model.unroll": False,
        "Training.steps": 3,
        "Training.eval_every": 3,
        "Training.sample_prompt": "",
        "Checkpoint.save_every": 1,
    }
    config = tiny_config(folder, fields)
    metrics = train_here(config, tmp_path / "run")
    assert {"eval/loss", "eval/causal_gap", "eval/order_parameter/G_LM"} <= metrics.keys()
    assert [row["step"] for row in rows_of(tmp_path / "run")][-1] == 3
    _, data, _ = stored(tmp_path / "run")
    text = open_training_text(config.data, VOCAB, lambda line: None)
    assert (data["next_row"], data["text"]) == (3 * 8, text.digest)
    for name, value, message in (
        ("Data.packing", "document", r"^Data\.packing = 'document': the run in .* has 'packed'"),
        ("Data.max_segments", 2, r"^Data\.max_segments = 2: the run in .* has 3"),
        ("Data.mixture_weights", "(0.5, 0.5)", "or the weights that the checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_here(tiny_config(folder, {**fields, name: value}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^Training\.steps = 999: the text is used up after \d+"):
        few = {**fields, "Data.epochs": 1, "Training.steps": 999}
        train_here(tiny_config(folder, few), tmp_path / "other")


def test_a_run_goes_on_with_its_own_text_alone(tmp_path, monkeypatch) -> None:
    """Wherever it lies, and in batches of any size; every row of the epoch comes once."""
    text = make_corpus(tmp_path / "text", 12)
    Tokenizer.train([path.read_text() for path in text.iterdir()], VOCAB).save(tmp_path / "t.model")
    fields = {
        **QUICK,
        "Data.tokenizer": tmp_path / "t.model",
        "Data.epochs": 1,
        "Model.num_layers": 1,
        "Model.unroll": False,
        "Training.eval_every": 100,
        "Training.eval_rows": 1,
    }

    def run(source, **more) -> None:
        changed = {name.replace("__", "."): value for name, value in more.items()}
        train_here(tiny_config(source, {**fields, **changed}), tmp_path / "run")

    batches = record_batches(monkeypatch)
    run(text)
    before = contents(tmp_path / "run")
    refused = [
        ({"Data__seed": 1}, r"^Data\.seed = 1: the run has 0"),
        ({"Data__validation_fraction": 0.3}, r"^Data\.source.*Data\.validation_fraction: not"),
    ]
    for more, message in refused:
        with pytest.raises(ConfigError, match=message) as error:
            run(text, Training__steps=3, **more)
        assert "--init_from" in str(error.value) and "\n" not in str(error.value)
    moved = text.rename(tmp_path / "moved")
    file = moved / "00.txt"
    whole = file.read_text()
    for changed in (whole.replace("self", "list", 1), whole[:-1]):
        file.write_text(changed)
        with pytest.raises(ConfigError, match=r"^Data\.source.*: not the text"):
            run(moved, Training__steps=3)
    assert contents(tmp_path / "run") == before
    file.write_text(whole)
    data = DataConfig(
        source=str(moved), tokenizer=fields["Data.tokenizer"], validation_fraction=0.2
    )
    (rows,) = open_training_text(data, VOCAB).rows("train", 32, data)
    steps = 2 + (len(rows) - 2 * 8) // 4
    run(moved, Training__steps=steps, Data__batch_size=4)
    taken = np.concatenate(batches)
    assert len(taken) >= len(rows) - 3
    assert len({row.tobytes() for row in taken}) == len(taken)
    assert {row.tobytes() for row in taken} <= {rows[k].tobytes() for k in range(len(rows))}


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"validation_fraction": 0.1}, {"test_fraction": 0.1}],
)
def test_folders_that_hold_out_other_documents_are_not_mixed(folder, tmp_path, settings) -> None:
    """A document of both could be held out in one and trained on in the other."""
    prepare(folder, "a", tmp_path / "other", **settings)
    config = DataConfig(mixture=(str(folder / "a"), str(tmp_path / "other")))
    with pytest.raises(ConfigError, match=r"^Data\.mixture = .*holds out other documents") as error:
        open_training_text(config, VOCAB, lambda line: None)
    assert "\n" not in str(error.value)


def test_folders_of_one_text_do_not_share_what_they_hold_out(folder, tmp_path) -> None:
    prepare(folder, "a", tmp_path / "again")
    config = DataConfig(mixture=(str(folder / "a"), str(tmp_path / "again")))
    one, two = open_training_text(config, VOCAB, lambda line: None).texts
    assert one.validation.n_tokens == two.validation.n_tokens
    np.testing.assert_array_equal(
        one.validation.read(0, one.validation.n_tokens),
        two.validation.read(0, one.validation.n_tokens),
    )
