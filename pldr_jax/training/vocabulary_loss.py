"""The cross-entropy over the vocabulary without the logits of all positions in memory."""

import jax
import jax.numpy as jnp

from pldr_jax.config import ExperimentConfig, ModelConfig
from pldr_jax.model.decoder import Decoder, ModelOutputs, Params, apply
from pldr_jax.training.losses import PAD_ID, TokenLoss, token_loss


def batch_loss(
    config: ExperimentConfig, params: Params, outputs: ModelOutputs, targets_BT: jax.Array
) -> TokenLoss:
    """The cross-entropy of what the model makes of a batch, in chunks where `Loss.chunk` says so:
    nothing reads `outputs.logits` then, so that the compiler leaves them out.
    """
    if config.model.task == "question":  # start and end, each one of T tokens
        return token_loss(jnp.swapaxes(outputs.logits, 1, 2), targets_BT[:, :2])
    if chunk := min(config.loss.chunk, targets_BT.shape[1]):
        return chunked_token_loss(config.model, params, outputs.hidden, targets_BT, chunk)
    return token_loss(outputs.logits, targets_BT)


def chunked_token_loss(
    config: ModelConfig, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> TokenLoss:
    """`token_loss` of the head's logits, `chunk` positions at a time: the same up to rounding.

    The backward pass computes the logits of a chunk again, so that neither pass ever holds more
    than [B,chunk,V] of them.

    Args:
      config: of the model.
      params: of the whole model; the head's are used.
      hidden_BTD: states before the head.
      targets_BT: token ids; `PAD_ID` is not counted.
      chunk: positions; the last chunk is filled up with padding.
    """
    batch, length = targets_BT.shape
    chunks = -(-length // chunk)
    padding = (0, chunks * chunk - length)
    hidden_BTD = jnp.pad(hidden_BTD, ((0, 0), padding, (0, 0)))
    targets_BT = jnp.pad(targets_BT, ((0, 0), padding), constant_values=PAD_ID)

    @jax.checkpoint
    def body(total: TokenLoss, part: tuple[jax.Array, jax.Array]) -> tuple[TokenLoss, None]:
        hidden_BTD, targets_BT = part
        logits_BTV = apply(Decoder(config), {"head": params["head"]}, Decoder.logits, hidden_BTD)
        return jax.tree.map(jnp.add, total, token_loss(logits_BTV, targets_BT)), None

    split = (
        jnp.moveaxis(hidden_BTD.reshape(batch, chunks, chunk, -1), 1, 0),
        jnp.moveaxis(targets_BT.reshape(batch, chunks, chunk), 1, 0),
    )
    zero = jnp.zeros((), jnp.float32)
    total, _ = jax.lax.scan(body, TokenLoss(zero, zero, zero), split)
    return total
