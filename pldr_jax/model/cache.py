"""The decode cache: keys, values and G_LM of every layer, and how many tokens each slot holds.

A layer's cache is whatever meets the protocol `LayerCache`: `PlainLayerCache` holds whole keys,
`LowRankLayerCache` holds V^T k of a G_LM in factors (`pldr_jax/model/low_rank.py`).
"""

from typing import Any, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.deductive import DeductiveOutputs, g_lm_shape
from pldr_jax.model.kernels import apply_metric_once, attend_cached
from pldr_jax.model.low_rank import HeadGroup, LowRankG
from pldr_jax.partition import constrain


class LayerOutputs(flax.struct.PyTreeNode):
    """Keys, values and deductive outputs of one layer; [L, ...] stacked out of the decoder.

    Attributes:
      k_BTNH: keys after RoPE.
      v_BTNH: values.
      deductive: A, A_LM, A_P and G_LM.
    """

    k_BTNH: jax.Array
    v_BTNH: jax.Array
    deductive: DeductiveOutputs


class LayerCache(Protocol):
    """One layer's cache, a frozen pytree; every method returns a new one, laid out on the mesh."""

    @property
    def capacity(self) -> int:
        """S, the tokens a slot can hold."""

    @property
    def deductive(self) -> DeductiveOutputs:
        """What each slot keeps of its prompt, G_LM or A; written by `with_prompts` alone."""

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, position_B: jax.Array) -> Self:
        """The cache with one more token (T = 1) of each slot, at its position."""

    def with_prompts(self, prompts: Self, slot_Q: jax.Array) -> Self:
        """The cache with the rows of another one in the slots `slot_Q`. What they hold beyond the
        capacity here is padding.
        """

    def attend(
        self, q_BNH: jax.Array, last_B: jax.Array, g_lm_BNHJ: jax.Array | None = None
    ) -> jax.Array:
        """Attention of one query a slot, before G_LM, to the tokens up to position `last_B`:
        [B,N,H] float32. A given G_LM is used in place of the cached one.
        """


class PlainLayerCache(flax.struct.PyTreeNode):
    """Keys and values of all heads.

    Heads come before tokens because both products of attention are then plain batched matrix
    products; with tokens first, they were seven times slower on a CPU.

    Attributes:
      k_BNSH: keys after RoPE, by position.
      v_BNSH: values.
      deductive: G_LM to decode with ("KV+G"; one for all slots if its batch axis is 1), or A, from
        which the decode step recomputes it ("KV"); neither where G_LM is the identity.
    """

    k_BNSH: jax.Array
    v_BNSH: jax.Array
    deductive: DeductiveOutputs

    @property
    def capacity(self) -> int:
        """S."""
        return self.v_BNSH.shape[2]

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, position_B: jax.Array) -> Self:
        """See `LayerCache`."""
        k_BNSH = _write_token(self.k_BNSH, k_BTNH[:, 0], position_B)
        v_BNSH = _write_token(self.v_BNSH, v_BTNH[:, 0], position_B)
        return self.replace(k_BNSH=k_BNSH, v_BNSH=v_BNSH).laid_out()

    def with_prompts(self, prompts: Self, slot_Q: jax.Array) -> Self:
        """See `LayerCache`."""

        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            shared = old.shape[0] < self.v_BNSH.shape[0]  # one G_LM of all slots
            return old if shared else write_rows(old, new[:, :, : old.shape[2]], slot_Q)

        return jax.tree.map(write, self, prompts).laid_out()

    def attend(
        self, q_BNH: jax.Array, last_B: jax.Array, g_lm_BNHJ: jax.Array | None = None
    ) -> jax.Array:
        """See `LayerCache`."""
        g_lm_BNHJ = self.deductive.G_LM if g_lm_BNHJ is None else g_lm_BNHJ
        q_BNJ = apply_metric_once(q_BNH, g_lm_BNHJ).astype(self.k_BNSH.dtype)
        scores_BNS = jnp.einsum(
            "BNJ,BNSJ->BNS", q_BNJ, self.k_BNSH, preferred_element_type=jnp.float32
        )
        return attend_cached(scores_BNS, self.v_BNSH, last_B)

    def laid_out(self) -> Self:
        """Slots over the batch axes of the mesh in scope, heads over tensor, so that no step moves
        a cache.
        """
        return jax.tree.map(_place, self)


class GroupCache(flax.struct.PyTreeNode):
    """Keys and values of heads that keep the same rank of G_LM.

    Attributes:
      k_BNES: V^T k, k being keys after RoPE. Tokens come last, so that the product with a query and
        the memory of an array are as good for a rank of 1 as for one of 64.
      v_BNSH: values.
      factors: of G_LM; never written.
    """

    k_BNES: jax.Array
    v_BNSH: jax.Array
    factors: HeadGroup

    @classmethod
    def of(cls, factors: HeadGroup, k_BNSH: jax.Array, v_BNSH: jax.Array) -> Self:
        """The group's share of keys and values of all heads. Its factors are a copy, so that
        donating the cache leaves the given ones alive.
        """
        heads = np.array(factors.heads)
        k_BNES = _low_rank("BNSH,NHE->BNES", k_BNSH[:, heads], factors).astype(k_BNSH.dtype)
        factors = jax.tree.map(lambda x: constrain(jnp.copy(x), "heads", None, None), factors)
        return cls(_place(k_BNES), _place(v_BNSH[:, heads]), factors)


class LowRankLayerCache(flax.struct.PyTreeNode):
    """Values of all heads, and keys as V^T k.

    Attributes:
      groups: their heads together are those of the layer.
    """

    groups: tuple[GroupCache, ...]

    @property
    def capacity(self) -> int:
        """S."""
        return self.groups[0].v_BNSH.shape[2]

    @property
    def deductive(self) -> DeductiveOutputs:
        """Nothing: the factors serve every slot."""
        return DeductiveOutputs()

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, position_B: jax.Array) -> Self:
        """See `LayerCache`."""

        def append(group: GroupCache) -> GroupCache:
            heads = np.array(group.factors.heads)
            k_BNE = _low_rank("BNH,NHE->BNE", k_BTNH[:, 0, heads], group.factors)
            return group.replace(
                k_BNES=_place(_write_token(group.k_BNES, k_BNE, position_B, axis=2)),
                v_BNSH=_place(_write_token(group.v_BNSH, v_BTNH[:, 0, heads], position_B)),
            )

        return self.replace(groups=tuple(map(append, self.groups)))

    def with_prompts(self, prompts: Self, slot_Q: jax.Array) -> Self:
        """See `LayerCache`."""

        def write(old: GroupCache, new: GroupCache) -> GroupCache:
            k_BNES = write_rows(old.k_BNES, new.k_BNES[..., : self.capacity], slot_Q)
            v_BNSH = write_rows(old.v_BNSH, new.v_BNSH[:, :, : self.capacity], slot_Q)
            return old.replace(k_BNES=_place(k_BNES), v_BNSH=_place(v_BNSH))

        return self.replace(groups=tuple(map(write, self.groups, prompts.groups)))

    def attend(
        self, q_BNH: jax.Array, last_B: jax.Array, g_lm_BNHJ: jax.Array | None = None
    ) -> jax.Array:
        """See `LayerCache`; the query meets U S of the factors, whatever is given."""
        outs, order = [], []
        for group in self.groups:
            heads, k_BNES = list(group.factors.heads), group.k_BNES
            q = q_BNH[:, np.array(heads)].astype(jnp.float32)
            q_BNE = jnp.einsum("BNH,NHE->BNE", q, group.factors.query_NHE).astype(k_BNES.dtype)
            scores_BNS = jnp.einsum(
                "BNE,BNES->BNS", q_BNE, k_BNES, preferred_element_type=jnp.float32
            )
            outs.append(attend_cached(scores_BNS, group.v_BNSH, last_B))
            order += heads
        return jnp.concatenate(outs, axis=1)[:, np.argsort(order)]


class Cache(flax.struct.PyTreeNode):
    """The whole cache, a frozen pytree: every step returns a new one (and may reuse the old one's
    memory).

    Per-layer leaves, not one stacked array: a stacked cache threaded through a scan is copied at
    every step.

    Attributes:
      layers: one cache a decoder layer.
      length_B: tokens held so far in each slot; also the position of the next one.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def capacity(self) -> int:
        """S, the tokens a slot can hold."""
        return self.layers[0].capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def build_cache(
    outputs: LayerOutputs,
    length_B: jax.Array,
    capacity: int,
    keep: str,
    low_rank: LowRankG | None = None,
) -> Cache:
    """A cache from what a forward pass over the prompts returned.

    Args:
      outputs: keys and values [L,B,T,N,H] and deductive outputs [L,B,N,H,J] of all layers.
      length_B: real tokens of each prompt.
      capacity: S, at least T.
      keep: the deductive output that decoding uses: "G_LM", or "A" to recompute the last steps of
        PLGA each token.
      low_rank: the G_LM of all slots, whose factors decoding uses; `keep` is not read then.
    """

    def padded(x_LBTNH: jax.Array) -> jax.Array:
        x_LBNTH = jnp.swapaxes(x_LBTNH, 2, 3)
        more_T = capacity - x_LBNTH.shape[3]
        return jnp.pad(x_LBNTH, ((0, 0), (0, 0), (0, 0), (0, more_T), (0, 0)))

    kept: Any = getattr(outputs.deductive, keep)

    def layer(i: int, k_BNSH: jax.Array, v_BNSH: jax.Array) -> LayerCache:
        if low_rank is not None:
            groups = low_rank.layers[i]
            return LowRankLayerCache(tuple(GroupCache.of(g, k_BNSH, v_BNSH) for g in groups))
        deductive = DeductiveOutputs(**{keep: None if kept is None else kept[i]})
        return PlainLayerCache(k_BNSH, v_BNSH, deductive).laid_out()

    keys_values = zip(padded(outputs.k_BTNH), padded(outputs.v_BTNH), strict=True)
    return Cache(tuple(layer(i, *pair) for i, pair in enumerate(keys_values)), length_B)


def empty_cache(
    config: ModelConfig,
    batch: int,
    capacity: int,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
    keep: str,
    dtype: Any,
) -> Cache:
    """A cache without tokens.

    Args:
      batch, capacity: B slots of S tokens.
      g_lm_LBNHJ: one G_LM [L,1,N,H,J] for all slots, or its factors; None where each has its own,
        or for the identity.
      keep: "G_LM" or "A", what each slot keeps of its prompt.
      dtype: of keys and values.
    """
    low_rank = g_lm_LBNHJ if isinstance(g_lm_LBNHJ, LowRankG) else None
    kept = None if isinstance(g_lm_LBNHJ, LowRankG) else g_lm_LBNHJ
    if g_lm_LBNHJ is None and config.g_source == "learned":
        kept = jnp.zeros(g_lm_shape(config, batch), jnp.float32)
    no_tokens = jnp.zeros((config.num_layers, batch, 0, config.num_heads, config.head_dim), dtype)
    outputs = LayerOutputs(no_tokens, no_tokens, DeductiveOutputs(**{keep: kept}))
    length_B = constrain(jnp.zeros((batch,), jnp.int32), "batch")
    return build_cache(outputs, length_B, capacity, keep, low_rank)


def write_rows(old: jax.Array, new: jax.Array, slot_Q: jax.Array) -> jax.Array:
    """`old` [B, ...] with the rows of `new` [Q, ...] in place of its rows `slot_Q`; later axes of
    `new` may be shorter. One row of `new` serves all slots.
    """
    new = jnp.broadcast_to(new, (*slot_Q.shape, *new.shape[1:])).astype(old.dtype)
    for i in range(
        slot_Q.shape[0]
    ):  # row by row: each is written in place, on the device that has it
        start = (slot_Q[i],) + (0,) * (old.ndim - 1)
        old = jax.lax.dynamic_update_slice(old, new[i : i + 1], start)
    return old


def _write_token(
    cache: jax.Array, token_BNH: jax.Array, position_B: jax.Array, axis: int = 1
) -> jax.Array:
    """A cache [B,N,S,H] (or [B,N,E,S], with `axis` 2) with one more token of each slot."""

    # One scatter, with slots as its batch axis: XLA writes it in place, and each device its own.
    @jax.vmap
    def write(cache: jax.Array, token_NH: jax.Array, position: jax.Array) -> jax.Array:
        where = cache.at[:, position] if axis == 1 else cache.at[:, :, position]
        return where.set(token_NH.astype(cache.dtype))

    return write(cache, token_BNH, position_B)


def _low_rank(equation: str, k: jax.Array, factors: HeadGroup) -> jax.Array:
    """V^T k, in float32."""
    return jnp.einsum(equation, k.astype(jnp.float32), factors.key_NHE)


def _place(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", "heads", None, None)
