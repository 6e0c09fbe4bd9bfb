"""Low-rank adapters of linear maps (LoRA, arXiv 2106.09685): W + alpha / rank * A B.

Adapters are a tree beside the parameters of the model. Their product is added to the kernels before
these are used, which leaves every module, kernel and cache as it is; the gradient then stops at A
and B. A task's head is trained whole, and its parameters are in that tree as they are. A kernel is
a matrix here, [fan_in, fan_out], with a leading axis for the decoder layers (and one for the
residual layers of the metric learner).
"""

import hashlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from pldr_jax.config import LoraConfig, ModelConfig
from pldr_jax.model.counts.shapes import param_shapes
from pldr_jax.model.decoder import Params

Path = tuple[str, ...]


def fan_in(config: ModelConfig, path: Path) -> int:
    """Inputs of the linear map at a path, such as ("layers", "ffn", "w1", "kernel")."""
    if "plga" in path:
        return config.metric_width if path[-2] == "w3" else config.head_dim
    return config.ffn_width if path[-2] == "w3" else config.model_dim


def target_shapes(config: ModelConfig, lora: LoraConfig) -> dict[Path, tuple[int, ...]]:
    """Path -> [..., fan_in, fan_out] of the kernels that have an adapter.

    An expression of `Lora.targets` stands for a whole name, `layers.attention.q.kernel`, or for its
    end, with or without `.kernel`, such as `q`.

    Raises:
      ConfigError: an expression names no linear map.
    """
    kernels = {
        path[:-1]: (shape, fan_in(config, path))
        for path, shape in param_shapes(config).items()
        if path[-1] == "kernel" and not (config.task and path[0] == "head")
    }
    targets: dict[Path, tuple[int, ...]] = {}
    for target in lora.targets:
        pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        found = [
            path
            for path in kernels
            if pattern.fullmatch(name := ".".join(path)) or pattern.fullmatch(f"{name}.kernel")
        ]
        if not found:
            names = ", ".join(sorted(".".join(path) for path in kernels if "plga" not in path))
            why = "is no linear map"
            if config.task and pattern.fullmatch("head"):
                why = f"is the head of a {config.task} task, which is trained whole"
            lora.fail("targets", f"{target!r} {why}; there are {names}, and plga's")
        for path in found:
            shape, inputs = kernels[path]
            stacked = shape[: 2 if "residual" in path else 1 if path[0] == "layers" else 0]
            size = math.prod(shape[len(stacked) :])
            targets[path] = (*stacked, inputs, size // inputs)
    return dict(sorted(targets.items()))


def init_adapters(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
    """New adapters, float32: A [..., fan_in, rank] is uniform on +-1 / sqrt(fan_in), B [..., rank,
    fan_out] is 0, so that nothing changes yet.
    """
    adapters = {}
    for number, (path, (*stacked, inputs, outputs)) in enumerate(
        target_shapes(config, lora).items()
    ):
        limit = 1 / math.sqrt(inputs)
        drawn = jax.random.uniform(
            jax.random.fold_in(key, number), (*stacked, inputs, lora.rank), minval=-1, maxval=1
        )
        adapters[(*path, "a")] = limit * drawn
        adapters[(*path, "b")] = jnp.zeros((*stacked, lora.rank, outputs))
    return unflatten_dict(adapters)


def merge_adapters(lora: LoraConfig, base: Params, adapters: Params) -> Params:
    """The parameters of `base` with the adapters added, and with the head of a task where they have
    one; the other parameters are the same arrays.
    """
    head = {"head": adapters["head"]} if "kernel" in adapters.get("head", {}) else {}
    flat, parts = flatten_dict({**base, **head}), flatten_dict(adapters)
    for path, a in parts.items():
        if path[-1] == "a":
            kernel = (*path[:-1], "kernel")
            change = lora.scale * jnp.matmul(a, parts[*path[:-1], "b"], precision="highest")
            flat[kernel] = flat[kernel] + change.reshape(flat[kernel].shape)
    return unflatten_dict(flat)


def without_head(config: ModelConfig, base: Params) -> Params:
    """The parameters that adapters are added to: all but the head of a task."""
    return {name: tree for name, tree in base.items() if not (config.task and name == "head")}


def count_adapter_params(config: ModelConfig, lora: LoraConfig) -> int:
    """Trained parameters of the adapters, without the head of a task."""
    return sum(
        math.prod(stacked) * lora.rank * (inputs + outputs)
        for *stacked, inputs, outputs in target_shapes(config, lora).values()
    )


def _whole(leaf: Any) -> Any:
    """An array that this process can read; all processes of a run call this."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return leaf


def digest_of(params: Params, g_lm: jax.Array | None) -> str:
    """SHA-256 of parameters and predefined G_LM, by name, shape and bits: what an adapter belongs
    to.
    """
    digest = hashlib.sha256()
    leaves: dict[Path, Any] = flatten_dict(params) | ({} if g_lm is None else {("g_lm",): g_lm})
    for path, leaf in sorted(leaves.items()):
        array = np.ascontiguousarray(_whole(leaf))
        digest.update(f"{'.'.join(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
