"""The cross-entropy over the vocabulary without the logits of all positions in memory."""

import jax
import jax.numpy as jnp

from pldr_jax.config import ModelConfig
from pldr_jax.model.decoder import Decoder, Params, apply
from pldr_jax.training.losses import PAD_ID, TokenLoss, token_loss


def chunked_token_loss(
    config: ModelConfig, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> TokenLoss:
    """`token_loss` of the head's logits, `chunk` positions at a time.

    The same sums in another order. The backward pass computes the logits of a chunk again, so that
    neither pass ever holds more than [B,chunk,V] of them.

    Args:
      config: of the model.
      params: of the whole model; the head's are used.
      hidden_BTD: states before the head.
      targets_BT: token ids; `PAD_ID` is not counted.
      chunk: positions; the last chunk is filled up with padding.
    """
    batch, length = targets_BT.shape
    chunks = -(-length // chunk)
    room = chunks * chunk - length
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, room), (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, room)), constant_values=PAD_ID)

    @jax.checkpoint
    def body(total: TokenLoss, part: tuple[jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        hidden_BCD, targets_BC = part
        logits_BCV = apply(Decoder(config), {"head": params["head"]}, Decoder.logits, hidden_BCD)
        return jax.tree.map(jnp.add, total, token_loss(logits_BCV, targets_BC)), None

    split = (
        jnp.moveaxis(hidden_BTD.reshape(batch, chunks, chunk, -1), 1, 0),
        jnp.moveaxis(targets_BT.reshape(batch, chunks, chunk), 1, 0),
    )
    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(body, TokenLoss(zero, zero, zero), split)
    return total
