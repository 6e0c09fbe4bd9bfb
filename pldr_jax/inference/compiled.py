"""The jitted functions of decoding, made once for each model config and mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.inference.decode import full_step, prompt_g_lm
from pldr_jax.inference.sampling import Sampling, draw, penalize
from pldr_jax.inference.slots import Emitted, Slots, admit, decode_slots, empty_slots, release
from pldr_jax.model.decoder import Params, unstack_layers
from pldr_jax.partition import mesh_scope


@dataclasses.dataclass(frozen=True)
class CompiledFunctions:
    """Each compiles once for each shape of its arguments; those of the model take no config."""

    admit: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Emitted]]
    release: Callable[..., Slots]
    empty: Callable[..., Slots]
    full: Callable[..., Any]
    prompt_g_lm: Callable[..., jax.Array]
    unstack: Callable[..., Params]


@functools.lru_cache(maxsize=8)
def compiled_functions(config: ModelConfig, mesh: Mesh | None) -> CompiledFunctions:
    """Shared by all engines of a config, so that new parameters compile nothing again."""

    def jitted(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = jax.jit(function, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            with mesh_scope(mesh):
                return compiled(*args, **kwargs)

        return call

    def bound(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return jitted(functools.partial(function, config), **options)

    return CompiledFunctions(
        admit=bound(admit, donate_argnames="slots", static_argnames="keep"),
        decode=bound(decode_slots, donate_argnames="slots", static_argnames="steps"),
        release=jitted(release, donate_argnums=0),
        empty=bound(empty_slots, static_argnames=("rows", "length", "stop_ids", "keep", "dtype")),
        full=bound(_full_step),
        prompt_g_lm=bound(prompt_g_lm),
        unstack=bound(unstack_layers),
    )


def _full_step(
    config: ModelConfig,
    params: Params,
    tokens_S: jax.Array,
    length: jax.Array,
    g_lm: jax.Array | None,
    sampling: Sampling,
) -> tuple[jax.Array, ...]:
    logits_BV = full_step(config, params, tokens_S[None], length[None], g_lm)
    padded = jnp.where(jnp.arange(tokens_S.shape[0]) < length, tokens_S, config.vocab_size)
    seen_V = jnp.zeros((config.vocab_size,), bool).at[padded].set(True, mode="drop")
    penalized_BV = penalize(logits_BV, seen_V[None], sampling.penalty_B)
    token = draw(penalized_BV, sampling, length[None])[0]
    logprob = jax.nn.log_softmax(logits_BV[0])[token]
    finite = jnp.all(jnp.isfinite(logits_BV))
    return token, logprob, finite, tokens_S.at[length].set(token, mode="drop"), length + 1
