"""Drawing the next token from logits: greedy, temperature, nucleus (top-p) and top-k."""

import flax.struct
import jax
import jax.numpy as jnp

from pldr_jax.config import ConfigError

EXCLUDED = -jnp.inf


class Sampling(flax.struct.PyTreeNode):
    """How every row's next token is drawn; arrays [B], so that no setting needs a compilation of
    its own.

    Attributes:
      temperature_B: logits are divided by it; 0 is greedy.
      top_p_B: smallest set of tokens whose probability reaches it; 1 is off.
      top_k_B: the most probable tokens; 0 is off.
      seed_B: seed of the row. The draw at a position depends on (seed, position) alone, not on
        batch or row.
    """

    temperature_B: jax.Array
    top_p_B: jax.Array
    top_k_B: jax.Array
    seed_B: jax.Array

    @classmethod
    def create(
        cls, rows: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> "Sampling":
        """The same settings for every row; row b has seed `seed + b`.

        Raises:
          ConfigError: a setting out of its range.
        """
        if temperature < 0:
            raise ConfigError(f"temperature = {temperature}: must be 0 (greedy) or positive")
        if not 0 < top_p <= 1:
            raise ConfigError(f"top_p = {top_p}: must be above 0 and at most 1")
        if top_k < 0:
            raise ConfigError(f"top_k = {top_k}: must be 0 (off) or positive")
        return cls(
            temperature_B=jnp.full((rows,), temperature, jnp.float32),
            top_p_B=jnp.full((rows,), top_p, jnp.float32),
            top_k_B=jnp.full((rows,), top_k, jnp.int32),
            seed_B=jnp.arange(rows, dtype=jnp.uint32) + jnp.uint32(seed),
        )


def draw(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32.
      sampling: settings of each row.
      position_B: position the drawn token will have; enters the draw's random key.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        kept_BV = filter_logits(logits_BV, sampling)

        def one(seed: jax.Array, position: jax.Array, kept_V: jax.Array) -> jax.Array:
            return jax.random.categorical(
                jax.random.fold_in(jax.random.key(seed), position), kept_V
            )

        return jax.vmap(one)(sampling.seed_B, position_B, kept_BV).astype(jnp.int32)

    # The sort is skipped where every row is greedy.
    return jax.lax.cond(
        jnp.any(sampling.temperature_B > 0),
        lambda: jnp.where(sampling.temperature_B > 0, drawn(), greedy_B),
        lambda: greedy_B,
    )


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits over temperature, then -inf outside the nucleus, then -inf outside the top k.

    The nucleus is the standard one: the smallest set of most probable tokens whose mass reaches p,
    at least one token; (.5, .3, .2) keeps two at p = 0.6. Tokens as probable as the last one kept
    are decided by their order.
    """
    vocab = logits_BV.shape[-1]
    temperature_B1 = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)[:, None]
    scaled_BV = logits_BV / temperature_B1
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    probability_BV = jax.nn.softmax(jnp.take_along_axis(scaled_BV, order_BV, axis=-1), axis=-1)
    mass_before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    in_nucleus_BV = (mass_before_BV < sampling.top_p_B[:, None]) | (sampling.top_p_B[:, None] >= 1)
    rank_BV = jnp.broadcast_to(jnp.arange(vocab), scaled_BV.shape)
    top_k_B1 = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, vocab)[:, None]
    kept_BV = (in_nucleus_BV & (rank_BV < top_k_B1)) | (rank_BV == 0)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return scaled_BV.at[rows_B1, order_BV].set(
        jnp.where(kept_BV, jnp.take_along_axis(scaled_BV, order_BV, axis=-1), EXCLUDED)
    )
