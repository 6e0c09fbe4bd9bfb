"""One text read in one pass: log-probabilities of its tokens, and its deductive outputs."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.inference.request import padded
from pldr_jax.inference.slots import bind, top_logprobs
from pldr_jax.model.decoder import Params, forward
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.reductions import chosen


class Reading(flax.struct.PyTreeNode):
    """What a text gave.

    Attributes:
      logprob_T: of the token after each position, in nats, float32.
      top_token_TY, top_logprob_TY: the most probable tokens there, in falling order.
      finite_T: whether the logits there can be used.
      deductive: A, A_LM, A_P and G_LM, [L,1,N,H,J] each; G_LM alone where it was given.
    """

    logprob_T: jax.Array
    top_token_TY: jax.Array
    top_logprob_TY: jax.Array
    finite_T: jax.Array
    deductive: DeductiveOutputs


def read(
    config: ModelConfig,
    params: Params,
    tokens_T: jax.Array,
    targets_T: jax.Array,
    length: jax.Array,
    g_length: jax.Array,
    g_lm_L1NHJ: jax.Array | None,
) -> Reading:
    """Reads one text; a pure function, to be jitted.

    Args:
      params: stacked, or what `unstack_layers` makes of them.
      tokens_T: the text, padded on the right.
      targets_T: the token after each.
      length: its real tokens.
      g_length: how many of them, from the first on, G_LM is taken from.
      g_lm_L1NHJ: G_LM from outside; None takes that of the text.
    """
    given = g_lm_L1NHJ is not None or config.g_source != "learned"
    outputs = forward(
        config,
        params,
        tokens_T[None],
        g_lm_L1NHJ,
        length[None],
        g_length_B=None if given else g_length[None],
    )
    logits_TV = outputs.logits[0]
    normalizer_T = jax.nn.logsumexp(logits_TV, axis=-1)
    logprob_T = chosen(logits_TV, targets_T) - normalizer_T
    top = top_logprobs(logits_TV, normalizer_T)
    return Reading(logprob_T, *top, jnp.isfinite(normalizer_T), outputs.deductive)


@functools.lru_cache(maxsize=8)
def _compiled(config: ModelConfig, mesh: Mesh | None) -> Any:
    # Scanned: there is a program for every bucket, and unrolled ones take long to compile.
    return bind(read, dataclasses.replace(config, unroll=False), mesh)


def read_text(
    config: ModelConfig,
    params: Params,
    tokens: Sequence[int],
    g_tokens: int | None = None,
    g_lm: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Reading:
    """`read` of a text, in its bucket: compiled once a bucket. Arrays stay on the device.

    Args:
      tokens: at least one and at most one more than the model's context, as the last one is only
        predicted then.
      g_tokens: from how many tokens G_LM is taken; None is all that are read.
      g_lm: [L,1,N,H,J], in place of the text's own.
    """
    read_tokens = tokens[: config.context_length]
    tokens_T, length = padded(read_tokens, config.context_length)
    targets_T: Any = np.zeros_like(tokens_T)
    targets_T[: len(tokens) - 1] = tokens[1:]
    g_length: Any = np.int32(len(read_tokens) if g_tokens is None else g_tokens)
    reading: Reading = _compiled(config, mesh)(params, tokens_T, targets_T, length, g_length, g_lm)
    return reading
