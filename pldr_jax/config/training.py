"""The groups `Loss`, `Mesh`, `Checkpoint` and `Training` of the configuration."""

import dataclasses
from typing import Literal

from pldr_jax.config.fields import SEED_LIMIT, ConfigError, Validated, field

ParameterGroup = Literal[
    "generator", "couplings", "metric_learner", "attention", "ffn", "embedding", "head"
]
"""Parameters by what they do; the generator is the metric learner and the couplings."""

CALIBRATION_ROWS = 16
"""Rows that a calibrated G_LM is the mean of, where nothing else is asked for."""


@dataclasses.dataclass(frozen=True)
class LossConfig(Validated):
    """What G_LM of a training row is computed from, and the coefficients of the DAG regularisers
    (arXiv 2410.16703), whose three losses are metrics even at 0.
    """

    dag_a_lm: float = field(0.0, "coefficient of the DAG loss of A_LM", low=0)
    dag_a_p: float = field(0.0, "coefficient of the DAG loss of A_P", low=0)
    dag_g_lm: float = field(0.0, "coefficient of the DAG loss of G_LM", low=0)
    chunk: int = field(
        0,
        "positions of each row whose logits are in memory at once, in training; 0 is all of them",
        low=0,
    )
    dag_warmup_steps: int = field(
        0, "steps over which the three coefficients rise linearly from 0", low=0
    )
    dag_until_step: int | None = field(
        None, "step from which on the coefficients are 0; None is never", low=1
    )
    g_from: Literal["row", "prefix", "random_prefix", "neighbour", "prompt"] = field(
        "row",
        "tokens that G_LM is computed from in training: all of the row, which tells each position "
        "of its future; its first ones, a fixed or random number, the loss being over the others; "
        "those of another row of the batch, in a second forward pass; or of a conversation the "
        "prompt, as decoding computes it, in evaluation too",
    )
    g_prefix_length: int | None = field(
        None,
        "tokens of the prefix, at most where they are random; None is half of the row, and all of "
        "it where they are random",
        low=1,
    )

    targets: Literal["all", "last", "random_one"] = field(
        "all",
        "targets of a training row that the loss is over: all; the last one, which the rest of the "
        "row predicts; or a random one that is not the last",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.g_prefix_length is not None and "prefix" not in self.g_from:
            self.fail("g_prefix_length", f"is only read with a prefix, not {self.g_from!r}")
        if self.dag_until_step is not None and self.dag_until_step <= self.dag_warmup_steps:
            self.fail("dag_until_step", f"must be above dag_warmup_steps, {self.dag_warmup_steps}")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Validated):
    """Devices along each mesh axis; one axis may be -1, for all that remain."""

    data: int = field(-1, "replicas of the model, each with its part of the batch", low=-1)
    fsdp: int = field(1, "as data, with parameters and optimiser state sharded too", low=-1)
    tensor: int = field(1, "parts of one layer: heads, feed-forward width, vocabulary", low=-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "fsdp", "tensor"):
            if getattr(self, name) == 0:
                self.fail(name, "must be a positive number of devices, or -1 for the rest")
        if [self.data, self.fsdp, self.tensor].count(-1) > 1:
            raise ConfigError(
                f"Mesh = {(self.data, self.fsdp, self.tensor)}: only one axis can be -1"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Validated):
    """When checkpoints are written and which are kept."""

    save_every: int = field(200, "steps between checkpoints", low=1)
    keep_last: int = field(2, "newest checkpoints kept", low=1)
    keep_every: int | None = field(None, "also keep checkpoints at multiples of this step", low=1)
    keep_best: bool = field(True, "also keep the checkpoint with the lowest held-out loss")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Validated):
    """Length of the run, evaluation and logging."""

    steps: int = field(1000, "optimiser steps", low=1)
    grad_accumulation: int = field(
        1,
        "parts that a batch is split into, computed one after the other; the update is that of the "
        "whole batch",
        low=1,
    )
    skip_nonfinite: bool = field(
        False, "leave out updates whose loss or gradient is not finite, instead of stopping"
    )
    max_nonfinite: int = field(
        10, "such updates in a row after which training stops all the same", low=1
    )
    spike_nats: float = field(
        1.0, "a loss so far above the mean of the last 100 steps is counted as a spike", above=0
    )
    seed: int = field(
        0, "seed of the initial parameters, and of random prefixes", low=0, high=SEED_LIMIT
    )
    freeze: tuple[tuple[ParameterGroup, int], ...] = field(
        (),
        "(group, step) pairs: from that step on, 0 being the start, no update and no decay changes "
        "the group: generator, couplings, metric_learner, attention, ffn, embedding or head",
    )
    log_every: int = field(10, "steps between rows of training metrics", low=1)
    eval_every: int = field(200, "steps between evaluations", low=1)
    eval_rows: int = field(128, "held-out rows evaluated; 0 takes all", low=0)
    eval_prefix_g: bool = field(
        False,
        "also evaluate the second half of each row with the G_LM of its first half, which cannot "
        "know it: eval/loss_prefix_g and eval/prefix_gap",
    )
    gap_threshold: float = field(
        0.01, "causal gap in nats a token above which a warning is printed", above=0
    )
    sample_prompt: str = field(
        "def ", "prompt of the sample generated at each evaluation; empty for no sample"
    )
    sample_tokens: int = field(64, "new tokens in that sample", low=1)
    tensorboard: bool = field(True, "also write TensorBoard event files")
    wandb_project: str | None = field(
        None, "also send metrics to this project of Weights & Biases (the extra wandb)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = [group for group, _ in self.freeze]
        if len(set(groups)) < len(groups):
            self.fail("freeze", "names a group twice; give each one step")
        if any(step < 0 for _, step in self.freeze):
            self.fail("freeze", "a step is 0 or more; 0 freezes from the start")
