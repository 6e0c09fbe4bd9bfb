"""Log-probabilities of given texts, with G_LM from the whole text, from the context, or from
outside.

Q^T Q sums over every token it is given, so that with G_LM of the whole text the score of a token
depends on the tokens after it. With G_LM of the context, or one from outside (the G-cache of arXiv
2502.13502), it does not: that is what decoding computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.decode import prompt_g_lm
from pldr_jax.inference.given.modes import SCORE_MODES, ScoreMode
from pldr_jax.inference.request import BROKEN, bucket
from pldr_jax.model.decoder import Params, forward
from pldr_jax.model.reductions import most_probable

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""


@dataclasses.dataclass(frozen=True)
class Score:
    """How probable a continuation is after its context.

    Attributes:
      logprob: sum of `logprobs`, nats.
      logprobs: log-probability of each token, nats.
      is_greedy: greedy decoding under the same G_LM gives these tokens.
      tokens: the scored ids; with an empty context, all but the first of the continuation.
    """

    logprob: float
    logprobs: list[float]
    is_greedy: bool
    tokens: list[int]


def score_tokens(
    config: ModelConfig,
    mode: ScoreMode,
    params: Params,
    tokens_BC: jax.Array,
    length_B: jax.Array,
    context_length_B: jax.Array,
    g_lm_L1NHJ: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores every token but the first of each text; a pure function, to be jitted.

    Args:
      mode: "causal" takes G_LM from the first `context_length_B` tokens of each text where none is
        given; the others take the given one, or that of the inputs: as in training, all tokens but
        the last, which is only predicted.
      tokens_BC: contexts and continuations joined, padded on the right.
      length_B: real tokens of each text, at least 2; padding stays out of Q^T Q.
      context_length_B: tokens of the context among them, at least 1 if G_LM is taken from it.
      g_lm_L1NHJ: one G_LM for every text; None takes what `mode` says.

    Returns:
      Of tokens 1 .. C-1, those of the context and padding included, [B,T]: the log-probability,
      nats, float32; whether it is the most probable token; whether the logits can be used, a -inf
      being a token that cannot come.
    """
    targets_BT = tokens_BC[:, 1:]
    read_BT = jnp.arange(targets_BT.shape[1]) < (length_B - 1)[:, None]
    tokens_BT = jnp.where(read_BT, tokens_BC[:, :-1], 0)
    g_lm = g_lm_L1NHJ
    if g_lm is None and mode == "causal" and config.g_source == "learned":
        g_lm = prompt_g_lm(config, params, tokens_BT, context_length_B)
    logits_BTV = forward(config, params, tokens_BT, g_lm, length_B - 1).logits
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    greedy_BT = most_probable(logits_BTV) == targets_BT
    return chosen_BT - normalizer_BT, greedy_BT, jnp.isfinite(normalizer_BT)


@functools.lru_cache(maxsize=24)
def _jitted(config: ModelConfig, mode: ScoreMode) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(score_tokens, config, mode))


def score(
    config: ModelConfig,
    params: Params,
    pairs: Sequence[Pair],
    mode: ScoreMode = "full",
    g_lm: jax.Array | None = None,
    batch_size: int = 8,
) -> list[Score]:
    """Scores each continuation after its context, in batches of similar lengths.

    With an empty context the first token of the continuation has nothing before it and is not
    scored.

    Args:
      pairs: token ids of contexts and continuations, together at most one more than the model's
        context, since the last one is only predicted.
      mode: G_LM of the text: "full" takes it from context and continuation without its last token
        (a token's score then depends on its future), "causal" from the context alone, "frozen" only
        from outside.
      g_lm: G_LM from outside [L,1,N,H,J], the model's predefined one or another; not with "full"
        where the model computes its own.
      batch_size: texts in one batch.

    Raises:
      ConfigError: a pair that cannot be scored, a mode that the model or `g_lm` rules out, or a
        checkpoint whose logits are not finite.
    """
    learned = config.g_source == "learned"
    if mode not in SCORE_MODES:
        raise ConfigError(f"mode = {mode!r}: must be one of {', '.join(map(repr, SCORE_MODES))}")
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size!r}: must be an integer, at least 1")
    if g_lm is not None and g_lm.shape[1] != 1:
        raise ConfigError(f"g_lm: has a batch axis of {g_lm.shape[1]}; one must serve every text")
    if learned and mode == "full" and g_lm is not None:
        raise ConfigError("mode = 'full': takes G_LM from the text; a given g_lm needs 'frozen'")
    if learned and mode == "frozen" and g_lm is None:
        raise ConfigError("mode = 'frozen': this model learns G_LM; give one as g_lm")
    from_context = learned and mode == "causal" and g_lm is None
    for index, pair in enumerate(pairs):
        if problem := _problem(config, pair, from_context):
            raise ConfigError(f"text {index}: {problem}")
    scores: dict[int, Score] = {}
    for indices, batch in _batches(config, pairs, batch_size):
        logprobs_BT, greedy_BT, finite_BT = jax.device_get(
            _jitted(config, mode)(params, *batch, g_lm)
        )
        for i, index in enumerate(indices):
            context, continuation = pairs[index]
            first = max(len(context), 1)
            scored = slice(first - 1, len(context) + len(continuation) - 1)
            if not finite_BT[i, scored].all():
                raise ConfigError(f"text {index}: {BROKEN}")
            logprobs = logprobs_BT[i, scored].astype(np.float64)
            tokens = [int(token) for token in continuation[first - len(context) :]]
            is_greedy = bool(greedy_BT[i, scored].all())
            scores[index] = Score(float(logprobs.sum()), logprobs.tolist(), is_greedy, tokens)
    return [scores[index] for index in range(len(pairs))]


def _problem(config: ModelConfig, pair: Pair, from_context: bool) -> str | None:
    """Why a pair cannot be scored, in one line; None if it can."""
    context, continuation = pair
    length, most = len(context) + len(continuation), config.context_length + 1
    if not len(continuation):
        return "the continuation is empty"
    if not len(context) and from_context:
        return "mode = 'causal' takes G_LM from the context, which is empty; give a g_lm"
    if length == 1:
        return "one token after an empty context has nothing to be predicted from"
    if length > most:
        return (
            f"has {length} tokens, at most {most} are possible: the model's context and one that "
            "is only predicted; shorten it"
        )
    if not all(0 <= token < config.vocab_size for token in (*context, *continuation)):
        return f"has a token id outside the vocabulary of {config.vocab_size}"
    return None


def _batches(
    config: ModelConfig, pairs: Sequence[Pair], batch_size: int
) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Indices of pairs, and their tokens [B,C], lengths and context lengths [B].

    C is one more than a bucket's length and B a power of two or `batch_size`, so that there are few
    shapes; texts beyond the indices hold two tokens.
    """
    buckets: dict[int, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        width = bucket(len(context) + len(continuation) - 1, config.context_length)
        buckets.setdefault(width, []).append(index)
    for width, members in sorted(buckets.items()):
        for start in range(0, len(members), batch_size):
            indices = members[start : start + batch_size]
            batch = min(batch_size, 1 << (len(indices) - 1).bit_length())
            tokens = np.zeros((batch, width + 1), np.int32)
            lengths, contexts = np.full((batch,), 2, np.int32), np.ones((batch,), np.int32)
            for i, index in enumerate(indices):
                context, continuation = pairs[index]
                lengths[i], contexts[i] = len(context) + len(continuation), len(context)
                tokens[i, : lengths[i]] = (*context, *continuation)
            yield indices, (tokens, lengths, contexts)
