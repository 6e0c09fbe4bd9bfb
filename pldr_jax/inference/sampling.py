"""Drawing the next token from logits.

Order: repetition penalty, temperature, nucleus (top-p), min-p, top-k. A draw depends on the row's
seed and the position of the token alone, not on the batch, the row or the bucket it is made in.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError
from pldr_jax.model.reductions import most_probable

EXCLUDED = -jnp.inf


class Sampling(flax.struct.PyTreeNode):
    """How each row's next token is drawn; arrays [B]: no setting needs a compilation of its own.

    Attributes:
      temperature_B: logits are divided by it; 0 is greedy.
      top_p_B: smallest set of tokens whose probability reaches it; 1 is off.
      min_p_B: tokens at least this share as probable as the most probable one; 0 is off.
      top_k_B: the most probable tokens; 0 is off.
      penalty_B: logits of tokens already in the row are divided by it where positive and
        multiplied where negative; 1 is off.
      seed_B: seed of the row.
    """

    temperature_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    top_k_B: jax.Array
    penalty_B: jax.Array
    seed_B: jax.Array

    @classmethod
    def create(
        cls,
        rows: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same settings for every row; row b has seed `seed + b`.

        Raises:
          ConfigError: a setting out of its range.
        """
        for name, value, good, remedy in (
            ("temperature", temperature, temperature >= 0, "0 (greedy) or positive"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("top_k", top_k, top_k >= 0, "0 (off) or positive"),
            ("min_p", min_p, 0 <= min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
            ("seed", seed, 0 <= seed < 2**32, "from 0 to 2**32 - 1"),
        ):
            if not good:
                raise ConfigError(f"{name} = {value}: must be {remedy}")

        # NumPy arrays: making them on the device would cost more than the step that reads them.
        def fill(value: float, dtype: Any = np.float32) -> Any:
            return np.full((rows,), value, dtype)

        return cls(
            temperature_B=fill(temperature),
            top_p_B=fill(top_p),
            min_p_B=fill(min_p),
            top_k_B=fill(top_k, np.int32),
            penalty_B=fill(repetition_penalty),
            seed_B=fill(seed, np.uint32) + np.arange(rows, dtype=np.uint32),
        )


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Logits with those of seen tokens (true in `seen_BV`) made less probable by the penalty."""
    penalty_B1 = penalty_B[:, None]
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def draw(logits_BV: jax.Array, sampling: Sampling, position_B: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: float32, after the repetition penalty.
      sampling: settings of each row.
      position_B: position the drawn token will have; enters the draw's random key.
    """
    greedy_B = most_probable(logits_BV)

    def drawn() -> jax.Array:
        kept_BV = filter_logits(logits_BV, sampling)

        def one(seed: jax.Array, position: jax.Array, kept_V: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.categorical(key, kept_V)

        drawn_B = jax.vmap(one)(sampling.seed_B, position_B, kept_BV).astype(jnp.int32)
        return jnp.where(sampling.temperature_B > 0, drawn_B, greedy_B)

    # The sort is skipped where every row is greedy.
    return jax.lax.cond(jnp.any(sampling.temperature_B > 0), drawn, lambda: greedy_B)


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits over temperature, then -inf outside the nucleus, below min-p and outside the top k.

    The nucleus is the standard one: the smallest set of most probable tokens whose mass reaches p,
    at least one token; (.5, .3, .2) keeps two at p = 0.6. Equally probable tokens are taken in the
    order of their ids.
    """
    vocab = logits_BV.shape[-1]
    temperature_B1 = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)[:, None]
    scaled_BV = logits_BV / temperature_B1
    order_BV = jnp.argsort(-scaled_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    mass_before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    top_p_B1 = sampling.top_p_B[:, None]
    kept_BV = (mass_before_BV < top_p_B1) | (top_p_B1 >= 1)
    kept_BV &= probability_BV >= sampling.min_p_B[:, None] * probability_BV[:, :1]
    rank_V = jnp.arange(vocab)
    kept_BV &= rank_V < jnp.where(sampling.top_k_B > 0, sampling.top_k_B, vocab)[:, None]
    kept_BV |= rank_V == 0
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return scaled_BV.at[rows_B1, order_BV].set(jnp.where(kept_BV, sorted_BV, EXCLUDED))
