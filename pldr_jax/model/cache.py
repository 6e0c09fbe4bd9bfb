"""The immutable decode cache: keys, values and G_LM of every layer, and how far each row has
come.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.deductive import DeductiveOutputs


class LayerCache(flax.struct.PyTreeNode):
    """One layer's cache. `deductive` is written by prefill alone: `append` names only keys and
    values.

    Attributes:
      k_BSNH: keys after RoPE; slot s holds the token at position s.
      v_BSNH: values.
      deductive: G_LM to decode with ("KV+G"), or A, from which the decode step recomputes it
        ("KV").
    """

    k_BSNH: jax.Array
    v_BSNH: jax.Array
    deductive: DeductiveOutputs

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, slot_B: jax.Array) -> "LayerCache":
        """The cache with one more token (T = 1), written at each row's own slot."""

        def write(old_SNH: jax.Array, new_TNH: jax.Array, slot: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(
                old_SNH, new_TNH.astype(old_SNH.dtype), (slot, 0, 0)
            )

        k_BSNH = jax.vmap(write)(self.k_BSNH, k_BTNH, slot_B)
        v_BSNH = jax.vmap(write)(self.v_BSNH, v_BTNH, slot_B)
        return self.replace(k_BSNH=k_BSNH, v_BSNH=v_BSNH)


class Cache(flax.struct.PyTreeNode):
    """The whole cache, a frozen pytree: every step returns a new one (and may reuse the old one's
    memory).

    Per-layer leaves, not one stacked array: a stacked cache threaded through a scan is copied at
    every step.

    Attributes:
      layers: one `LayerCache` a decoder layer.
      length_B: tokens held so far in each row; also the position of the next one.
    """

    layers: tuple[LayerCache, ...]
    length_B: jax.Array

    @property
    def slots(self) -> int:
        """S, the tokens a row can hold."""
        return self.layers[0].k_BSNH.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def build_cache(
    stacked: LayerCache, length_B: jax.Array, slots: int, config: ModelConfig, keep: str
) -> Cache:
    """A cache from what a forward pass over the prompts returned.

    Args:
      stacked: keys and values [L,B,T,N,H] and deductive outputs [L,B,N,H,J] of all layers.
      length_B: real tokens of each row.
      slots: S, at least T: room for the prompt and what will be generated.
      keep: the deductive output that decoding uses: "G_LM", or "A" to recompute the last steps of
        PLGA each token.
    """
    room = slots - stacked.k_BSNH.shape[2]

    def pad(x_LBTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_LBTNH, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0)))

    kept: Any = getattr(stacked.deductive, keep)
    k_LBSNH, v_LBSNH = pad(stacked.k_BSNH), pad(stacked.v_BSNH)
    layers = tuple(
        LayerCache(
            k_LBSNH[i], v_LBSNH[i], DeductiveOutputs(**{keep: None if kept is None else kept[i]})
        )
        for i in range(config.num_layers)
    )
    return Cache(layers=layers, length_B=length_B)
