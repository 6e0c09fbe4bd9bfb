"""Configuration: frozen dataclasses, one per thing configured, validated when they are built.

A dataclass `XxxConfig` is the group `Xxx` of a config file or flag: `Model.num_layers = 5` in a
gin file, `--gin.Model.num_layers=5` on the command line (`pldr_jax/config/load.py`). Every field
carries its meaning, which `--help` prints, and its bounds, which `__post_init__` checks.
"""

import dataclasses
import math
from typing import Literal

from pldr_jax.config.fields import ConfigError as ConfigError
from pldr_jax.config.fields import Validated as _Validated
from pldr_jax.config.fields import field as _field
from pldr_jax.config.fields import group_name
from pldr_jax.config.model import HOW_COMPUTED as HOW_COMPUTED
from pldr_jax.config.model import ModelConfig as ModelConfig


@dataclasses.dataclass(frozen=True)
class LossConfig(_Validated):
    """What G_LM of a training row is computed from, and the coefficients of the DAG regularisers
    (arXiv 2410.16703), whose three losses are metrics even at 0.
    """

    dag_a_lm: float = _field(0.0, "coefficient of the DAG loss of A_LM", low=0)
    dag_a_p: float = _field(0.0, "coefficient of the DAG loss of A_P", low=0)
    dag_g_lm: float = _field(0.0, "coefficient of the DAG loss of G_LM", low=0)
    chunk: int = _field(
        0,
        "positions of each row whose logits are in memory at once, in training; 0 is all of them",
        low=0,
    )
    dag_warmup_steps: int = _field(
        0, "steps over which the three coefficients rise linearly from 0", low=0
    )
    dag_until_step: int | None = _field(
        None, "step from which on the coefficients are 0; None is never", low=1
    )
    g_from: Literal["row", "prefix", "random_prefix", "neighbour"] = _field(
        "row",
        "tokens that G_LM is computed from in training: all of the row, which tells each position "
        "of its future; its first ones, a fixed or random number, the loss being over the others; "
        "or those of another row of the batch, in a second forward pass",
    )
    g_prefix_length: int | None = _field(
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
class OptimizerConfig(_Validated):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = _field(1.5e-2, "peak learning rate", above=0)
    warmup_steps: int = _field(200, "steps of linear warm-up from 0", low=0)
    decay_steps: int | None = _field(
        None, "step at which the cosine ends; None is Training.steps", low=1
    )
    end_lr_fraction: float = _field(
        0.2, "final learning rate as a fraction of the peak", low=0, high=1
    )
    beta1: float = _field(0.9, "decay of the first moment", low=0, high=1)
    beta2: float = _field(0.95, "decay of the second moment", low=0, high=1)
    eps: float = _field(1e-4, "added to the root of the second moment", above=0)
    weight_decay: float = _field(1.0, "decoupled weight decay", low=0)
    decay_mask: Literal["all", "matrices"] = _field(
        "all", "parameters decayed: all, or all but biases and norms"
    )
    clip: Literal["value", "norm", "none"] = _field(
        "value", "gradients clipped element by element, by global norm, or not"
    )
    clip_threshold: float = _field(1.0, "the clipping threshold", above=0)


@dataclasses.dataclass(frozen=True)
class DataConfig(_Validated):
    """Text, tokenizer and batches."""

    source: str = _field(
        "stdlib",
        "'stdlib' (the interpreter's own sources), a text file, folder or glob, or a folder that "
        "pldr-data build has made",
    )
    mixture: tuple[str, ...] = _field(
        (), "folders that pldr-data build has made, trained on together; takes source's place"
    )
    mixture_weights: tuple[float, ...] = _field(
        (), "shares of the rows, one a folder of mixture; () is by their tokens"
    )
    tokenizer: str | None = _field(
        None,
        "SentencePiece model to load; None trains one with Model.vocab_size pieces on the text",
    )
    tokenizer_sample_bytes: int = _field(
        1_000_000, "text that a new tokenizer is trained on", low=1000
    )
    validation_fraction: float = _field(
        0.05,
        "share of the documents held out, chosen by their names; prepared text has its own",
        above=0,
        high=0.5,
    )
    packing: Literal["concat", "document", "packed"] = _field(
        "concat",
        "what a row is: documents joined and cut, a document or a piece of one, or several of "
        "these side by side, each with its own G_LM",
    )
    max_segments: int | None = _field(
        None,
        "documents in a row at most (packing = 'packed'); None is as many as make training "
        "fastest, by the lengths of the documents and the cost of a G_LM",
        low=1,
    )
    batch_size: int = _field(16, "sequences in a step, over all devices", low=1)
    seed: int = _field(0, "seed of the shuffle", low=0)
    epochs: int | None = _field(
        None, "passes over the text at most, more Training.steps are an error; None is any", low=1
    )
    workers: int = _field(
        0, "processes that make batches ahead, in each process of the run; 0 is threads", low=0
    )
    cache_dir: str | None = _field(
        None, "where tokenised text is kept; None is the user's cache folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture_weights and len(self.mixture_weights) != len(self.mixture):
            self.fail("mixture_weights", f"must be one a folder of mixture, {len(self.mixture)}")
        if any(not 0 < weight < math.inf for weight in self.mixture_weights):
            self.fail("mixture_weights", "must all be greater than 0")

    @property
    def segments_per_row(self) -> int:
        """K, the segments of a row that are kept apart; 1 unless packing is 'packed'.

        Raises:
          ConfigError: it is not chosen yet (`pldr_jax/data/segment_count.py`).
        """
        if self.packing != "packed":
            return 1
        if self.max_segments is None:
            self.fail("max_segments", "is chosen where a run has its text; give a number here")
        return self.max_segments

    @property
    def keeps_segments(self) -> bool:
        """Whether a row may hold several segments."""
        return self.packing == "packed" and self.max_segments != 1


@dataclasses.dataclass(frozen=True)
class MeshConfig(_Validated):
    """Devices along each mesh axis; one axis may be -1, for all that remain."""

    data: int = _field(-1, "replicas of the model, each with its part of the batch", low=-1)
    fsdp: int = _field(1, "as data, with parameters and optimiser state sharded too", low=-1)
    tensor: int = _field(1, "parts of one layer: heads, feed-forward width, vocabulary", low=-1)

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
class CheckpointConfig(_Validated):
    """When checkpoints are written and which are kept."""

    save_every: int = _field(200, "steps between checkpoints", low=1)
    keep_last: int = _field(2, "newest checkpoints kept", low=1)
    keep_every: int | None = _field(None, "also keep checkpoints at multiples of this step", low=1)
    keep_best: bool = _field(True, "also keep the checkpoint with the lowest held-out loss")


@dataclasses.dataclass(frozen=True)
class TrainingConfig(_Validated):
    """Length of the run, evaluation and logging."""

    steps: int = _field(1000, "optimiser steps", low=1)
    grad_accumulation: int = _field(
        1,
        "parts that a batch is split into, computed one after the other; the update is that of the "
        "whole batch",
        low=1,
    )
    skip_nonfinite: bool = _field(
        False, "leave out updates whose loss or gradient is not finite, instead of stopping"
    )
    max_nonfinite: int = _field(
        10, "such updates in a row after which training stops all the same", low=1
    )
    spike_nats: float = _field(
        1.0, "a loss so far above the mean of the last 100 steps is counted as a spike", above=0
    )
    seed: int = _field(0, "seed of the initial parameters, and of random prefixes", low=0)
    log_every: int = _field(10, "steps between rows of training metrics", low=1)
    eval_every: int = _field(200, "steps between evaluations", low=1)
    eval_rows: int = _field(128, "held-out rows evaluated; 0 takes all", low=0)
    eval_prefix_g: bool = _field(
        False,
        "also evaluate the second half of each row with the G_LM of its first half, which cannot "
        "know it: eval/loss_prefix_g and eval/prefix_gap",
    )
    gap_threshold: float = _field(
        0.01, "causal gap in nats a token above which a warning is printed", above=0
    )
    sample_prompt: str = _field(
        "def ", "prompt of the sample generated at each evaluation; empty for no sample"
    )
    sample_tokens: int = _field(64, "new tokens in that sample", low=1)
    tensorboard: bool = _field(True, "also write TensorBoard event files")
    wandb_project: str | None = _field(
        None, "also send metrics to this project of Weights & Biases (the extra wandb)"
    )


@dataclasses.dataclass(frozen=True)
class GenerationConfig(_Validated):
    """Decoding: where G_LM comes from and how the next token is drawn."""

    max_new_tokens: int = _field(128, "new tokens for each prompt", low=1, high=2**31 - 1)
    temperature: float = _field(0.0, "0 is greedy; otherwise logits are divided by it", low=0)
    top_k: int = _field(0, "draw from the k most probable tokens; 0 is off", low=0, high=2**31 - 1)
    top_p: float = _field(
        1.0, "draw from the smallest set whose probability reaches p; 1 is off", above=0, high=1
    )
    min_p: float = _field(
        0.0,
        "draw from tokens at least this share as probable as the best one; 0 is off",
        low=0,
        high=1,
    )
    repetition_penalty: float = _field(
        1.0, "above 1 makes tokens already in the text less probable; 1 is off", above=0
    )
    seed: int = _field(
        0, "seed of the draws; the prompt of row i draws with seed + i", low=0, high=2**32 - 1
    )
    rows: int = _field(8, "prompts decoded side by side", low=1)
    truncate: Literal["error", "left"] = _field(
        "error",
        "a prompt that is too long: an error, or cut at its start so that max_new_tokens fit too",
    )
    g_mode: Literal["prompt", "first", "frozen", "identity", "recompute"] = _field(
        "prompt",
        "G_LM: each prompt's, the first prompt's, g_file's or the checkpoint's own, the identity, "
        "or recomputed at every token",
    )
    g_file: str | None = _field(
        None, "npz or safetensors file holding G_LM [L,N,H,H] (g_mode = 'frozen')"
    )
    kv_cache: bool = _field(True, "cache keys and values; off recomputes them at every token")
    g_cache: bool = _field(
        True, "cache G_LM itself; off caches the metric tensor A and recomputes the last steps"
    )
    cache_dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "dtype of cached keys and values; auto is Model.dtype"
    )
    rank_budget: float | None = _field(
        None,
        "relative error of a G_LM shared by all prompts (g_mode 'first' or 'frozen') for which "
        "keys are cached in fewer numbers; 0 keeps every rank",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.g_file is not None and self.g_mode != "frozen":
            self.fail("g_file", f"is only read when g_mode = 'frozen', not {self.g_mode!r}")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that defines a run; each field is one group."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self) -> None:
        decay_steps = self.optimizer.decay_steps or self.training.steps
        if self.optimizer.warmup_steps >= decay_steps:
            self.optimizer.fail(
                "warmup_steps", f"must be below the {decay_steps} steps of the schedule"
            )
        if self.data.packing == "packed" and self.model.attention_kernel in ("cudnn", "flash"):
            self.model.fail("attention_kernel", "fused kernels know no segments; take 'auto'")
        dag_terms = (self.loss.dag_a_lm, self.loss.dag_a_p, self.loss.dag_g_lm)
        if self.model.g_source != "learned" and any(dag_terms):
            self.model.fail(
                "g_source",
                "a predefined G_LM cannot be regularised: set the Loss.dag_* coefficients to 0",
            )
        self._check_g_from()

    def _check_g_from(self) -> None:
        """Refuses a `Loss.g_from` that model, rows or batch do not allow."""
        loss, longest = self.loss, self.model.context_length - 1
        if loss.g_from != "row":
            if self.model.g_source != "learned":
                loss.fail("g_from", "a predefined G_LM is computed from no tokens; take 'row'")
            if self.data.keeps_segments:
                loss.fail("g_from", "rows with segments know 'row' alone; take another packing")
        if (loss.g_prefix_length or 1) > longest:
            loss.fail("g_prefix_length", f"a row has {longest} inputs; take at most that many")
        if (
            loss.g_from == "neighbour"
            and self.data.batch_size // self.training.grad_accumulation < 2
        ):
            loss.fail("g_from", "needs 2 rows a step, or part of one; raise Data.batch_size")
        if self.training.eval_prefix_g and self.data.keeps_segments:
            self.training.fail("eval_prefix_g", "rows with segments have no prefix; take False")


GROUPS: dict[str, type] = {
    group_name(type(f.default)): type(f.default) for f in dataclasses.fields(ExperimentConfig)
}
"""Group name -> dataclass, in the order in which `--help` lists them."""
