"""Task heads against numbers of the authors' transformers port; import, export, refusals."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from helpers import assert_same_bits
from safetensors.numpy import load_file, save_file

import pldr_jax
from pldr_jax.config import ConfigError, ExperimentConfig, ModelConfig, TaskConfig
from pldr_jax.interop.convert import export_run, import_checkpoint
from pldr_jax.interop.weights import open_checkpoint
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.decoder import ModelOutputs
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.training.laws.targets import target_draws, with_dropout

HEADS = load_file(GOLDENS / "heads" / "golden.safetensors")
LABELS = {"sequence": 3, "token": 5, "question": 2}
CLASSES = {
    "sequence": "PldrllmForSequenceClassification",
    "token": "PldrllmForTokenClassification",
    "question": "PldrllmForQuestionAnswering",
}
FORWARD = 1e-5
"""Of the largest magnitude, as for the rest of the authors' numbers."""
QUIET: dict[str, Any] = {"log": lambda line: None}


def task_folder(folder: Path, task: str, **fields: Any) -> Path:
    """A checkpoint of a task, in the authors' layout: their body and their head."""
    folder.mkdir(parents=True)
    tensors = load_file(GOLDENS / "tiny" / "model.safetensors")
    tensors = {name: x for name, x in tensors.items() if not name.startswith("final_layer")}
    prefix = f"{task}/weights/"
    tensors |= {n.removeprefix(prefix): x for n, x in HEADS.items() if n.startswith(prefix)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((GOLDENS / "tiny" / "config.json").read_text())
    config |= {"architectures": [CLASSES[task]], **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def backbone_of(folder: Path, output: Path) -> Path:
    """What transformers saves of a checkpoint's backbone, `PldrllmModel`."""
    output.mkdir()
    tensors = load_file(folder / "model.safetensors")
    bare = {n.removeprefix("decoder."): x for n, x in tensors.items() if n.startswith("decoder.")}
    save_file(bare, output / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["PldrllmModel"]}
    (output / "config.json").write_text(json.dumps(config))
    for path in folder.glob("tokenizer.model"):
        (output / path.name).write_bytes(path.read_bytes())
    return output


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("heads")
    return {task: task_folder(base / task, task) for task in CLASSES}


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= FORWARD * np.abs(expected).max()


def golden_prompts() -> list[list[int]]:
    rows = zip(HEADS["input_ids"], HEADS["lengths"], strict=True)
    return [ids[:length].tolist() for ids, length in rows]


@pytest.mark.parametrize("task", CLASSES)
def test_logits_are_the_authors(folders: dict[str, Path], task: str) -> None:
    """Rows of three lengths side by side, which are padded, and with padding of the caller's."""
    lm = pldr_jax.load(folders[task])
    assert lm.task == task
    logits = lm.classify(golden_prompts())
    padded = lm.classify(HEADS["input_ids"])
    for row, length in enumerate(HEADS["lengths"]):
        expected = HEADS[f"{task}/logits/{row}"]
        close(logits[row], expected)
        close(padded[row] if task == "sequence" else padded[row][:length], expected)
        assert task == "sequence" or len(padded[row]) == 16
    alone = lm.classify(golden_prompts()[1])
    assert len(alone) == 1
    close(alone[0], HEADS[f"{task}/logits/1"])


def test_the_pooled_token_is_the_last_that_is_no_padding(tmp_path: Path) -> None:
    """By the id that config.json calls padding; a null is none."""
    ids = [36, 54, 19, 28, 7, 7]
    seven = pldr_jax.load(task_folder(tmp_path / "seven", "sequence", pad_token_id=7))
    none = pldr_jax.load(task_folder(tmp_path / "none", "sequence", pad_token_id=None))
    assert_same_bits(seven.classify(ids), seven.classify(ids[:4]))
    close(none.classify(ids)[0], none(np.asarray([ids])).logits[0, -1])
    assert np.abs(none.classify(ids)[0] - seven.classify(ids)[0]).max() > 0.1
    assert seven.classify([7, 7])[0].shape == (3,)


@pytest.mark.parametrize("task", CLASSES)
def test_import_and_export_keep_every_bit(
    folders: dict[str, Path], task: str, tmp_path: Path
) -> None:
    import_checkpoint(folders[task], tmp_path / "run", **QUIET)
    check = export_run(tmp_path / "run", tmp_path / "out", **QUIET)
    assert check.difference < 2e-5
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (folders[task] / name).read_bytes()
    lm, again = pldr_jax.load(folders[task]), pldr_jax.load(tmp_path / "run")
    assert again.task == task
    assert_same_bits(lm.classify(golden_prompts()), again.classify(golden_prompts()))


def test_parameters_of_the_published_fine_tunes() -> None:
    """research figures of v52-81M: the heads on a model of width 896."""
    sizes: dict[str, Any] = {"num_heads": 14, "head_dim": 64, "num_layers": 1, "vocab_size": 300}

    def count(**fields: Any) -> int:
        return count_params(ModelConfig(**sizes, **fields))

    body = count() - 897 * 300
    assert count(task="sequence", num_labels=2) - body == 1_792
    assert count(task="token", num_labels=9) - body == 8_073
    assert count(task="question", num_labels=2) - body == 1_794


def test_what_a_head_cannot_do_is_one_line(folders: dict[str, Path]) -> None:
    lm, language = pldr_jax.load(folders["token"]), pldr_jax.load(GOLDENS / "tiny")
    assert language.task is None
    for call in (
        lambda: lm.generate([5, 6], 2),
        lambda: lm.stream([5, 6], 2),
        lambda: lm.score([5], [6]),
        lambda: lm.run([]),
    ):
        with pytest.raises(ConfigError, match="^(generate|score): this model has a token head"):
            call()
    with pytest.raises(ConfigError, match="^classify: this is a language model"):
        language.classify([5, 6])


@pytest.mark.parametrize(
    "prompts,message",
    [
        ([[]], "prompt 0: is empty"),
        ([[5], [61]], "prompt 1: has a token id outside the vocabulary of 61"),
        ([[5] * 49], "prompt 0: has 49 tokens, the model's context is 48"),
        (["words"], "prompt: this checkpoint has no tokenizer; pass lists of token ids"),
    ],
)
def test_prompts_that_cannot_be_classified(
    folders: dict[str, Path], prompts: Any, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        pldr_jax.load(folders["sequence"]).classify(prompts)
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [0, True])
def test_rows_at_once_are_a_number(folders: dict[str, Path], size: Any) -> None:
    with pytest.raises(ConfigError, match=f"batch_size = {size}: must be an integer, at least 1"):
        pldr_jax.load(folders["sequence"]).classify([5, 6], batch_size=size)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"architectures": ["PldrllmForMultipleChoice"]}, "architectures = .* is supported"),
        ({"id2label": {"0": "a", "1": "b"}}, r"'score.weight' has the shape \(3, 16\)"),
        ({"num_labels": 4}, r"'score.weight' has the shape \(3, 16\)"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: must name each label 0, 1, ... once"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label: must name each label 0, 1, ... once"),
        ({"id2label": ["a"]}, "id2label: must name each label 0, 1, ... once"),
        ({"id2label": {"0": ["a"], "1": "b"}}, "id2label: must name each label 0, 1, ... once"),
        ({"id2label": {"0": 1, "1": "1"}}, "id2label: must name each label 0, 1, ... once"),
        ({"num_labels": "3"}, "num_labels = '3': must be a number of labels"),
        ({"pad_token_id": "x"}, "Model.pad_id: expected int or None, got 'x'"),
        ({"architectures": ["PldrllmForCausalLM"]}, "'final_layer.weight' is missing"),
        ({"architectures": ["PldrllmForTokenClassification"]}, "'score.bias' is missing"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = task_folder(tmp_path / "head", "sequence", **fields)
    with pytest.raises(ConfigError, match=message) as caught:
        pldr_jax.load(folder)
    assert "\n" not in str(caught.value)


def test_what_needs_a_language_model_says_so(folders: dict[str, Path]) -> None:
    """Freezing, analysis and the like read checkpoints by this function."""
    with pytest.raises(ConfigError, match="has a question head; this needs a language model$"):
        open_checkpoint(folders["question"])


def test_a_backbone_has_all_but_logits(tmp_path: Path) -> None:
    lm = pldr_jax.load(backbone_of(GOLDENS / "tiny", tmp_path / "bare"))
    rows = load_file(GOLDENS / "tiny" / "golden.safetensors")
    out = lm(rows["tokens"][:, :-1])
    assert out.logits is None
    close(np.asarray(out.hidden), rows["hidden"])
    close(np.asarray(out.deductive.G_LM), rows["G_LM"])
    for call in (
        lambda: lm.generate([5, 6], 2),
        lambda: lm.classify([5]),
        lambda: lm.score([5], [6]),
    ):
        with pytest.raises(ConfigError, match=r"^\w+: this is a backbone without a head \(Pldrllm"):
            call()
    with pytest.raises(ConfigError, match="is a PldrllmModel, without a head; this needs a lang"):
        open_checkpoint(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"config.json: a PldrllmModel has no head, and a run"):
        import_checkpoint(tmp_path / "bare", tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_dropout_is_of_the_hidden_states_of_training() -> None:
    task = TaskConfig(kind="token", labels=("a", "b"), dropout=0.25)
    config = ExperimentConfig(model=ModelConfig(num_heads=2, head_dim=8), task=task)
    hidden = jnp.ones((64, 9, 16))
    outputs = ModelOutputs(hidden[..., :2], DeductiveOutputs(), hidden, None)  # type: ignore[arg-type]
    params = {"head": {"kernel": jnp.eye(16)[:, :2], "bias": jnp.zeros(2)}}
    draws = target_draws(config, 64, 3)
    made = with_dropout(config, params, outputs, draws)
    kept = np.asarray(made.hidden)
    assert set(np.unique(kept)) == {0, np.float32(1 / 0.75)}
    assert abs((kept == 0).mean() - 0.25) < 0.02
    assert (np.asarray(made.logits) == kept[..., :2]).all()
    assert len({row.tobytes() for row in kept}) == 64
    again = with_dropout(config, params, outputs, target_draws(config, 64, 4))
    assert (np.asarray(again.hidden) != kept).any()
    # A row is dropped alike whatever stands beside it, as in a microbatch.
    part = jax.tree.map(lambda x: x[7:9], outputs)
    np.testing.assert_array_equal(with_dropout(config, params, part, draws[7:9]).hidden, kept[7:9])
    assert with_dropout(config, params, outputs, None) is outputs
    with pytest.raises(ConfigError, match=r"Task.dropout = 0.1: the head of a question has none"):
        TaskConfig(kind="question", dropout=0.1)
