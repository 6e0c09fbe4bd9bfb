"""A checkpoint against itself: what holds of every model, whatever its weights."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.inference.decode import decode_step, full_step, prefill
from pldr_jax.interop.weights import Checkpoint
from pldr_jax.model.decoder import forward, unstack_layers
from pldr_jax.verify.findings import Finding, difference

LIMITS = {"float32": 1e-3, "bfloat16": 1e-1}
"""Share of the largest logit by which two ways to the same numbers may be apart: rounding is
amplified where G_LM depends on its input."""
STEPS = 4


def checkpoint_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Caches, batches, padding and a frozen G_LM of a checkpoint, in its own compute dtype."""
    model = dataclasses.replace(checkpoint.config.model, unroll=False)
    params, g_lm = checkpoint.params, checkpoint.g_lm
    length = min(16, model.context_length - STEPS)
    rng, limit = np.random.default_rng(0), LIMITS[model.dtype]
    tokens_BT = rng.integers(0, model.vocab_size, (3, length + STEPS), np.int32)
    first = jax.jit(functools.partial(prefill, model, capacity=length + STEPS))
    lengths_B = np.asarray([length, max(length // 2, 1), 1], np.int32)
    prompts_BT = tokens_BT[:, :length]
    logits_BV, cache = first(params, prompts_BT, lengths_B, g_lm)
    finite = float(np.count_nonzero(~np.isfinite(np.asarray(logits_BV))))
    yield Finding("logits", "entries that are not finite", finite, 0)

    alone = [first(params, prompts_BT[i : i + 1], lengths_B[i : i + 1], g_lm)[0] for i in range(3)]
    off = difference(logits_BV, jnp.concatenate(alone))
    yield Finding("batches", "a prompt beside others and alone", off, limit)

    other_BT = np.where(np.arange(length) < lengths_B[:, None], prompts_BT, 1 % model.vocab_size)
    padded_BV, _ = first(params, other_BT, lengths_B, g_lm)
    yield Finding("padding", "other tokens behind the prompt", difference(padded_BV, logits_BV), 0)

    kept = cache.layers[0].deductive.G_LM is not None
    frozen = jnp.stack([layer.deductive.G_LM for layer in cache.layers]) if kept else g_lm
    whole, step = (jax.jit(functools.partial(f, model)) for f in (full_step, decode_step))
    unstacked, worst = unstack_layers(model, params), 0.0
    rows_BT = np.concatenate([prompts_BT, np.zeros((3, STEPS), np.int32)], axis=1)
    for k in range(STEPS):
        newest_B = tokens_BT[:, length + k]
        rows_BT[np.arange(3), lengths_B + k] = newest_B
        decoded_BV, cache = step(unstacked, newest_B, cache)
        expected_BV = whole(params, rows_BT, lengths_B + k + 1, frozen)
        worst = max(worst, difference(decoded_BV, expected_BV))
    yield Finding("caches", f"{STEPS} decode steps and full passes", worst, limit)

    if model.g_source == "learned":
        run = jax.jit(functools.partial(forward, model))
        own = run(params, tokens_BT)
        given = run(params, tokens_BT, own.deductive.G_LM)
        off = difference(given.logits, own.logits)
        yield Finding("frozen", "its own G_LM given from outside", off, limit)
