"""Token embedding, whose table is gathered and whose gradient is scattered in whole rows."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pldr_jax.config import ModelConfig
from pldr_jax.model.layers import layer_norm, logical
from pldr_jax.partition import constrain, divided, in_use, partition_spec


class Embedding(nn.Module):
    """Token embedding times sqrt(D), then LayerNorm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Token ids [B,T] to hidden states [B,T,D]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        table_VD = self.param(
            "table",
            logical(nn.initializers.normal(1.0), "vocab", "embed"),
            (config.vocab_size, config.model_dim),
        )
        x_BTD = lookup(table_VD, tokens_BT, dtype) * math.sqrt(config.model_dim)
        x_BTD = layer_norm(config.layer_norm_eps, name="norm")(x_BTD).astype(dtype)
        return constrain(x_BTD, "batch", "length", "activation_embed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of the table [B,T,D], rounded to `dtype`, in float32, as is the sum of the gradient."""
    # A decode step takes few rows: they travel, and not the table. Where that is not split, only
    # the rows are rounded.
    if tokens_BT.shape[1] > 1 and divided("embed", table_VD.shape[1]):
        table_VD = in_use(table_VD, ("vocab", "embed"), dtype)
    rows_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(dtype).astype(jnp.float32)
    return constrain(rows_BTD, "batch", "length", "activation_embed")


def _lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> Any:
    return lookup(table_VD, tokens_BT, dtype), (tokens_BT, table_VD)


def _gradient(dtype: Any, tokens_and_table: Any, gradient_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, table_VD = tokens_and_table
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    batch = partition_spec(tokens_BT.shape, ("batch", None), sizes)[0] if sizes else None
    if batch is None or "fsdp" not in batch or not divided("embed", table_VD.shape[1]):
        gradient_VD = jnp.zeros_like(table_VD).at[tokens_BT].add(gradient_BTD, mode="drop")
        return constrain(gradient_VD, "vocab", "embed"), None
    # The compiler would add up its part of D on each device, from the activations of all of them.
    vocab, embed = partition_spec(table_VD.shape, ("vocab", "embed"), sizes)
    pieces = table_VD.shape[0] // (sizes["tensor"] if vocab else 1)

    def scatter(tokens_BT: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
        ids_BT = tokens_BT - (jax.lax.axis_index("tensor") * pieces if vocab else 0)
        ids_BT = jnp.where(ids_BT < 0, pieces, ids_BT)  # dropped, as those beyond are
        sum_VD = jnp.zeros((pieces, table_VD.shape[1]), table_VD.dtype)
        sum_VD = sum_VD.at[ids_BT].add(gradient_BTD, mode="drop")
        # Scattered over the first axis: over the last one, a TPU would send all of it.
        parts = jnp.moveaxis(sum_VD.reshape(pieces, sizes["fsdp"], -1), 1, 0)
        return jax.lax.psum(jax.lax.psum_scatter(parts, "fsdp"), "data")

    by_rows = PartitionSpec(batch, None), PartitionSpec(batch, None, None)
    lies = PartitionSpec(vocab, embed)
    scatter = jax.shard_map(scatter, in_specs=by_rows, out_specs=lies, check_vma=False)
    return scatter(tokens_BT, gradient_BTD), None


lookup.defvjp(_lookup, _gradient)
