"""The labelled texts of a run: read, split, labelled, and as a stream of batches."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import DataConfig, ExperimentConfig, TaskConfig
from pldr_jax.data.labelled.examples import Example, ExampleRows, digest, make_examples
from pldr_jax.data.labelled.lines import Line, read_lines
from pldr_jax.data.pipeline import TrainIterator, ValidationRows, train_iterator
from pldr_jax.data.rows import stack_rows
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.partition import process_part


@dataclasses.dataclass(frozen=True)
class HeldOutExamples(ValidationRows):
    """Held-out rows [B,3,T], and the examples that they are."""

    examples: Sequence[Example] = ()


class TaskData(NamedTuple):
    """What a run learns from; `config` has its labels, and a model with a head for them."""

    config: ExperimentConfig
    tokenizer: Tokenizer
    batches: TrainIterator
    held_out: HeldOutExamples
    tokens_per_step: int


def open_task_data(
    config: ExperimentConfig,
    saved: ExperimentConfig | None,
    mesh: Mesh,
    log: Callable[[str], None],
) -> TaskData:
    """Reads `Data.source` and `Task.held_out`, and begins the stream of batches.

    Args:
      saved: the config of a run that goes on, whose labels stay what they are.
      log: takes each line.

    Raises:
      ConfigError: by file and line, what cannot be used.
    """
    data = config.data
    if data.tokenizer is None:
        data.fail("tokenizer", "a task needs that of its model; add --init_from, or name a file")
    tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        data.fail("tokenizer", f"has more pieces than the model, {config.model.vocab_size}")
    lines, held_out = _split(config.task, data)
    config = _with_labels(config, saved, lines, log)
    labels = config.task.labels
    examples, others = (
        make_examples(config.model, labels, tokenizer, some) for some in (lines, held_out)
    )
    for name, some in {"training": examples, "held-out": others}.items():
        if cut := sum(example.cut for example in some):
            log(
                f"{cut} of {len(some)} {name} texts are longer than Model.context_length, "
                f"{config.model.context_length}: their ends are left out"
            )
    wanted = config.training.eval_rows or len(others)
    chosen = np.sort(np.random.default_rng(0).permutation(len(others))[:wanted])
    others = [others[k] for k in chosen]
    width = ExampleRows([*examples, *others]).row_shape[1]
    rows, held_rows = ExampleRows(examples, width), ExampleRows(others, width)
    stacked = stack_rows(held_rows, range(len(others)))
    log(f"{config.task.kind} task: {len(examples)} texts to train on, {len(others)} held out")
    batches = train_iterator(
        [rows],
        data.batch_size,
        data.seed,
        process_part(mesh, data.batch_size),
        epochs=data.epochs,
        digest=digest(lines),
        workers=data.workers,
        order=data.order,
    )
    mean = float(np.mean([len(example.tokens) for example in examples]))
    held = HeldOutExamples(stacked, stacked[:1], others)
    return TaskData(config, tokenizer, batches, held, round(data.batch_size * mean))


def _split(task: TaskConfig, data: DataConfig) -> tuple[list[Line], list[Line]]:
    """Lines to train on, and held-out ones: of a file, or chosen by a hash of their text."""
    lines = read_lines(task, data.source, "Data.source")
    if task.held_out is not None:
        return lines, read_lines(task, task.held_out, "Task.held_out")
    train: list[Line] = []
    held_out: list[Line] = []
    for line in lines:
        number = int.from_bytes(hashlib.sha256(repr(line.texts).encode()).digest()[:8])
        (held_out if number < data.validation_fraction * 2**64 else train).append(line)
    if not train or not held_out:
        task.fail("held_out", f"of {len(lines)} texts none is held out; name a file, or give more")
    return train, held_out


def _with_labels(
    config: ExperimentConfig,
    saved: ExperimentConfig | None,
    lines: Sequence[Line],
    log: Callable[[str], None],
) -> ExperimentConfig:
    task = config.task
    if task.kind == "question":
        return config
    each = ([line.label] if task.kind == "sequence" else line.label for line in lines)
    seen = {label for labels in each for label in labels if label is not None}
    labels = task.labels or (saved.task.labels if saved is not None else ())
    if not labels:
        labels = tuple(sorted(seen, key=lambda x: (x.isdecimal() and int(x), x)))
    if len(labels) < 2:
        task.fail("labels", f"the text has only the label {', '.join(labels)!r}; two are needed")
    if saved is not None and saved.task.labels != labels:
        task.fail("labels", f"the run has {saved.task.labels}; take these, or another --run_dir")
    if unseen := [label for label in labels if label not in seen and not _all_numbers(seen)]:
        log(f"note: no text to train on has the label {', '.join(unseen)}")
    return dataclasses.replace(config, task=dataclasses.replace(task, labels=labels))


def _all_numbers(labels: set[str]) -> bool:
    return all(map(str.isdecimal, labels))
