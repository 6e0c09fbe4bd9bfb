"""Conversations as training data: templates, rows whose targets are answers, G_LM of the prompt."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_equal_runs,
    one_device_mesh,
    tiny_config,
    train_here,
)

from pldr_jax.api import LanguageModel, load
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.data.mixture import TrainingText, open_training_text
from pldr_jax.data.rows import INPUTS, PAD_ID, SEGMENTS, TARGETS, stack_rows
from pldr_jax.data.text.chat import (
    ChatFormat,
    find_template,
    template_in,
)
from pldr_jax.model.decoder import Params, init_params
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.losses import token_loss
from pldr_jax.training.step import accumulated_gradients, loss_fn

FIELDS = {
    "Model.vocab_size": 290,
    "Model.context_length": 128,
    "Model.num_layers": 1,
    "Data.packing": "document",
    "Data.validation_fraction": 0.3,
    "Loss.g_from": "prompt",
    "Training.sample_prompt": "",
    "Training.eval_rows": 6,
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(k: int) -> dict[str, Any]:
    """Of one answer, of two, or a prompt and its completion."""
    a, b = k % 7, k % 5
    question, answer = turn("user", f"{a} + {b}?"), turn("assistant", str(a + b))
    if k % 3 == 0:
        return {"prompt": f"{a} + {b} = ", "completion": str(a + b)}
    again = [turn("user", "sure?"), turn("assistant", "yes")] if k % 3 == 1 else []
    return {"messages": [turn("system", f"sum {k}"), question, answer, *again]}


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("chat") / "sums.jsonl", [conversation(k) for k in range(60)]
    )


def config_of(source: Path, **fields: Any) -> ExperimentConfig:
    return tiny_config(source, FIELDS | {name.replace("__", "."): v for name, v in fields.items()})


@pytest.fixture(scope="module")
def text(source: Path) -> TrainingText:
    config = config_of(source)
    return open_training_text(config.data, config.model.vocab_size)


@pytest.fixture(scope="module")
def params(source: Path) -> Params:
    """A model whose G_LM depends on its input."""
    model = config_of(source).model
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(model, jax.random.key(1)))
    plga = params["layers"]["attention"]["plga"]
    plga["a"] = 20.0 * plga["a"]
    return params


def segments(row: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each segment of a row."""
    found = []
    for k in range(1, row[SEGMENTS].max() + 1):
        inputs, targets = (row[plane][row[SEGMENTS] == k] for plane in (INPUTS, TARGETS))
        first = int(np.flatnonzero(targets != PAD_ID)[0])
        assert (targets[first:-1] == inputs[first + 1 :]).all() and (targets[:first] == -1).all()
        found.append((inputs[: first + 1].tolist(), targets[first:].tolist()))
    return found


@pytest.mark.parametrize("packing", ["document", "packed"])
def test_rows_are_prompts_and_their_answers(source, text: TrainingText, packing: str) -> None:
    """Each answer of each conversation once, its prompt all that came before; nothing else is a
    target, and what shares a row are segments.
    """
    config = config_of(source, Data__packing=packing, Data__max_segments=3)
    chat, expected = ChatFormat.of(None, text.tokenizer), []
    for k in range(60):
        expected += [chat.encode_pair(text.tokenizer, pair) for pair in chat.pairs(conversation(k))]
    found = []
    for split in ("train", "validation"):
        (rows,) = text.rows(split, 128, config.data)
        for k in range(len(rows)):
            found += segments(rows[k])
    assert sorted(found) == sorted(expected)
    assert all(answer[-1] == text.tokenizer.eos_id for _, answer in found)
    told = {text.tokenizer.decode(prompt) for prompt, _ in found}
    prompt = "### System:\nsum 1\n\n### User:\n1 + 1?\n\n### Assistant:\n2\n\n### User:\nsure?"
    assert f"{prompt}\n\n### Assistant:\n" in told and "3 + 3 = " in told


def test_conversations_are_not_cut_across_rows(source) -> None:
    config = config_of(source, Loss__g_from="row")
    data = dataclasses.replace(config.data, packing="concat")
    with pytest.raises(ConfigError, match=r"Data\.packing = 'concat': would cut conversations"):
        open_training_text(data, 290).rows("train", 128, data)


def test_what_is_too_long_is_cut_and_counted(source, text: TrainingText) -> None:
    """The first C tokens stay; where no answer begins in them nothing does."""
    config = config_of(source, Model__context_length=88)
    (all_rows,), (rows,) = (text.rows("train", c, config.data) for c in (128, 88))
    whole = [pair for k in range(len(all_rows)) for pair in segments(all_rows[k])]
    cut = [pair for k in range(len(rows)) for pair in segments(rows[k])]
    expected = [(p, a[: 88 - len(p)]) for p, a in whole if len(p) < 88]
    assert sorted(cut) == sorted(expected)
    shorter = sum(len(p) < 88 < len(p) + len(a) for p, a in whole)
    dropped = sum(len(p) >= 88 for p, _ in whole)
    assert (rows.n_cut, rows.n_dropped) == (shorter, dropped) and min(shorter, dropped) > 0
    line = text.cut_conversations(config)
    assert line and f"of {shorter} longer" in line and f"{dropped} are left out" in line
    assert text.cut_conversations(config_of(source)) is None


def test_the_loss_of_a_row_is_the_causal_score_of_its_answer(source, text, params) -> None:
    config = config_of(source)
    (rows,) = text.rows("train", 128, config.data)
    lm = LanguageModel(config.model, params, tokenizer=text.tokenizer)
    batch = stack_rows(rows, range(8))
    pairs = [segments(row)[0] for row in batch]
    scores = lm.score(*map(list, zip(*pairs, strict=True)), mode="causal")
    full = lm.score(*map(list, zip(*pairs, strict=True)), mode="full")
    loss = jax.jit(functools.partial(loss_fn, config))
    for row, one, other in zip(batch, scores, full, strict=True):
        length = jnp.asarray([len(segments(row)[0][0])], jnp.int32)
        _, (tokens, _) = loss(params, None, row[None], length)
        assert float(tokens.count) == len(one.tokens)
        assert abs(float(tokens.loss_sum) + one.logprob) < 1e-5 * len(one.tokens)
        assert abs(float(tokens.loss_sum) + other.logprob) > 1e-4
    _, tokens, _, _ = accumulated_gradients(config, params, None, batch)
    total = sum(score.logprob for score in scores)
    assert abs(float(tokens.loss_sum) + total) < 1e-5 * float(tokens.count)


def test_conversations_that_share_a_row_are_apart(source, text: TrainingText, params) -> None:
    """Loss and gradient of packed rows are those of the same conversations alone; so are they in
    evaluation.
    """
    alone, packed = (
        config_of(source),
        config_of(source, Data__packing="packed", Data__max_segments=3),
    )
    (rows,) = text.rows("train", 128, packed.data)
    batch = stack_rows(rows, range(4))
    assert (batch[:, SEGMENTS].max(1) > 1).all()
    apart = np.zeros((sum(batch[:, SEGMENTS].max(1)), 3, 127), np.int32)
    places = [(row, k) for row in batch for k in range(1, row[SEGMENTS].max() + 1)]
    for target, (row, k) in zip(apart, places, strict=True):
        chosen = row[:, row[SEGMENTS] == k]
        target[:, : chosen.shape[1]] = chosen
        target[SEGMENTS] = target[SEGMENTS] > 0
    results = [
        jax.jit(functools.partial(accumulated_gradients, config))(params, None, rows)
        for config, rows in ((alone, apart), (packed, batch))
    ]
    (_, one, _, gradient), (_, other, _, packed_gradient) = results
    np.testing.assert_allclose(one.loss_sum, other.loss_sum, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-4, atol=3e-6),
        gradient,
        packed_gradient,
    )
    held_out = text.held_out_rows(dataclasses.replace(alone, data=packed.data))
    measured = Evaluator(packed, one_device_mesh(packed.mesh), held_out, 1.0)(params)
    pairs = [pair for row in held_out.rows_BC for pair in segments(row)]
    lm = LanguageModel(alone.model, params, tokenizer=text.tokenizer)
    scores = lm.score(*map(list, zip(*pairs, strict=True)), mode="causal")
    nats = -sum(s.logprob for s in scores) / sum(len(s.tokens) for s in scores)
    assert abs(measured["eval/loss"] - nats) < 1e-5


def test_what_is_no_answer_has_no_gradient() -> None:
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 6, 9)), jnp.float32)
    targets = np.asarray([[-1, -1, 3, 4, -1, -1], [-1, -1, -1, -1, 5, 6]])
    gradient = np.asarray(jax.grad(lambda x: token_loss(x, targets).loss)(logits))
    assert (gradient[targets == PAD_ID] == 0).all() and (gradient[targets != PAD_ID] != 0).any(
        -1
    ).all()


@pytest.mark.slow
def test_a_run_on_conversations_goes_on_bit_for_bit_and_keeps_its_template(
    source, tmp_path, capsys
) -> None:
    fields = {"Training.steps": 4, "Checkpoint.save_every": 2, "Training.eval_every": 2}
    fields |= {"Data.packing": "packed", "Data.max_segments": 3, "Model.context_length": 88}
    config = tiny_config(source, FIELDS | fields)
    train_here(config, tmp_path / "run")
    assert "conversations only the first tokens are trained on" in capsys.readouterr().out
    other = Path(shutil.copytree(tmp_path / "run", tmp_path / "other"))
    shutil.rmtree(other / "checkpoints" / "4")
    for name in ("metrics.jsonl", "samples.txt"):
        (other / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "run" / "metrics.jsonl", other)
    train_here(config, other, resume="required")
    assert_equal_runs(tmp_path / "run", other)
    assert template_in(other) == find_template(None, None)
    assert load(other).tokenizer is not None
