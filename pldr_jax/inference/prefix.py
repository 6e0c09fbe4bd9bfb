"""Keys and values of the beginnings that prompts share, kept from one prompt to the next.

Only where one G_LM serves all prompts: with a G_LM of its own, the whole prompt enters the keys of
every layer but the first, and no beginning of it is that of another prompt.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.decode import extend
from pldr_jax.inference.slots import Prompts, Slots, bind, enter, jit_on
from pldr_jax.model.cache import LayerOutputs, build_cache
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import DeductiveOutputs
from pldr_jax.model.low_rank import LowRankG
from pldr_jax.partition import constrain

LARGEST_CHUNK = 64


def no_prefixes(megabytes: int) -> ConfigError:
    """What to raise where each prompt has a G_LM of its own, with the remedy."""
    return ConfigError(
        f"prefix_cache_mb = {megabytes}: each prompt has a G_LM of its own here, on which the keys "
        "of its beginning depend; freeze the checkpoint (pldr-freeze), or let all prompts share "
        "one (Generation.g_mode)"
    )


class PrefixCache:
    """Runs prompts in chunks of a fixed number of tokens, and keeps the keys and values of whole
    chunks; of those that were not used for longest it forgets first.

    A chunk is run by the same program on the same numbers whether those before it were kept or have
    just been computed: what a prompt gives, to the last bit, does not depend on what is kept.

    Args:
      config: of the model.
      mesh: that its parameters live on.

    Attributes:
      hits: prompts of which a beginning was kept.
      tokens_saved: tokens of those beginnings.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None) -> None:
        self._config, self._programs = config, _compiled(config, mesh)
        self._kept: collections.OrderedDict[bytes, LayerOutputs] = collections.OrderedDict()
        self._g_lm: Any = None
        self.hits, self.tokens_saved = 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(list(self._kept.values())))

    def run(
        self, params: Params, prompt: Sequence[int], g_lm: jax.Array | None, most: int
    ) -> tuple[jax.Array, LayerOutputs]:
        """Logits [1,V] after a prompt, and its keys and values [L,1,S,N,H].

        Args:
          g_lm: [L,1,N,H,J]; None is the identity. Another one than before forgets everything.
          most: bytes that may be kept.
        """
        if g_lm is not self._g_lm:
            self._kept.clear()
            self._g_lm = g_lm
        chunk = chunk_of(self._config.context_length)
        tokens = np.zeros((1, -(-len(prompt) // chunk) * chunk), np.int32)
        tokens[0, : len(prompt)] = prompt
        starts = range(0, tokens.shape[1], chunk)
        keys = [tokens[0, : start + chunk].tobytes() for start in starts]
        keys[-1] = b""  # its logits are needed, so that it is always run
        known = next(i for i, key in enumerate(keys) if key not in self._kept)
        self.hits, self.tokens_saved = self.hits + (known > 0), self.tokens_saved + known * chunk
        whole = self._programs.empty()
        for i, start in enumerate(starts):
            first: Any = np.int32(start)
            if i < known:
                made = self._kept[keys[i]]
            else:
                some = tokens[:, start : start + chunk]
                last = np.array([min(len(prompt) - 1 - start, chunk - 1)], np.int32)
                logits_1V, made = self._programs.extend(
                    params, some, first, last, before=whole, g_lm_LBNHJ=g_lm
                )
                if keys[i]:
                    self._kept[keys[i]] = made
            whole = self._programs.put(whole, made, first)
        # The beginning last: it is forgotten after what continues it, which is of no use without.
        for key in reversed(keys[:-1]):
            self._kept.move_to_end(key)
        of_chunk = made.k_BTNH.nbytes + made.v_BTNH.nbytes
        while len(self._kept) * of_chunk > most:
            self._kept.popitem(last=False)
        return logits_1V, whole

    def enter(
        self,
        slots: Slots,
        prompts: Prompts,
        logits_QV: jax.Array,
        whole: LayerOutputs,
        g_lm_LBNHJ: jax.Array | LowRankG | None,
    ) -> Slots:
        """`enter_chunks`, compiled; `slots` are donated."""
        return self._programs.enter(
            slots=slots, prompts=prompts, logits_QV=logits_QV, whole=whole, g_lm_LBNHJ=g_lm_LBNHJ
        )


def chunk_of(context: int) -> int:
    """Tokens of a chunk: a power of two, at most a quarter of the model's context."""
    return max(min(LARGEST_CHUNK, 1 << (context // 4).bit_length() - 1), 1)


def enter_chunks(
    config: ModelConfig,
    slots: Slots,
    prompts: Prompts,
    logits_QV: jax.Array,
    whole: LayerOutputs,
    g_lm_LBNHJ: jax.Array | LowRankG | None,
) -> Slots:
    """Puts a prompt into a slot.

    Args:
      logits_QV, whole: what `PrefixCache.run` has made of the prompt.
      g_lm_LBNHJ: that of all prompts, or its factors.
    """
    low_rank = g_lm_LBNHJ if isinstance(g_lm_LBNHJ, LowRankG) else None
    g_lm = None if isinstance(g_lm_LBNHJ, LowRankG) else g_lm_LBNHJ
    outputs = whole.replace(deductive=DeductiveOutputs(G_LM=g_lm))
    cache = build_cache(outputs, prompts.length_Q, whole.k_BTNH.shape[2], "G_LM", low_rank)
    return enter(config, slots, prompts, logits_QV, cache)


class _Programs:
    """Everything that is compiled, for a config and a mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh | None) -> None:
        chunk = chunk_of(config.context_length)
        tokens = -(-config.context_length // chunk) * chunk
        shape = (config.num_layers, 1, tokens, config.num_heads, config.head_dim)

        def empty() -> LayerOutputs:
            k, v = (_laid_out(jnp.zeros(shape, jnp.dtype(config.dtype))) for _ in range(2))
            return LayerOutputs(k, v, DeductiveOutputs())

        def put(whole: LayerOutputs, made: LayerOutputs, first: jax.Array) -> LayerOutputs:
            def update(old: jax.Array, new: jax.Array) -> jax.Array:
                return _laid_out(jax.lax.dynamic_update_slice_in_dim(old, new, first, axis=2))

            return jax.tree.map(update, whole, made)

        def run(*args: Any, **kwargs: Any) -> tuple[jax.Array, LayerOutputs]:
            logits_BV, made = extend(config, *args, **kwargs)
            return constrain(logits_BV, "batch", "vocab"), jax.tree.map(_laid_out, made)

        self.empty, self.extend = jit_on(empty, mesh), jit_on(run, mesh)
        self.put = jit_on(put, mesh, donate_argnums=0)
        self.enter = bind(enter_chunks, config, mesh, donate_argnames="slots")


_compiled = functools.lru_cache(maxsize=8)(_Programs)


def _laid_out(x_LBTNH: jax.Array) -> jax.Array:
    return constrain(x_LBTNH, None, "batch", None, "heads", None)
