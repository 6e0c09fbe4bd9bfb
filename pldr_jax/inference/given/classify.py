"""Logits of a task's head for texts: of a label of the text, of one for each token, or of where an
answer starts and ends.

What a text gives does not depend on the texts beside it: padding comes last, where the causal mask
keeps it from every real token, and stays out of Q^T Q.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.request import BROKEN, bucket
from pldr_jax.model.decoder import Params, forward


def check_head(config: ModelConfig, params: Params, function: str, task: bool = False) -> None:
    """ConfigError where the head is not the one that a function of a model needs, a task's or that
    of a language model.
    """
    if "head" not in params:
        raise ConfigError(
            f"{function}: this is a backbone without a head (PldrllmModel), which makes hidden "
            "states and deductive outputs; for logits, begin a run with it (train.py --init_from), "
            "or open a checkpoint with a head"
        )
    if task and config.task is None:
        raise ConfigError(
            f"{function}: this is a language model; fine-tune it with --gin.Task.kind=..."
        )
    if not task and config.task is not None:
        raise ConfigError(
            f"{function}: this model has a {config.task} head and continues no text; call classify"
        )


def real_length(config: ModelConfig, tokens: Sequence[int]) -> int:
    """Tokens of a text before the padding at its end, at least 1."""
    length = len(tokens)
    while length > 1 and tokens[length - 1] == config.pad_id:
        length -= 1
    return length


def task_logits(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    g_lm: jax.Array | None = None,
) -> jax.Array:
    """Logits of the head, float32: [B,T,Y]; for a sequence head [B,Y], those of
    the last real token. A pure function, to be jitted.

    Args:
      tokens_BT: texts, padded on the right.
      length_B: real tokens of each.
      g_lm: predefined G_LM [L,1,N,H,J].
    """
    logits_BTY = forward(config, params, tokens_BT, g_lm, length_B).logits
    if config.task != "sequence":
        return logits_BTY
    return jnp.take_along_axis(logits_BTY, length_B[:, None, None] - 1, axis=1)[:, 0]


@functools.lru_cache(maxsize=8)
def _jitted(config: ModelConfig) -> Callable[..., jax.Array]:
    return jax.jit(functools.partial(task_logits, config))


def classify(
    config: ModelConfig,
    params: Params,
    texts: Sequence[Sequence[int]],
    g_lm: jax.Array | None = None,
    batch_size: int = 8,
) -> list[np.ndarray]:
    """The logits of each text: [Y] of a sequence head, [T,Y] of the others, float32.

    `Model.pad_id` at the end of a text is padding. The other heads have logits there too.

    Raises:
      ConfigError: a text that is empty, too long or has other ids, or logits that are not finite.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size!r}: must be an integer, at least 1")
    buckets: dict[int, list[int]] = {}
    for index, tokens in enumerate(texts):
        if problem := _problem(config, tokens):
            raise ConfigError(f"prompt {index}: {problem}")
        buckets.setdefault(bucket(len(tokens), config.context_length), []).append(index)
    results: dict[int, np.ndarray] = {}
    for width, members in sorted(buckets.items()):
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            batch = min(batch_size, 1 << (len(indices) - 1).bit_length())
            tokens_BT, length_B = np.zeros((batch, width), np.int32), np.ones(batch, np.int32)
            for i, index in enumerate(indices):
                tokens_BT[i, : len(texts[index])] = texts[index]
                length_B[i] = real_length(config, texts[index])
            logits = jax.device_get(_jitted(config)(params, tokens_BT, length_B, g_lm))
            for i, index in enumerate(indices):
                result = logits[i] if config.task == "sequence" else logits[i, : len(texts[index])]
                if not np.isfinite(result).all():
                    raise ConfigError(f"prompt {index}: {BROKEN}")
                results[index] = np.array(result)
    return [results[index] for index in range(len(texts))]


def _problem(config: ModelConfig, tokens: Sequence[int]) -> str | None:
    """Why a text cannot be classified; None if it can."""
    if not tokens:
        return "is empty"
    if len(tokens) > config.context_length:
        return f"has {len(tokens)} tokens, the model's context is {config.context_length}"
    if not all(0 <= token < config.vocab_size for token in tokens):
        return f"has a token id outside the vocabulary of {config.vocab_size}"
    return None
