"""Decoding without a key-value cache: everything is recomputed at every token.

Slow: the reference that cached decoding is compared with, and the only way to decode with a G_LM
that is recomputed too.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import full_step, prompt_g_lm
from pldr_jax.inference.request import BROKEN, Completion, FindStop, bias_of, padded
from pldr_jax.inference.sampling import History, SlotSampling, slot_sampling
from pldr_jax.inference.slots import bind, draw_next, seen_tokens
from pldr_jax.model.decoder import Params


def next_token(
    config: ModelConfig,
    params: Params,
    tokens_T: jax.Array,
    length: jax.Array,
    prompt_length: jax.Array,
    g_lm: jax.Array | None,
    bias_V: jax.Array,
    sampling: SlotSampling,
    pieces: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The token after the first `length` ones, of which `prompt_length` are the prompt, its
    log-probability, whether the logits can be used, and the tokens with it.
    """
    logits_1V = full_step(config, params, tokens_T[None], length[None], g_lm)
    places_T = jnp.arange(tokens_T.shape[0])
    new_T = (places_T >= prompt_length) & (places_T < length)
    seen_V = seen_tokens(tokens_T, length, config.vocab_size)
    count_V = jnp.zeros((config.vocab_size,), jnp.int32).at[tokens_T].add(new_T)
    history = History(seen_V[None], count_V[None], bias_V[None])
    drawn = draw_next(logits_1V, history, sampling, length[None], pieces)
    token, logprob, normalizer = (x[0] for x in drawn)
    return token, logprob, jnp.isfinite(normalizer), tokens_T.at[length].set(token, mode="drop")


class CompiledSteps:
    """`next_token` and `prompt_g_lm`, jitted for a config and a mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None) -> None:
        self.next_token = bind(next_token, config, mesh, static_argnames="pieces")
        self.prompt_g_lm = bind(prompt_g_lm, config, mesh)


compiled_steps = functools.lru_cache(maxsize=8)(CompiledSteps)
"""Shared by all engines of a config, as `compiled_slots`."""


def recompute(
    compiled: CompiledSteps,
    params: Params,
    completion: Completion,
    g_lm: jax.Array | None,
    config: ModelConfig,
    pieces: int,
    find_stop: FindStop | None,
) -> Iterator[Completion]:
    """Decodes one completion; yields it after every token.

    Args:
      g_lm: of all its tokens [L,1,N,H,J]; None recomputes it, too, or is the identity.
    """
    request, context_length = completion.request, config.context_length
    needed = min(len(request.prompt) + request.sampling.max_new_tokens, context_length)
    tokens, _ = padded(request.prompt, context_length, needed)
    sampling = slot_sampling([request.sampling])
    prompt_length: Any = np.int32(len(request.prompt))
    bias_V = bias_of(request, config.vocab_size)
    while completion.finish_reason is None:
        length: Any = np.int32(len(request.prompt) + len(completion.tokens))
        token, logprob, finite, tokens = compiled.next_token(
            params, tokens, length, prompt_length, g_lm, bias_V, sampling, pieces
        )
        if not finite:
            completion.fail(BROKEN)
        elif int(token) in (request.sampling.stop_ids or ()):
            completion.finish_reason = "stop"
        else:
            completion.tokens.append(int(token))
            completion.logprobs.append(float(logprob))
            completion.end_when_full(context_length)
        if find_stop is not None and (cut := find_stop(completion)) is not None:
            completion.stop(cut)
        yield completion
