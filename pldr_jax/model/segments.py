"""Several sequences side by side in one row, with nothing between them.

A row of K segments is K sequences to the model: each has its own positions, its own block of
attention and its own Q^T Q, so its own G_LM. What a sequence gives in a row of its own, it gives
here; only the order in which Q^T Q is summed differs.
"""

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.model.layers import full_product_operand


class Segments(flax.struct.PyTreeNode):
    """Which segment each token belongs to.

    Deductive outputs of rows with segments have B * K in place of B: segment k of row b, from 0, is
    entry b * K + k. Where a row has fewer segments, the entry is that of an empty sequence, which
    no token uses.

    Attributes:
      ids_BT: 1 .. K, each a run of neighbouring tokens; 0 is padding.
      count: K; static.
      g_length_BK: tokens of each segment, its first ones, that its Q^T Q sums over; None is all.
    """

    ids_BT: jax.Array
    count: int = flax.struct.field(pytree_node=False)
    g_length_BK: jax.Array | None = None

    @property
    def positions_BT(self) -> jax.Array:
        """Position of each token in its segment, from 0."""
        index_T = jnp.arange(self.ids_BT.shape[1])
        begins_BT = self.ids_BT != jnp.pad(self.ids_BT, ((0, 0), (1, 0)))[:, :-1]
        begins_BT = begins_BT.at[:, 0].set(True)
        return index_T - jax.lax.cummax(jnp.where(begins_BT, index_T, 0), axis=1)

    @property
    def real(self) -> jax.Array:
        """Bool [B * K]: whether the segment has a token."""
        return self._of_segment_BTK.any(1).reshape(-1)

    def density_matrix(self, q_BTNH: jax.Array, precision: str | None = None) -> jax.Array:
        """Q^T Q of every segment, [B * K,N,H,J] in float32."""
        summed_BTK = self._of_segment_BTK
        if self.g_length_BK is not None:
            summed_BTK &= self.positions_BT[:, :, None] < self.g_length_BK[:, None]
        q_BTKNH = full_product_operand(_spread(q_BTNH, summed_BTK))
        q = full_product_operand(q_BTNH)
        density = jnp.einsum(
            "BTKNH,BTNJ->BKNHJ", q_BTKNH, q, precision=precision, preferred_element_type=jnp.float32
        )
        return density.reshape(-1, *density.shape[2:])

    def apply_metric(self, q_BTNH: jax.Array, g_lm: jax.Array) -> jax.Array:
        """q G_LM [B,T,N,J] with each token's own G_LM, of [B * K,N,H,J]; 0 for padding.

        One product over (K, H), in which a token is zero in all segments but its own.
        """
        g_lm_BKNHJ = g_lm.reshape(-1, self.count, *g_lm.shape[1:])
        return jnp.einsum("BTKNH,BKNHJ->BTNJ", _spread(q_BTNH, self._of_segment_BTK), g_lm_BKNHJ)

    @property
    def _of_segment_BTK(self) -> jax.Array:
        return self.ids_BT[:, :, None] == jnp.arange(1, self.count + 1)


def _spread(q_BTNH: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
    """q where the token is chosen for segment K, else 0."""
    return jnp.where(chosen_BTK[..., None, None], q_BTNH[:, :, None], 0)
