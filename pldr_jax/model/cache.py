"""The immutable decode cache: keys, values and G_LM of every layer, and how far each row has
come.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.deductive import DeductiveOutputs
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

    def append(self, k_BTNH: jax.Array, v_BTNH: jax.Array, slot_B: jax.Array) -> "LayerCache":
        """The cache with one more token (T = 1), written at each row's own slot."""

        # One scatter, with rows as its batch axis: XLA writes it in place, and each device its own
        # rows.
        @jax.vmap
        def write(cache_NSH: jax.Array, new_TNH: jax.Array, slot: jax.Array) -> jax.Array:
            return cache_NSH.at[:, slot].set(new_TNH[0].astype(cache_NSH.dtype))

        k_BNSH = write(self.k_BNSH, k_BTNH, slot_B)
        v_BNSH = write(self.v_BNSH, v_BTNH, slot_B)
        return self.replace(k_BNSH=k_BNSH, v_BNSH=v_BNSH).laid_out()

    def laid_out(self) -> "LayerCache":
        """The cache as it lives on the mesh in scope: rows over its batch axes, heads over tensor.

        Every function that makes or changes a cache ends with it, so that no step moves one.
        """

        def place(x: jax.Array) -> jax.Array:
            return constrain(x, "batch", "heads", None, None)

        return jax.tree.map(place, self)


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
        return self.layers[0].k_BNSH.shape[2]

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
) -> Cache:
    """A cache from what a forward pass over the prompts returned.

    Args:
      outputs: keys and values [L,B,T,N,H] and deductive outputs [L,B,N,H,J] of all layers.
      length_B: real tokens of each row.
      slots: S, at least T: room for the prompt and what will be generated.
      keep: the deductive output that decoding uses: "G_LM", or "A" to recompute the last steps of
        PLGA each token.
      dtype: of keys and values; None keeps theirs.
    """

    def room(x_LBTNH: jax.Array) -> jax.Array:
        x_LBNTH = jnp.swapaxes(x_LBTNH, 2, 3).astype(dtype or x_LBTNH.dtype)
        width = slots - x_LBNTH.shape[3]
        return jnp.pad(x_LBNTH, ((0, 0), (0, 0), (0, 0), (0, width), (0, 0)))

    kept: Any = getattr(outputs.deductive, keep)
    k_LBNSH, v_LBNSH = room(outputs.k_BTNH), room(outputs.v_BTNH)
    layers = tuple(
        LayerCache(
            k_LBNSH[i],
            v_LBNSH[i],
            DeductiveOutputs(**{keep: None if kept is None else kept[i]}),
        ).laid_out()
        for i in range(config.num_layers)
    )
    return Cache(layers=layers, length_B=length_B)
