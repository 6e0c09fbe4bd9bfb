"""How fast a planned step could be on a chip."""

import dataclasses
import math

from pldr_jax.config import ExperimentConfig
from pldr_jax.training.plan.chips import Chip
from pldr_jax.training.plan.compile import Plan


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step on a chip, by what bounds it, and the utilisation that follows.

    Attributes:
      compute, memory, links: seconds of matrix products at the full rate, of memory traffic, and of
        collectives.
      low, high: model FLOP utilisation if nothing overlaps, and if all does.
    """

    compute: float
    memory: float
    links: float
    low: float
    high: float


def predict(config: ExperimentConfig, plan: Plan, chip: Chip) -> Prediction:
    """A roofline: the step cannot be faster than its slowest part, nor, if all parts are at their
    stated rates, slower than their sum.

    Memory traffic is the optimiser's (7 passes over its float32 shards), weights read in each pass,
    what is saved written and read, and the logits four times; collectives are those of
    `pldr_jax/partition.py`: parameters gathered twice and gradients scattered over fsdp, gradients
    summed over data, activations summed four times a layer over tensor. Each microbatch reads and
    gathers the weights again, and adds its gradients to those of the others.
    """
    model, mesh = config.model, plan.mesh
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    rows = config.data.batch_size / (data * fsdp)
    tokens = rows * (model.context_length - 1)
    width = 2 if model.dtype == "bfloat16" else 4
    shard = plan.trained_bytes
    whole = 4 * plan.parameters / tensor
    passes = 2 if model.remat == "none" else 3
    parts = config.training.grad_accumulation
    memory = 7 * shard + parts * (passes * whole * width / 4 + 2 * plan.saved_bytes)
    memory += 3 * shard * parts if parts > 1 else 0
    memory += 4 * 4 * tokens * model.vocab_size / tensor
    activations = 4 * model.num_layers * tokens * model.model_dim * width
    links = 0.0
    for size, inner, volume in (
        (tensor, 1, 2 * activations),
        (fsdp, tensor, 3 * parts * whole),
        (data, tensor * fsdp, 2 * parts * shard),
    ):
        inside = chip.node is None or size * inner <= chip.node
        links += volume * (size - 1) / size / (chip.link if inside else chip.network)
    compute, memory = plan.device_flops / chip.flops, memory / chip.bandwidth
    ideal = plan.model_flops / (chip.flops * math.prod(mesh.values()))
    slowest = max(compute, memory, links)
    low, high = ideal / (compute + memory + links), ideal / slowest
    return Prediction(compute, memory, links, low, high)
