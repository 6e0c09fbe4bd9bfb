"""Fine-tuning of task heads through `train.py`: it learns, goes on, exports; what cannot be used is
one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import WORDS, assert_equal_runs, assert_same_bits, record_batches, rows_of
from safetensors.numpy import load_file, save_file
from test_task_heads import backbone_of

import pldr_jax
from pldr_jax.cli.convert import convert_main
from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError, ExperimentConfig, MeshConfig, ModelConfig
from pldr_jax.config.load import config_to_dict, load_config
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.interop.convert import export_run, import_checkpoint
from pldr_jax.interop.peft import ADAPTER
from pldr_jax.model.decoder import init_params
from pldr_jax.partition import build_mesh
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.folder import write_run
from pldr_jax.training import loop
from pldr_jax.training.finetune.begin import start_from

GOOD, BAD = "good nice fine".split(), "bad poor dull".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a language model that has learned nothing, and labelled texts."""
    import flax.linen as nn
    import jax

    folder = tmp_path_factory.mktemp("task")
    text = " ".join([*WORDS, *GOOD, *BAD]) + " who is it\n"
    tokenizer = Tokenizer.train([text * 20, Path(__file__).read_text()], 400)
    model = ModelConfig(
        vocab_size=400, num_layers=1, num_heads=2, head_dim=8, num_residual_layers=1,
        context_length=32, unroll=False,
    )  # fmt: skip
    params = nn.unbox(init_params(model, jax.random.key(0)))
    config = config_to_dict(ExperimentConfig(model=model))
    write_run(folder / "lm", 0, params, None, config, {"tokenizer.model": tokenizer.model_bytes})
    made = random.Random(0)
    rows: dict[str, list[Any]] = {"sequence": [], "token": [], "question": []}
    for k in range(80):
        label = k % 2
        words = [*made.choices(WORDS, k=4), made.choice((GOOD, BAD)[label])]
        made.shuffle(words)
        tags = ["B-J" if word in (*GOOD, *BAD) else "O" for word in words]
        answer = next(word for word in words if word in (*GOOD, *BAD))
        context = " ".join(words)
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        # Last, where the head reads: so little text teaches no more.
        text = " ".join([*(word for word in words if word != answer), answer])
        rows["sequence"].append({"text": text, "label": ("pos", "neg")[label]})
        rows["token"].append({"tokens": words, "labels": tags})
        rows["question"].append({"question": "who", "context": context, "answers": answers})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def tune(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Fine-tunes as `train.py` does, on one device."""

    def run(kind: str, steps: int = 30, run_dir: str = "run", *flags: str) -> Path:
        monkeypatch.setattr(loop, "build_mesh", helpers.one_device_mesh)
        fields = {
            "Task.kind": kind, "Data.source": base / f"{kind}.jsonl", "Data.batch_size": 16,
            "Data.validation_fraction": 0.3, "Optimizer.learning_rate": 3e-2,
            "Optimizer.warmup_steps": 2, "Optimizer.decay_steps": 30, "Optimizer.weight_decay": 0.0,
            "Training.steps": steps, "Training.eval_every": 10, "Training.tensorboard": False,
        }  # fmt: skip
        given = [f"--gin.{name}={value}" for name, value in fields.items()]
        train_main(
            [f"--init_from={base / 'lm'}", f"--run_dir={tmp_path / run_dir}", *given, *flags]
        )
        return tmp_path / run_dir

    return run


def last(run_dir: Path) -> dict[str, float]:
    return [row for row in rows_of(run_dir) if "eval/loss" in row][-1]


def test_a_text_is_labelled(tune: Callable[..., Path], tmp_path: Path) -> None:
    """It learns; it goes on bit for bit; its export is its import; a second run begins with it."""
    run = tune("sequence")
    measured = last(run)
    assert measured["eval/accuracy"] > 0.9 and measured["eval/f1"] > 0.9
    tune("sequence", 10, "other")
    other = tune("sequence", 30, "other")
    assert_equal_runs(run, other)
    lm = pldr_jax.load(run)
    assert lm.task == "sequence"
    logits = lm.classify(["def model good", "tokens range poor"])
    assert [int(x.argmax()) for x in logits] == [1, 0]  # neg, pos: in sorted order
    export_run(run, tmp_path / "out", log=lambda line: None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert "AutoModelForSequenceClassification" in config["auto_map"]
    assert_same_bits(
        pldr_jax.load(tmp_path / "out").classify(["def good"]), lm.classify(["def good"])
    )
    import_checkpoint(tmp_path / "out", tmp_path / "again", log=lambda line: None)
    export_run(tmp_path / "again", tmp_path / "out2", log=lambda line: None)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    more = tune("sequence", 3, "more", f"--init_from={tmp_path / 'out'}")
    assert last(more)["eval/loss"] < 0.5


def test_words_are_labelled(tune: Callable[..., Path]) -> None:
    run = tune("token")
    assert last(run)["eval/f1"] > 0.9 and last(run)["eval/accuracy"] > 0.9
    assert pldr_jax.load(run).classify(["def good"])[0].shape[1] == 2


def test_answers_are_found(tune: Callable[..., Path]) -> None:
    run = tune("question", 30, "run", "--gin.Training.grad_accumulation=2")
    assert last(run)["eval/exact_match"] > 0.7 and last(run)["eval/f1"] > 0.7
    assert np.isfinite(pldr_jax.load(run).classify(["def good"])[0]).all()


def test_what_cannot_be_tuned_is_one_line(
    tune: Callable[..., Path], base: Path, tmp_path: Path
) -> None:
    run = tune("sequence", 1)
    (tmp_path / "held.jsonl").write_text(
        '{"text": "a", "label": "neg"}\n{"text": "b", "label": "x"}\n'
    )
    held = f"--gin.Task.held_out={tmp_path / 'held.jsonl'}"
    for flags, message in (
        ((held,), r"held.jsonl:2: the label 'x' is none of neg, pos$"),
        (("--gin.Task.labels=('a','b','c')",), r"sequence.jsonl:\d+: the label 'pos' is none of a"),
        ((f"--init_from={run}", "--gin.Task.labels=('a','b','c')"), "the model's head has 2; name"),
        ((f"--init_from={run}", "--gin.Task.kind=token"), "the model has a sequence head"),
        (("--gin.Data.source=stdlib",), "is no JSONL; a task needs it"),
        (("--gin.Loss.g_from=prefix",), "a task's labels are not in the text; take 'row'"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            tune("sequence", 2, "none", *flags)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match=r"another model.*num_labels|Task.labels"):
        tune("sequence", 3, "run", "--gin.Task.labels=('pos','neg')")


@pytest.mark.parametrize(
    "kind,flags",
    [("sequence", ["--gin.Lora.rank=2"]), ("question", [])],
    ids=["sequence", "question"],
)
def test_on_a_mesh_it_learns_the_same(
    kind: str, flags: list[str], tune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows over data, the head's logits over tensor, parameters over fsdp; a sequence head
    beside adapters goes on there too.
    """
    flags = ["--gin.Training.log_every=1", *flags]
    one = tune(kind, 3, "one", *flags)
    small = MeshConfig(2, 2, 2)
    monkeypatch.setattr(helpers, "one_device_mesh", lambda config: build_mesh(small))
    if kind == "sequence":
        tune(kind, 2, "mesh", *flags)
    other = tune(kind, 3, "mesh", *flags)
    losses = [
        [row["train/loss"] for row in rows_of(run) if "train/loss" in row] for run in (one, other)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    np.testing.assert_allclose(last(one)["eval/loss"], last(other)["eval/loss"], rtol=1e-2)
    prompts = ["def model good", "tokens", "range poor in else"]
    alone = pldr_jax.load(other).classify(prompts)
    spread = pldr_jax.load(other, mesh=small)
    kernel = spread.params["head"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    for x, y in zip(alone, spread.classify(prompts), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_adapters_beside_a_head(tune: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    """The head is trained whole, the rest by adapters; they go on bit for bit, are merged, and go
    to PEFT's layout and back.
    """
    lora = "--gin.Lora.rank=4", "--gin.Lora.targets=('q','v','w[123]')"
    run = tune("sequence", 30, "run", *lora)
    assert last(run)["eval/accuracy"] > 0.9
    tune("sequence", 10, "other", *lora)
    assert_equal_runs(run, tune("sequence", 30, "other", *lora))
    kept = read_weights(run).params
    assert set(kept["head"]) == {"kernel"} and kept["head"]["kernel"].shape == (16, 2)
    assert {path[-1] for path in flatten_dict(kept["layers"])} == {"a", "b"}
    lm, plain = pldr_jax.load(run), pldr_jax.load(base / "lm")
    assert_same_bits(lm.params["embedding"], plain.params["embedding"])
    assert_same_bits(lm.params["head"], kept["head"])
    prompts = ["def model good", "tokens range poor"]
    expected = lm.classify(prompts)
    assert [int(x.argmax()) for x in expected] == [1, 0]

    def convert(*arguments: object) -> None:
        convert_main([str(argument) for argument in arguments])

    convert("merge", run, tmp_path / "merged")
    convert("export", run, tmp_path / "peft", "--adapter")
    convert("import", tmp_path / "peft", tmp_path / "back", f"--base={base / 'lm'}")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert load_config([str(tmp_path / "back" / "config.gin")]).task.labels == ("neg", "pos")
    for folder in (tmp_path / "merged", tmp_path / "back"):
        assert_same_bits(pldr_jax.load(folder).classify(prompts), expected)
    convert("export", tmp_path / "back", tmp_path / "peft2", "--adapter")
    for file in (tmp_path / "peft").iterdir():
        assert (tmp_path / "peft2" / file.name).read_bytes() == file.read_bytes()
    # A head that is there goes on with adapters; one that has none of the tensors is refused.
    more = tune("sequence", 1, "more", *lora, f"--init_from={tmp_path / 'merged'}")
    assert_same_bits(read_weights(more).params["head"], lm.params["head"])  # the first rate is 0
    with pytest.raises(ConfigError, match=r"'head' is the head of a sequence task, which is tr"):
        tune("sequence", 1, "none", lora[0], "--gin.Lora.targets=('q','head')")
    settings["task_type"] = "TOKEN_CLS"
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"base_model.model.score.bias' is missing$"):
        convert("import", tmp_path / "peft", tmp_path / "no", f"--base={base / 'lm'}")
    save_file(load_file(tmp_path / "peft" / ADAPTER), tmp_path / "peft" / ADAPTER)
    with pytest.raises(ConfigError, match=r"is for a token model, --base has a sequence$"):
        convert("import", tmp_path / "peft", tmp_path / "no", f"--base={tmp_path / 'merged'}")


def test_texts_in_a_stated_order(
    tune: Callable[..., Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And from a backbone without a head, with dropout before the new one."""
    np.save(tmp_path / "order.npy", np.arange(32)[::-1])
    batches = record_batches(monkeypatch)
    export_run(base / "lm", tmp_path / "lm", log=lambda line: None)
    flags = (
        f"--init_from={backbone_of(tmp_path / 'lm', tmp_path / 'bare')}",
        f"--gin.Task.held_out={base / 'sequence.jsonl'}",
        f"--gin.Data.order={tmp_path / 'order.npy'}",
        "--gin.Task.dropout=0.1",
    )
    run = tune("sequence", 2, "run", *flags)
    with pytest.raises(ConfigError, match="adapters train no head, and a PldrllmModel has none"):
        start_from(tmp_path / "bare", tmp_path / "no", [], ["Lora.rank=2"])
    lines = [json.loads(line)["text"] for line in (base / "sequence.jsonl").open()][:32][::-1]
    tokenizer = Tokenizer.load(run / "tokenizer.model")
    rows = [row[0][row[2] > 0].tolist() for batch in batches for row in batch]
    assert rows == [tokenizer.encode(line) for line in lines]
