"""The immutable decode cache: keys, values and G_LM of every layer, and how far each row has
come.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ModelConfig
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.low_rank import HeadGroup, LowRankG
from pldr_jax.partition import constrain


class LayerOutputs(flax.struct.PyTreeNode):
    """What one layer's forward pass leaves for others; [L, ...] stacked out of the decoder.

    Attributes:
      k_BTNH: keys after RoPE.
      v_BTNH: values.
      deductive: the deductive outputs of the row.
    """

    k_BTNH: jax.Array
    v_BTNH: jax.Array
    deductive: DeductiveOutputs


class LayerCache(flax.struct.PyTreeNode):
    """One layer's cache. Prefill alone writes `deductive`: `append` names keys and values only.

    Attributes:
      k_BNSH: keys after RoPE; slot s holds the token at position s.
      v_BNSH: values.
      deductive: G_LM to decode with ("KV+G"; one for all rows if its batch axis is 1), or A, from
        which the decode step recomputes it ("KV"); neither where G_LM is the identity.
    """

    k_BNSH: jax.Array
    v_BNSH: jax.Array
    deductive: DeductiveOutputs

    @property
    def slots(self) -> int:
        """S, the tokens a row can hold."""
        return self.v_BNSH.shape[2]

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, slot_B: jax.Array) -> "LayerCache":
        """The cache with one more token (T = 1), written at each row's own slot."""
        k_BNSH = _write_token(self.k_BNSH, k_BTNH[:, 0], slot_B)
        v_BNSH = _write_token(self.v_BNSH, v_BTNH[:, 0], slot_B)
        return self.replace(k_BNSH=k_BNSH, v_BNSH=v_BNSH).laid_out()

    def with_row(self, row: "LayerCache", slot: jax.Array) -> "LayerCache":
        """The cache with keys and values of another's only row in the row `slot`; what the other
        holds beyond the room here is padding.
        """
        k_BNSH = write_row(self.k_BNSH, row.k_BNSH[:, :, : self.slots], slot)
        v_BNSH = write_row(self.v_BNSH, row.v_BNSH[:, :, : self.slots], slot)
        return self.replace(k_BNSH=k_BNSH, v_BNSH=v_BNSH)

    def laid_out(self) -> "LayerCache":
        """The cache as it lives on the mesh in scope: rows over its batch axes, heads over tensor.

        Every function that makes or changes a cache ends with it, so that no step moves one.
        """
        return jax.tree.map(_place, self)


class GroupCache(flax.struct.PyTreeNode):
    """The cache of heads that keep the same rank of G_LM (`pldr_jax/model/low_rank.py`).

    Attributes:
      k_BNES: V^T k, k being keys after RoPE. Slots come last, so that both the product with a query
        and the memory of an array are as good for a rank of 1 as for one of 64.
      v_BNSH: values.
      factors: of G_LM; written by nothing.
    """

    k_BNES: jax.Array
    v_BNSH: jax.Array
    factors: HeadGroup


class LowRankLayerCache(flax.struct.PyTreeNode):
    """One layer's cache where keys are held as V^T k; in place of a `LayerCache`.

    Attributes:
      groups: their heads together are those of the layer.
    """

    groups: tuple[GroupCache, ...]

    @property
    def slots(self) -> int:
        """S, the tokens a row can hold."""
        return self.groups[0].v_BNSH.shape[2]

    @classmethod
    def of(
        cls, groups: Sequence[HeadGroup], k_BNSH: jax.Array, v_BNSH: jax.Array
    ) -> "LowRankLayerCache":
        """The cache that holds these keys and values of all heads of a layer."""

        def part(factors: HeadGroup) -> GroupCache:
            heads = np.array(factors.heads)
            k_BNES = _reduced("BNSH,NHE->BNES", k_BNSH[:, heads], factors)
            return GroupCache(k_BNES.astype(k_BNSH.dtype), v_BNSH[:, heads], _own(factors))

        return cls(tuple(part(factors) for factors in groups)).laid_out()

    def append(
        self, k_BTNH: jax.Array, v_BTNH: jax.Array, slot_B: jax.Array
    ) -> "LowRankLayerCache":
        """The cache with one more token (T = 1), written at each row's own slot."""

        def part(group: GroupCache) -> GroupCache:
            heads = np.array(group.factors.heads)
            k_BNE = _reduced("BNH,NHE->BNE", k_BTNH[:, 0, heads], group.factors)
            return group.replace(
                k_BNES=_write_token(group.k_BNES, k_BNE, slot_B, axis=2),
                v_BNSH=_write_token(group.v_BNSH, v_BTNH[:, 0, heads], slot_B),
            )

        return LowRankLayerCache(tuple(map(part, self.groups))).laid_out()

    def with_row(self, row: "LowRankLayerCache", slot: jax.Array) -> "LowRankLayerCache":
        """As `LayerCache.with_row`."""

        def part(old: GroupCache, new: GroupCache) -> GroupCache:
            return old.replace(
                k_BNES=write_row(old.k_BNES, new.k_BNES[..., : self.slots], slot),
                v_BNSH=write_row(old.v_BNSH, new.v_BNSH[:, :, : self.slots], slot),
            )

        return LowRankLayerCache(tuple(map(part, self.groups, row.groups)))

    def laid_out(self) -> "LowRankLayerCache":
        """As `LayerCache.laid_out`; the heads of each group are split by themselves."""

        def place(group: GroupCache) -> GroupCache:
            factors = jax.tree.map(lambda x: constrain(x, "heads", None, None), group.factors)
            return GroupCache(_place(group.k_BNES), _place(group.v_BNSH), factors)

        return LowRankLayerCache(tuple(map(place, self.groups)))


class Cache(flax.struct.PyTreeNode):
    """The whole cache, a frozen pytree: every step returns a new one (and may reuse the old one's
    memory).

    Per-layer leaves, not one stacked array: a stacked cache threaded through a scan is copied at
    every step.

    Attributes:
      layers: one cache a decoder layer; all of them `LowRankLayerCache` where G_LM is factorised.
      length_B: tokens held so far in each row; also the position of the next one.
    """

    layers: tuple[LayerCache | LowRankLayerCache, ...]
    length_B: jax.Array

    @property
    def slots(self) -> int:
        """S, the tokens a row can hold."""
        return self.layers[0].slots

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def build_cache(
    outputs: LayerOutputs,
    length_B: jax.Array,
    slots: int,
    config: ModelConfig,
    keep: str,
    dtype: Any = None,
    low_rank: LowRankG | None = None,
) -> Cache:
    """A cache from what a forward pass over the prompts returned.

    Args:
      outputs: keys and values [L,B,T,N,H] and deductive outputs [L,B,N,H,J] of all layers.
      length_B: real tokens of each row.
      slots: S, at least T: room for the prompt and what will be generated.
      keep: the deductive output that decoding uses: "G_LM", or "A" to recompute the last steps of
        PLGA each token.
      dtype: of keys and values; None keeps theirs.
      low_rank: the G_LM of all rows, whose factors decoding uses; `keep` is not read then.
    """

    def room(x_LBTNH: jax.Array) -> jax.Array:
        x_LBNTH = jnp.swapaxes(x_LBTNH, 2, 3).astype(dtype or x_LBTNH.dtype)
        width = slots - x_LBNTH.shape[3]
        return jnp.pad(x_LBNTH, ((0, 0), (0, 0), (0, 0), (0, width), (0, 0)))

    k_LBNSH, v_LBNSH = room(outputs.k_BTNH), room(outputs.v_BTNH)
    if low_rank is not None:
        parts = zip(low_rank.layers, k_LBNSH, v_LBNSH, strict=True)
        return Cache(tuple(LowRankLayerCache.of(*part) for part in parts), length_B)
    kept: Any = getattr(outputs.deductive, keep)
    layers = tuple(
        LayerCache(
            k_LBNSH[i],
            v_LBNSH[i],
            DeductiveOutputs(**{keep: None if kept is None else kept[i]}),
        ).laid_out()
        for i in range(config.num_layers)
    )
    return Cache(layers=layers, length_B=length_B)


def empty_low_rank(
    groups: Sequence[HeadGroup], rows: int, slots: int, head_dim: int, dtype: Any
) -> LowRankLayerCache:
    """A layer's cache [B = rows, S = slots] without tokens."""

    def part(factors: HeadGroup) -> GroupCache:
        heads, _, rank = factors.key_NHE.shape
        k_BNES = jnp.zeros((rows, heads, rank, slots), dtype)
        v_BNSH = jnp.zeros((rows, heads, slots, head_dim), dtype)
        return GroupCache(k_BNES, v_BNSH, _own(factors))

    return LowRankLayerCache(tuple(part(factors) for factors in groups)).laid_out()


def write_row(old: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """`old` with the row `new` [1, ...] at `slot`; later axes of `new` may be shorter."""
    start = (slot,) + (0,) * (old.ndim - 1)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)


def _write_token(
    cache: jax.Array, new_BNX: jax.Array, slot_B: jax.Array, axis: int = 1
) -> jax.Array:
    """A cache [B,N,S,X] (or [B,N,X,S], with `axis` 2) with one more token [B,N,X] of each row."""

    # One scatter, with rows as its batch axis: XLA writes it in place, and each device its own
    # rows.
    @jax.vmap
    def write(row: jax.Array, new_NX: jax.Array, slot: jax.Array) -> jax.Array:
        where = row.at[:, slot] if axis == 1 else row.at[:, :, slot]
        return where.set(new_NX.astype(row.dtype))

    return write(cache, new_BNX, slot_B)


def _own(factors: HeadGroup) -> HeadGroup:
    """A copy, so that donating the cache leaves the given factors as they are."""
    return jax.tree.map(jnp.copy, factors)


def _reduced(equation: str, k: jax.Array, factors: HeadGroup) -> jax.Array:
    """V^T k, in float32."""
    return jnp.einsum(equation, k.astype(jnp.float32), factors.key_NHE)


def _place(x: jax.Array) -> jax.Array:
    return constrain(x, "batch", "heads", None, None)
