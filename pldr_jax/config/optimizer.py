"""The group `Optimizer` of the configuration."""

import dataclasses
import math
from typing import Literal

from pldr_jax.config.fields import Validated, field

Pulse = tuple[int, int, float]
"""First step, number of steps, learning rate."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Validated):
    """The update rule and its learning rate; by default AdamW with warm-up and cosine decay."""

    name: Literal["adamw", "sgd", "muon", "adafactor", "lion"] = field(
        "adamw",
        "update rule; muon is for the matrices of the layers, with Nesterov's adamw for all else",
    )
    learning_rate: float = field(1.5e-2, "peak learning rate", above=0)
    generator_learning_rate: float | None = field(
        None,
        "peak rate of the residual layers of the metric learner and of W, b_W, P, a, b_a, on the "
        "same schedule; None is learning_rate",
        above=0,
    )
    schedule: Literal["cosine", "constant", "hold", "wsd"] = field(
        "cosine",
        "after the warm-up: cosine to the end; no change; the peak until hold_until, then cosine; "
        "or the same with decay_shape",
    )
    warmup_steps: int = field(
        200, "steps of linear warm-up, from 0; of 'constant', from peak / warmup_steps", low=0
    )
    hold_until: int | None = field(
        None,
        "last step at the peak, of 'hold' and 'wsd'; None is four fifths of decay_steps",
        low=0,
    )
    decay_steps: int | None = field(
        None, "step at which the decay ends; None is Training.steps", low=1
    )
    decay_shape: Literal["linear", "1-sqrt"] = field("linear", "decay of 'wsd'")
    end_lr_fraction: float = field(
        0.2, "final learning rate as a fraction of the peak; not of 'constant'", low=0, high=1
    )
    pulses: tuple[Pulse, ...] = field(
        (),
        "(step, steps, rate): for so many steps from that one on the rate takes the place of the "
        "scheduled one; the generator's keeps its ratio to it",
    )
    beta1: float = field(
        0.9, "decay of the first moment; of the momentum of sgd and muon", low=0, high=1
    )
    beta2: float = field(0.95, "decay of the second moment", low=0, high=1)
    eps: float = field(1e-4, "added to the root of the second moment", above=0)
    weight_decay: float = field(1.0, "decoupled weight decay, times the learning rate", low=0)
    metric_learner_weight_decay: float | None = field(
        None,
        "weight decay of the metric learner; a large one makes G_LM the same for every text; None "
        "is weight_decay",
        low=0,
    )
    decay_mask: Literal["all", "matrices"] = field(
        "all", "parameters decayed: all, or all but biases and norms"
    )
    clip: Literal["value", "norm", "none"] = field(
        "value", "gradients clipped element by element, by global norm, or not"
    )
    clip_threshold: float = field(1.0, "the clipping threshold", above=0)
    average_decay: float | None = field(
        None,
        "decay of an exponential moving average of the weights, evaluated beside them as "
        "eval/average/...; None keeps none",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hold_until is not None and self.schedule not in ("hold", "wsd"):
            self.fail("hold_until", f"is only read by 'hold' and 'wsd', not {self.schedule!r}")
        for start, steps, rate in self.pulses:
            if start < 0 or steps < 1 or not (math.isfinite(rate) and rate >= 0):
                self.fail("pulses", "a step is 0 or more, steps 1 or more, a rate 0 or more")
        ordered = sorted(self.pulses)
        ends = [start + steps for start, steps, _ in ordered]
        if any(end > later[0] for end, later in zip(ends, ordered[1:], strict=False)):
            self.fail("pulses", "two of them share a step; let one end before the other begins")

    def last_peak_step(self, decay_steps: int) -> int:
        """`hold_until`, or what None stands for."""
        return self.hold_until if self.hold_until is not None else decay_steps * 4 // 5
