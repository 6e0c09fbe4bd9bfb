"""The groups `Loss`, `Optimizer`, `Mesh`, `Checkpoint` and `Training` of the configuration."""

import dataclasses
from typing import Literal

from pldr_jax.config.fields import SEED_LIMIT, ConfigError, Validated, field

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.g_prefix_length is not None and "prefix" not in self.g_from:
            self.fail("g_prefix_length", f"is only read with a prefix, not {self.g_from!r}")
        if self.dag_until_step is not None and self.dag_until_step <= self.dag_warmup_steps:
            self.fail("dag_until_step", f"must be above dag_warmup_steps, {self.dag_warmup_steps}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Validated):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = field(1.5e-2, "peak learning rate", above=0)
    warmup_steps: int = field(200, "steps of linear warm-up from 0", low=0)
    decay_steps: int | None = field(
        None, "step at which the cosine ends; None is Training.steps", low=1
    )
    end_lr_fraction: float = field(
        0.2, "final learning rate as a fraction of the peak", low=0, high=1
    )
    beta1: float = field(0.9, "decay of the first moment", low=0, high=1)
    beta2: float = field(0.95, "decay of the second moment", low=0, high=1)
    eps: float = field(1e-4, "added to the root of the second moment", above=0)
    weight_decay: float = field(1.0, "decoupled weight decay", low=0)
    decay_mask: Literal["all", "matrices"] = field(
        "all", "parameters decayed: all, or all but biases and norms"
    )
    clip: Literal["value", "norm", "none"] = field(
        "value", "gradients clipped element by element, by global norm, or not"
    )
    clip_threshold: float = field(1.0, "the clipping threshold", above=0)


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
