"""The group `Model` of the configuration."""

import dataclasses
from typing import Literal

from pldr_jax.config.fields import SEED_LIMIT, Validated, field


@dataclasses.dataclass(frozen=True)
class ModelConfig(Validated):
    """The network: its sizes, where G_LM comes from, and how it is computed."""

    vocab_size: int = field(512, "pieces in the vocabulary (V)", low=1, high=2**24)
    num_layers: int = field(3, "decoder layers (L)", low=1, high=2**12)
    num_heads: int = field(2, "attention heads (N)", low=1, high=2**12)
    head_dim: int = field(
        32,
        "width of one head (H); the model width D is num_heads * head_dim",
        low=2,
        high=2**12,
    )
    ffn_dim: int | None = field(
        None, "width of the feed-forward GLU (F); None is floor(8 D / 3)", low=1, high=2**20
    )
    metric_dim: int | None = field(
        None,
        "width of the metric learner's GLUs (M, A_dff); None is floor(8 H / 3)",
        low=1,
        high=2**16,
    )
    num_residual_layers: int = field(
        8, "residual layers of the metric learner (R, num_reslayerA)", low=0, high=2**12
    )
    num_gated_units: int = field(
        2, "GLUs in each residual layer (U, num_denseA)", low=1, high=2**10
    )
    context_length: int = field(
        128, "longest sequence in tokens; a training row has this many", low=2, high=2**24
    )
    rope_theta: float = field(10000.0, "base of the rotary position frequencies", above=0)
    rope_layout: Literal["interleaved", "half_split"] = field(
        "interleaved", "pairs rotated: (2i, 2i+1), or (i, i + H/2)"
    )
    g_source: Literal["learned", "identity", "random", "external"] = field(
        "learned",
        "G_LM: from power law graph attention, the identity (SDPA), random, or from g_file",
    )
    g_seed: int = field(0, "seed of the random G_LM (g_source = 'random')", low=0, high=SEED_LIMIT)
    g_file: str | None = field(
        None,
        "npz or safetensors file holding G_LM [L,N,H,H] (g_source = 'external'); None where a "
        "checkpoint holds it",
        path=True,
    )
    init: Literal["legacy", "native_port", "normalized"] = field(
        "legacy",
        "initial W, P and a: normal, as published; uniform, as in the transformers port; or that, "
        "and all linear layers but the metric learner's, scaled as at 2 heads of 64",
    )
    layer_norm_eps: float = field(1e-6, "epsilon of every LayerNorm", above=0)
    task: Literal["sequence", "token", "question"] | None = field(
        None,
        "what the head is for: None is the next token; a label of the text, a label of each token, "
        "or where an answer starts and ends in the text (Task.kind sets it)",
    )
    num_labels: int = field(
        0, "labels of a task's head; 2 of a question, 0 without a task", low=0, high=2**20
    )
    pad_id: int | None = field(
        0,
        "piece that fills up the texts of a task: at the end of a text it is left out, and a label "
        "of the text is read from the token before; None is no such piece",
        low=0,
    )
    dtype: Literal["float32", "bfloat16"] = field(
        "float32", "compute dtype of the matrix products; parameters stay float32"
    )
    plga_precision: Literal["default", "high", "highest"] = field(
        "high",
        "float32 products of PLGA on an accelerator: default is TF32 on a GPU and one bfloat16 "
        "pass on a TPU, high TF32 and three passes, highest float32; a CPU always has the last",
    )
    remat: Literal["none", "dots", "full"] = field(
        "none",
        "recompute of a decoder layer in the backward pass: nothing (but see remat_plga), all but "
        "matmuls, all",
    )
    remat_plga: bool = field(
        True,
        "recompute PLGA's residual layers in the backward pass; off is faster on a GPU that has "
        "memory to spare, and slower on a CPU",
    )
    unroll: bool = field(
        True,
        "unroll the scans over layers: slower to compile, faster to run on small models; on a CPU "
        "not that over residual layers",
    )
    attention_kernel: Literal["auto", "xla", "blocks", "cudnn", "flash"] = field(
        "auto",
        "fused: cudnn on a GPU, flash on a TPU; blocks: scores of 512 queries at a time; auto "
        "takes cudnn where it can, and else blocks from 2048 tokens on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 2:
            self.fail("head_dim", "must be even: rotary embedding rotates pairs")
        if self.g_source != "external" and self.g_file is not None:
            self.fail("g_file", f"is only read when g_source = 'external', not {self.g_source!r}")
        if self.attention_kernel == "cudnn" and self.dtype != "bfloat16":
            self.fail("attention_kernel", "the fused kernel needs Model.dtype = 'bfloat16'")
        if (self.num_labels > 0) != (self.task is not None):
            self.fail("num_labels", f"must be 0 without a task, and above it with one: {self.task}")
        if self.task == "question" and self.num_labels != 2:
            self.fail("num_labels", "a question's head has 2: start and end of the answer")
        if self._weights_at_least > MOST_WEIGHTS:
            self.fail(
                "num_layers",
                f"makes {self._weights_at_least:.1e} parameters with the other sizes; at most "
                f"{MOST_WEIGHTS:.0e} are allowed",
            )

    @property
    def _weights_at_least(self) -> int:
        """The weights of the matrices, without biases and norms."""
        units = self.num_residual_layers * self.num_gated_units
        plga = 3 * units * self.head_dim * self.metric_width + 5 * self.model_dim * self.head_dim
        layer = self.model_dim * (4 * self.model_dim + 3 * self.ffn_width) + plga
        return self.num_layers * layer + 2 * self.vocab_size * self.model_dim

    @property
    def head_width(self) -> int:
        """What the head makes of a token: V logits, or one for each label."""
        return self.num_labels if self.task else self.vocab_size

    @property
    def model_dim(self) -> int:
        """D, the width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def ffn_width(self) -> int:
        """F, floor(8 D / 3) unless given."""
        return self.ffn_dim if self.ffn_dim is not None else self.model_dim * 8 // 3

    @property
    def metric_width(self) -> int:
        """M, floor(8 H / 3) unless given."""
        return self.metric_dim if self.metric_dim is not None else self.head_dim * 8 // 3


MOST_WEIGHTS = 10**13
"""More cannot be anything but a mistake, or a file that is out to take all memory."""

HOW_BEGUN = ("init",)
"""Fields of `ModelConfig` that only initial weights depend on."""

HOW_COMPUTED = ("dtype", "plga_precision", "remat", "remat_plga", "unroll", "attention_kernel")
"""Fields of `ModelConfig` that say how the network is computed, not which network it is."""
