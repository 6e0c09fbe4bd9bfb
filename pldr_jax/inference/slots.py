"""A batch of slots that decode side by side: admitting prompts to slots, and decoding all of them.

Shapes are fixed: B slots of S tokens. A finished slot is given to the next prompt while the others
go on, so that a queue of any length compiles once a prompt bucket and once to decode.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig, SamplingConfig
from pldr_jax.config.sampling import MAX_STOP_IDS
from pldr_jax.inference.decode import decode_step, prefill
from pldr_jax.inference.sampling import (
    EXCLUDED,
    History,
    SlotSampling,
    adjust,
    draw,
    slot_sampling,
)
from pldr_jax.model.cache import Cache, empty_cache, write_rows
from pldr_jax.model.decoder import Params
from pldr_jax.model.layers import on_gpu
from pldr_jax.model.low_rank import LowRankG
from pldr_jax.model.weights import read_in_loop, stack_layers, take_apart
from pldr_jax.partition import constrain, mesh_scope

MAX_TOP_LOGPROBS = 20
"""Y: the most probable tokens told of a step, at most; OpenAI's limit."""

P = ParamSpec("P")
R = TypeVar("R")


class Slots(flax.struct.PyTreeNode):
    """The whole state of decoding; every step returns a new one.

    Attributes:
      cache: of all slots.
      logits_BV: from which each slot's next token is drawn, float32.
      history: what each text so far, and its request, do to its logits.
      told_B: whether the most probable tokens of each step are asked for.
      active_B: false where a slot is free or its text has ended.
      left_B: new tokens that each text may still have.
      stop_BZ: token ids that end each text, filled up with -1.
      sampling: how each text's tokens are drawn.
    """

    cache: Cache
    logits_BV: jax.Array
    history: History
    told_B: jax.Array
    active_B: jax.Array
    left_B: jax.Array
    stop_BZ: jax.Array
    sampling: SlotSampling


class Prompts(flax.struct.PyTreeNode):
    """Prompts of one bucket that enter slots in one call, and what their requests ask for.

    Attributes:
      slot_Q: the slots, int32. Two prompts in one slot must be the same.
      tokens_QT: prompts, padded on the right to their bucket, which may be longer than a slot.
      length_Q: real tokens of each.
      sampling: how their tokens are drawn.
      stop_QZ: ids that end each text, filled up with -1.
      bias_QV: added to their logits; None is nothing.
      told_Q: whether the most probable tokens of their steps are asked for; None is false.
    """

    slot_Q: jax.Array
    tokens_QT: jax.Array
    length_Q: jax.Array
    sampling: SlotSampling
    stop_QZ: jax.Array
    bias_QV: jax.Array | None = None
    told_Q: jax.Array | None = None


class Emitted(flax.struct.PyTreeNode):
    """What some decode steps gave; [step, slot].

    Attributes:
      token_XB: the tokens drawn.
      logprob_XB: their log-probability in the model's own distribution, at temperature 1.
      valid_XB: true where the token belongs to a text; a stop token does not.
      stopped_XB: true where a stop token was drawn.
      broken_XB: true where a logit was NaN or infinity, which ends the text.
      top_token_XBY, top_logprob_XBY: the most probable tokens, in falling order; zeros in a step in
        which no slot asks for them.
    """

    token_XB: jax.Array
    logprob_XB: jax.Array
    valid_XB: jax.Array
    stopped_XB: jax.Array
    broken_XB: jax.Array
    top_token_XBY: jax.Array
    top_logprob_XBY: jax.Array


def empty_slots(
    config: ModelConfig,
    batch: int,
    capacity: int,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    keep: str,
    dtype: Any,
) -> Slots:
    """Free slots.

    Args:
      config: of the model.
      batch: B.
      capacity: S, tokens that a slot can hold.
      g_lm_LBNHJ: one G_LM [L,1,N,H,J] for all slots, or its factors; None where each has its own,
        or for the identity.
      keep: "G_LM" or "A", what each slot keeps of its prompt.
      dtype: of keys and values.
    """
    slots = Slots(
        cache=empty_cache(config, batch, capacity, g_lm_LBNHJ, keep, dtype),
        logits_BV=jnp.zeros((batch, config.vocab_size), jnp.float32),
        history=History(
            seen_BV=jnp.zeros((batch, config.vocab_size), bool),
            count_BV=jnp.zeros((batch, config.vocab_size), jnp.int32),
            bias_BV=jnp.zeros((batch, config.vocab_size), jnp.float32),
        ),
        told_B=jnp.zeros((batch,), bool),
        active_B=jnp.zeros((batch,), bool),
        left_B=jnp.zeros((batch,), jnp.int32),
        stop_BZ=jnp.full((batch, MAX_STOP_IDS), -1, jnp.int32),
        sampling=jax.tree.map(jnp.asarray, slot_sampling([SamplingConfig()] * batch)),
    )
    return _laid_out(slots)


def admit(
    config: ModelConfig,
    params: Params,
    slots: Slots,
    prompts: Prompts,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    keep: str,
) -> Slots:
    """Runs prompts and puts each into a slot. Donate `slots` when jitting this.

    A prompt's G_LM, keys and values are those it has alone, whatever its neighbours and its place
    among them. Bit for bit so, if its bucket and Q are always the same: G_LM amplifies rounding,
    and products of another shape sum in another order.

    Args:
      params: stacked, or what `unstack_layers` makes of them.
      prompts: of one bucket.
      g_lm_LBNHJ, keep: as `empty_slots` was told; or, where each slot has its own, a G_LM for these
        prompts alone.
    """
    tokens_QT = prompts.tokens_QT
    logits_QV, cache = prefill(
        config, params, tokens_QT, prompts.length_Q, g_lm_LBNHJ, tokens_QT.shape[1], keep
    )
    return enter(config, slots, prompts, logits_QV, cache)


def enter(
    config: ModelConfig, slots: Slots, prompts: Prompts, logits_QV: jax.Array, cache: Cache
) -> Slots:
    """Puts prompts that have been run into slots.

    Args:
      logits_QV: after each prompt.
      cache: their keys and values.
    """
    slot_Q, length_Q, bias_QV = prompts.slot_Q, cache.length_B, prompts.bias_QV
    layers = tuple(
        old.with_prompts(new, slot_Q)
        for old, new in zip(slots.cache.layers, cache.layers, strict=True)
    )
    seen_QV = jax.vmap(functools.partial(seen_tokens, vocab_size=config.vocab_size))(
        prompts.tokens_QT, length_Q
    )

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return write_rows(old, new, slot_Q)

    nothing_QV = jnp.zeros_like(logits_QV)
    of_prompts = History(
        seen_BV=seen_QV,
        count_BV=nothing_QV,
        bias_BV=nothing_QV if bias_QV is None else bias_QV,
    )
    slots = Slots(
        cache=Cache(layers, slots.cache.length_B.at[slot_Q].set(length_Q)),
        logits_BV=put(slots.logits_BV, logits_QV),
        history=jax.tree.map(put, slots.history, of_prompts),
        told_B=slots.told_B.at[slot_Q].set(False if prompts.told_Q is None else prompts.told_Q),
        active_B=slots.active_B.at[slot_Q].set(True),
        left_B=put(slots.left_B, prompts.sampling["max_new_tokens"]),
        stop_BZ=put(slots.stop_BZ, prompts.stop_QZ),
        sampling=jax.tree.map(put, slots.sampling, prompts.sampling),
    )
    return _laid_out(slots)


def seen_tokens(tokens_T: jax.Array, length: jax.Array, vocab_size: int) -> jax.Array:
    """Which tokens [V] are among the first `length` of `tokens_T`."""
    padded_T = jnp.where(jnp.arange(tokens_T.shape[0]) < length, tokens_T, vocab_size)
    return jnp.zeros((vocab_size,), bool).at[padded_T].set(True, mode="drop")


def release(slots: Slots, ended_B: jax.Array) -> Slots:
    """Frees the slots of texts that ended for a reason the steps do not know: a stop string."""
    return _laid_out(slots.replace(active_B=slots.active_B & ~ended_B))


def decode_slots(
    config: ModelConfig,
    unstacked: Params,
    slots: Slots,
    steps: int,
    pieces: int,
    limit: jax.Array | None = None,
) -> tuple[Slots, Emitted]:
    """Up to `steps` tokens of every active slot, in one call. Donate `slots` when jitting this.

    Stops early when no slot is active. What a free slot computes is never read. Ids from `pieces`
    on are never drawn. `limit` is a smaller number of steps, int32, that compiles nothing anew.
    """
    batch = slots.active_B.shape[0]
    top = (steps, batch, min(MAX_TOP_LOGPROBS, config.vocab_size))
    nothing = Emitted(
        token_XB=jnp.zeros((steps, batch), jnp.int32),
        logprob_XB=jnp.zeros((steps, batch), jnp.float32),
        valid_XB=jnp.zeros((steps, batch), bool),
        stopped_XB=jnp.zeros((steps, batch), bool),
        broken_XB=jnp.zeros((steps, batch), bool),
        top_token_XBY=jnp.zeros(top, jnp.int32),
        top_logprob_XBY=jnp.zeros(top, jnp.float32),
    )

    most = steps if limit is None else jnp.minimum(limit, steps)

    def going(state: tuple[jax.Array, Slots, Emitted]) -> jax.Array:
        return (state[0] < most) & jnp.any(state[1].active_B)

    def step(state: tuple[jax.Array, Slots, Emitted]) -> tuple[jax.Array, Slots, Emitted]:
        i, slots, emitted = state
        slots, made = _step(config, read_in_loop(unstacked, i), slots, pieces)
        return i + 1, slots, jax.tree.map(lambda all_, one: all_.at[i].set(one), emitted, made)

    def some_steps(state: tuple[jax.Array, Slots, Emitted]) -> tuple[jax.Array, Slots, Emitted]:
        return jax.lax.fori_loop(0, together, lambda _, state: step(state), state)

    # A GPU waits for its host at every test of a condition that it computes itself.
    together = math.gcd(steps, 4) if on_gpu() else 1
    _, slots, emitted = jax.lax.while_loop(going, some_steps, (jnp.int32(0), slots, nothing))
    # Whole on every device, so that each process can read all of it.
    return slots, jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), emitted)


def _step(
    config: ModelConfig, unstacked: Params, slots: Slots, pieces: int
) -> tuple[Slots, Emitted]:
    cache, active_B = slots.cache, slots.active_B
    token_B, logprob_B, normalizer_B = draw_next(
        slots.logits_BV, slots.history, slots.sampling, cache.length_B, pieces
    )
    finite_B = jnp.isfinite(normalizer_B)
    asked = jnp.any(slots.told_B & active_B)
    top = jax.lax.cond(asked, top_logprobs, _no_top_logprobs, slots.logits_BV, normalizer_B)
    broken_B = active_B & ~finite_B
    stopped_B = active_B & finite_B & jnp.any(token_B[:, None] == slots.stop_BZ, axis=-1)
    valid_B = active_B & ~broken_B & ~stopped_B
    left_B = slots.left_B - valid_B
    full_B = cache.length_B + 1 >= config.context_length
    next_active_B = valid_B & (left_B > 0) & ~full_B
    logits_BV, grown = decode_step(config, unstacked, token_B, cache)
    slots = slots.replace(
        cache=grown.replace(length_B=jnp.where(next_active_B, grown.length_B, cache.length_B)),
        logits_BV=logits_BV,
        history=slots.history.with_token(token_B, valid_B),
        active_B=next_active_B,
        left_B=left_B,
    )
    return _laid_out(slots), Emitted(token_B, logprob_B, valid_B, stopped_B, broken_B, *top)


def draw_next(
    logits_BV: jax.Array,
    history: History,
    sampling: SlotSampling,
    position_B: jax.Array,
    pieces: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The next token of each slot, its log-probability in the model's own distribution, and the
    logarithm of the normaliser of that, which is finite where the logits can be used: a -inf is a
    token that cannot come, NaN and infinity are a broken model.
    """
    drawn_BV = adjust(logits_BV, history, sampling)
    if pieces < logits_BV.shape[-1]:
        drawn_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < pieces, drawn_BV, EXCLUDED)
    token_B = draw(drawn_BV, sampling, position_B)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    normalizer_B = jax.nn.logsumexp(logits_BV, axis=-1)
    # One NaN or infinity among the logits is enough for this sum not to be finite.
    return token_B, chosen_B - normalizer_B, normalizer_B


def top_logprobs(logits_BV: jax.Array, normalizer_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens [B,Y] in falling order, and their log-probabilities, with the bits
    that `draw_next` gives them.
    """
    top_BY, token_BY = jax.lax.top_k(logits_BV, min(MAX_TOP_LOGPROBS, logits_BV.shape[-1]))
    return token_BY, top_BY - normalizer_B[:, None]


def _no_top_logprobs(logits_BV: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = (logits_BV.shape[0], min(MAX_TOP_LOGPROBS, logits_BV.shape[-1]))
    return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)


def _laid_out(slots: Slots) -> Slots:
    """What is outside the cache, as it lives on the mesh in scope: slots over its batch axes."""

    def place(x: jax.Array) -> jax.Array:
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    return slots.replace(
        cache=slots.cache.replace(length_B=place(slots.cache.length_B)),
        logits_BV=constrain(slots.logits_BV, "batch", "vocab"),
        history=jax.tree.map(lambda x: constrain(x, "batch", "vocab"), slots.history),
        told_B=place(slots.told_B),
        active_B=place(slots.active_B),
        left_B=place(slots.left_B),
        stop_BZ=place(slots.stop_BZ),
        sampling=jax.tree.map(place, slots.sampling),
    )


class CompiledSlots:
    """The functions above, jitted for a config and a mesh: each has the signature that it has here
    without the config, and compiles once for each shape of its arguments.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None) -> None:
        self.admit = bind(admit, config, mesh, donate_argnames="slots", static_argnames="keep")
        self.decode = bind(
            decode_slots,
            config,
            mesh,
            donate_argnames="slots",
            static_argnames=("steps", "pieces"),
        )
        self.release = jit_on(release, mesh, donate_argnums=0)
        self.empty = bind(
            empty_slots, config, mesh, static_argnames=("batch", "capacity", "keep", "dtype")
        )
        self.stack = bind(stack_layers, config, mesh)

        def unstack(params: Params) -> Params:
            with mesh_scope(mesh):
                return take_apart(config, params)

        self.unstack = unstack  # many small programs, so that it can let go of what it has read


def bind(
    function: Callable[Concatenate[ModelConfig, P], R],
    config: ModelConfig,
    mesh: Mesh | None,
    **options: Any,
) -> Callable[P, R]:
    """`function` of a config, jitted, with its other arguments."""
    return jit_on(functools.partial(function, config), mesh, **options)


def jit_on(function: Callable[P, R], mesh: Mesh | None, **options: Any) -> Callable[P, R]:
    """`function`, jitted with `options` and called in the scope of the mesh."""
    compiled = jax.jit(function, **options)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with mesh_scope(mesh):
            result: R = compiled(*args, **kwargs)
            return result

    return call


compiled_slots = functools.lru_cache(maxsize=8)(CompiledSlots)
"""Shared by all engines of a config, so that new parameters compile nothing again."""
