"""What a run begins with: its text, its state, and whether it may begin or go on at all."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.pipeline import TrainIterator, ValidationRows
from pldr_jax.data.segment_count import with_segment_count
from pldr_jax.data.text.chat import template_file
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER_CONFIG
from pldr_jax.model.counts.flops import row_flops
from pldr_jax.model.counts.shapes import param_shardings
from pldr_jax.model.decoder import init_params
from pldr_jax.model.deductive import g_lm_shape, predefined_g_lm
from pldr_jax.partition import process_part
from pldr_jax.runs.checkpoint import Checkpointer, Restored
from pldr_jax.training.step import (
    InitialWeights,
    TrainState,
    abstract_state,
    create_state,
    with_base,
)
from pldr_jax.training.task.data import open_task_data


class RunData(NamedTuple):
    """The text of a run.

    Attributes:
      config: with `Data.max_segments` chosen.
      batches: of this process.
      held_out: rows to evaluate on.
      bytes_per_token: of the held-out text.
      tokens_per_step: targets of a batch, on average, over all devices.
      files: of the text, which the run folder keeps, by their names.
    """

    config: ExperimentConfig
    tokenizer: Tokenizer
    batches: TrainIterator
    held_out: ValidationRows
    bytes_per_token: float
    tokens_per_step: int
    files: dict[str, bytes]


def check_resume(run_dir: str, resume: str, latest: int | None) -> bool:
    """Whether a run goes on, from its newest checkpoint, `latest`.

    Raises:
      ConfigError: `resume` rules that out.
    """
    if latest is None and resume == "required":
        raise ConfigError(
            f"--resume=required: {run_dir} holds no checkpoint; start it without the flag"
        )
    if latest is not None and resume == "never":
        raise ConfigError(
            f"--resume=never: {run_dir} already holds step {latest}; choose another --run_dir"
        )
    return latest is not None


def config_facts(config: ExperimentConfig) -> dict[str, Any]:
    """The fields that must be the same in all processes, with their values. Paths need not be, and
    what they lead to is compared when it is open.
    """
    may_differ = {"Data.source", "Data.mixture", "Data.tokenizer", "Data.cache_dir", "Data.workers"}
    may_differ |= {"Data.chat_template", "Lora.base", "Data.order", "Task.held_out"}
    return {
        f"{group}.{name}": value
        for group, fields in config_to_dict(config).items()
        for name, value in fields.items()
        if f"{group}.{name}" not in may_differ
    }


def check_batch_size(config: ExperimentConfig, mesh: Mesh) -> None:
    """ConfigError where the mesh or the microbatches do not divide a batch."""
    shards, n_micro = mesh.shape["data"] * mesh.shape["fsdp"], config.training.grad_accumulation
    if config.data.batch_size % (shards * n_micro):
        also = f" times the {n_micro} parts of Training.grad_accumulation" if n_micro > 1 else ""
        config.data.fail(
            "batch_size",
            f"must be a multiple of the {shards} devices of Mesh.data x Mesh.fsdp{also}",
        )


def open_data(
    config: ExperimentConfig,
    saved: ExperimentConfig | None,
    mesh: Mesh,
    log: Callable[[str], None],
) -> RunData:
    """Prepares the text, and begins its stream of batches.

    Args:
      saved: the config of a run that goes on, whose `Data.max_segments` stays what it is.

    Raises:
      ConfigError: a text that cannot be used, or too little of it.
    """
    if config.task.kind is not None:
        task = open_task_data(config, saved, mesh, log)
        return RunData(*task[:4], 1.0, task.tokens_per_step, {})
    text = open_training_text(config.data, config.model.vocab_size, log)
    if saved is not None and config.data.max_segments is None:
        data = dataclasses.replace(config.data, max_segments=saved.data.max_segments)
        config = dataclasses.replace(config, data=data)
    chat = text.chat_template
    if chat is None and config.loss.g_from == "prompt":
        config.loss.fail("g_from", "the text holds no conversations; take another")
    config = with_segment_count(config, text, row_flops(config.model), log)
    batches = text.train_batches(config, process_part(mesh, config.data.batch_size))
    if chat is not None and (line := text.cut_conversations(config)):
        log(line)
    passes = config.training.steps * config.data.batch_size / batches.n_rows
    if passes > 1 and config.data.epochs is None and config.data.order is None:
        log(
            f"the run reads the {batches.n_rows:,} rows of its text {passes:.1f} times; "
            "Data.epochs = 1 forbids that"
        )
    places = config.data.batch_size * config.model.context_length
    return RunData(
        config,
        text.tokenizer,
        batches,
        text.held_out_rows(config),
        text.bytes_per_token,
        round(places * batches.filled_share),
        {} if chat is None else {TOKENIZER_CONFIG: template_file(chat)},
    )


def check_enough_text(config: ExperimentConfig, start: int, batches_left: int) -> None:
    """ConfigError where `Data.epochs` end before the run does, which is at step `start`."""
    most = start + batches_left
    if config.training.steps > most:
        config.training.fail(
            "steps",
            f"the text is used up after {most} steps, with Data.epochs = "
            f"{config.data.epochs or 1}; lower it, or raise Data.epochs",
        )


def first_state(
    config: ExperimentConfig, mesh: Mesh, initial: InitialWeights | None = None
) -> TrainState:
    """The state of a new run: weights that are given, or drawn with `Training.seed`."""
    if initial is not None:
        params = initial.params
        if "head" not in params:  # of another kind: a task begins with a new one
            draw = jax.jit(
                lambda key: nn.unbox(init_params(config.model, key))["head"],
                out_shardings=param_shardings(config.model, mesh)["head"],
            )
            params = {**params, "head": draw(jax.random.key(config.training.seed))}
        return create_state(config, mesh, initial.g_lm, params)
    return create_state(config, mesh, predefined_g_lm(config.model))


def restore(
    checkpointer: Checkpointer,
    config: ExperimentConfig,
    mesh: Mesh,
    initial: InitialWeights | None = None,
) -> Restored:
    """The newest checkpoint that is whole, its arrays laid out on the mesh.

    Args:
      initial: the weights that adapters belong to, which it does not hold.

    Raises:
      CheckpointError: none can be read.
      ConfigError: it holds adapters, and `initial` is None.
    """
    # Its shape is enough: the checkpoint holds the tensor, and Model.g_file may be gone.
    has_g_lm = config.model.g_source in ("random", "external")
    g_lm: Any = jax.ShapeDtypeStruct(g_lm_shape(config.model), np.float32) if has_g_lm else None
    restored = checkpointer.restore(abstract_state(config, mesh, g_lm))
    base = None if initial is None else initial.params
    return dataclasses.replace(restored, state=with_base(config, mesh, restored.state, base))
