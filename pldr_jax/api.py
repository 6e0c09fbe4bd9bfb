"""The Python API: `load` a checkpoint, call it, generate with it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, MeshConfig, ModelConfig
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.inference.engine import Engine, bucket
from pldr_jax.inference.modes import ScoreMode
from pldr_jax.inference.request import CacheMode, Completion, Generation, Request
from pldr_jax.inference.score import Score, score
from pldr_jax.inference.text import find_stop, text_of
from pldr_jax.model.decoder import ModelOutputs, Params, forward
from pldr_jax.model.low_rank import LowRankG, check_budget, factorize
from pldr_jax.model.shapes import place_params
from pldr_jax.partition import build_mesh, mesh_scope, on_every_device

Prompt = str | Sequence[int]


class LanguageModel:
    """A loaded model.

    Attributes:
      config: the model's config.
      params: its parameters, stacked over layers.
      g_lm: its predefined G_LM [L,1,N,H,J]; None where it is learned, or the identity. With a
        `rank_budget`, of the ranks that decoding keeps.
      tokenizer: None where the checkpoint has none; token ids work all the same.
      mesh: that the parameters are split over; None is a single device.
      low_rank: the factors of `g_lm` with which keys are cached; None without a `rank_budget`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        g_lm: jax.Array | None = None,
        tokenizer: Tokenizer | None = None,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
        rank_budget: float | None = None,
    ) -> None:
        self.config = config
        self.params = params if mesh is None else place_params(config, params, mesh)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.low_rank: LowRankG | None = None
        g_lm = None if g_lm is None else on_every_device(g_lm, mesh)
        if rank_budget is not None:
            check_budget(rank_budget)
            if g_lm is not None:
                tensor = 1 if mesh is None else mesh.shape["tensor"]
                self.low_rank = factorize(g_lm, rank_budget, shards=tensor)
        self.g_lm = g_lm if self.low_rank is None else self.low_rank.G_LM
        own = g_lm if self.low_rank is None else self.low_rank
        self._engine = Engine(config, self.params, own, cache_dtype, mesh, rank_budget)
        self._forward = _compiled_forward(config, mesh)

    def __call__(
        self,
        tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
        g_lm: jax.Array | np.ndarray | None = None,
    ) -> ModelOutputs:
        """One jitted full forward pass.

        Args:
          tokens_BT: token ids [B,T]; no padding.
          g_lm: G_LM to use instead of the model's, [L,N,H,J], or with a batch axis after L.

        Returns:
          `.logits` [B,T,V], `.deductive.A`, `.A_LM`, `.A_P`, `.G_LM` [L,B,N,H,J], `.hidden`
          [B,T,D].

        Raises:
          ConfigError: tokens that are not [B,T] ids of the vocabulary, or a G_LM of another shape.
        """
        tokens = np.asarray(tokens_BT)
        if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
            raise ConfigError(
                f"tokens: shape {tokens.shape}, dtype {tokens.dtype}: must be integer ids [B,T]"
            )
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ConfigError(
                f"tokens: an id lies outside the vocabulary of {self.config.vocab_size}"
            )
        given = self._checked_g_lm(g_lm)
        with mesh_scope(self.mesh):
            return self._forward(
                self.params, jnp.asarray(tokens, jnp.int32), self.g_lm if given is None else given
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        g_lm: jax.Array | np.ndarray | None = None,
        share_first_g: bool = False,
        kv_cache: bool = True,
        g_cache: str = "G_LM",
        rows: int = 8,
    ) -> list[Generation]:
        """Continues the prompts.

        Args:
          prompts: strings or lists of token ids; a single one is a list of one.
          max_new_tokens: at most this many new tokens each.
          temperature: 0 is greedy.
          top_k, top_p, min_p: restrict the draw; 0, 1 and 0 are off.
          repetition_penalty: above 1 makes tokens already there less probable.
          seed: prompt i draws with seed + i.
          stop_ids: tokens that end a text; None is the tokenizer's end token, if there is one.
          stop: strings that end a text, which is cut before them.
          g_lm: one G_LM for every prompt, [L,N,H,J]; None takes what each prompt gives.
          share_first_g: the G_LM of the first prompt serves all.
          kv_cache: cache keys and values.
          g_cache: "G_LM" keeps the prompt's G_LM, "A" its metric tensor, "none" recomputes G_LM at
            every token (the definition of the model; without a kv cache).
          rows: prompts decoded side by side.

        Returns:
          One `Generation` a prompt, with `.tokens` and `.text`.

        Raises:
          ConfigError: no prompts, a prompt that cannot be decoded, or a setting out of range.
        """
        results: dict[int, Generation] = {}
        for index, result in self.stream(
            prompts,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
            stop_ids,
            stop,
            g_lm,
            share_first_g,
            kv_cache,
            g_cache,
            rows,
            steps=8,
        ):
            if result.error is not None:
                raise ConfigError(f"prompt {index}: {result.error}")
            results[index] = result
        if not results:
            raise ConfigError("prompts: none were given")
        return [results[index] for index in sorted(results)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        g_lm: jax.Array | np.ndarray | None = None,
        share_first_g: bool = False,
        kv_cache: bool = True,
        g_cache: str = "G_LM",
        rows: int = 8,
        steps: int = 1,
    ) -> Iterator[tuple[int, Generation]]:
        """As `generate`, yielding (index of the prompt, its text so far) as the texts grow.

        A prompt that cannot be decoded yields one result with `.error`, and the others go on.

        Args:
          steps: tokens between two yields.
        """
        if stop_ids is None:
            stop_ids = [self.tokenizer.eos_id] if self.tokenizer else []
        shared: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop_ids": tuple(stop_ids),
            "stop_strings": tuple(stop),
        }
        requests = [
            Request(prompt=tuple(self.encode(prompt)), seed=seed + i, **shared)
            for i, prompt in enumerate(_as_list(prompts))
        ]
        yield from self.run(
            requests,
            rows=rows,
            g_lm=g_lm,
            share_first_g=share_first_g,
            mode=CacheMode(kv=kv_cache, g=g_cache),
            steps=steps,
        )

    def run(
        self,
        requests: Iterable[Request],
        rows: int = 8,
        length: int | None = None,
        g_lm: jax.Array | np.ndarray | None = None,
        share_first_g: bool = False,
        mode: CacheMode | None = None,
        steps: int = 8,
    ) -> Iterator[tuple[int, Generation]]:
        """Decodes a queue of requests, each with its own settings; see `Engine.run`.

        Args:
          requests: a sequence, or a generator that is read as rows become free.
          length: tokens that a row can hold; None is what a sequence of requests needs, and the
            model's context for a generator.
        """
        if isinstance(requests, Sequence):
            rows = max(1, min(rows, 1 << (len(requests) - 1).bit_length()) if requests else 1)
            needs = [len(r.prompt) + r.max_new_tokens for r in requests if r.prompt]
            context = self.config.context_length
            length = length or bucket(min(max(needs, default=1), context), context)
        for completion in self._engine.run(
            requests,
            rows=rows,
            length=length,
            g_lm=self._checked_g_lm(g_lm),
            share_first=share_first_g,
            mode=mode,
            steps=steps,
            find_stop=None if self.tokenizer is None else partial(find_stop, self.tokenizer),
        ):
            yield completion.index, self._generation(completion)

    def score(
        self,
        contexts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        mode: ScoreMode = "full",
        g_lm: jax.Array | np.ndarray | None = None,
        rows: int = 8,
    ) -> list[Score]:
        """Log-probability of each continuation after its context.

        Two strings are tokenised joined: what the tokens of both have in common with those of the
        context alone is the context.

        Args:
          contexts, continuations: as many of each; strings or lists of token ids, a single one is
            a list of one.
          mode: "full" takes G_LM from context and continuation, so that a token's score depends on
            what follows it; "causal" from the context alone; "frozen" from `g_lm` or the model.
          g_lm: one G_LM for every text, [L,N,H,J]; for "causal" and "frozen".
          rows: texts scored side by side.

        Raises:
          ConfigError: a text that cannot be scored, or a mode that the model or `g_lm` rules out.
        """
        before, after = _as_list(contexts), _as_list(continuations)
        if len(before) != len(after):
            raise ConfigError(
                f"continuations: {len(after)} for {len(before)} contexts; give one for each"
            )
        pairs = [self.encode_pair(*pair) for pair in zip(before, after, strict=True)]
        given = self.g_lm if g_lm is None else self._checked_g_lm(g_lm)
        with mesh_scope(self.mesh):
            return score(self.config, self.params, pairs, mode, given, rows)

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation; two strings are tokenised joined."""
        alone = self.encode(context)
        if not (isinstance(context, str) and isinstance(continuation, str)):
            return alone, self.encode(continuation)
        joined = self.encode(context + continuation)
        same = (i for i, (x, y) in enumerate(zip(alone, joined, strict=False)) if x != y)
        cut = next(same, min(len(alone), len(joined)))
        return joined[:cut], joined[cut:]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt.

        Raises:
          ConfigError: a string, and the checkpoint has no tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ConfigError("prompt: this checkpoint has no tokenizer; pass lists of token ids")
        return self.tokenizer.encode(prompt)

    def _generation(self, completion: Completion) -> Generation:
        return Generation(
            prompt_tokens=list(completion.request.prompt),
            tokens=list(completion.tokens),
            text="" if self.tokenizer is None else text_of(self.tokenizer, completion),
            finish_reason=completion.finish_reason,
            logprobs=list(completion.logprobs),
            error=completion.error,
        )

    def _checked_g_lm(self, g_lm: jax.Array | np.ndarray | None) -> jax.Array | None:
        if g_lm is None:
            return None
        config = self.config
        layers, head = config.num_layers, (config.num_heads, config.head_dim, config.head_dim)
        if g_lm.shape == (layers, *head):
            g_lm = g_lm[:, None]
        if g_lm.ndim != 5 or g_lm.shape[0] != layers or g_lm.shape[2:] != head:
            raise ConfigError(
                f"g_lm: has shape {g_lm.shape}, this model needs {(layers, *head)} [L,N,H,H]"
            )
        return on_every_device(jnp.asarray(g_lm, jnp.float32), self.mesh)


@lru_cache(maxsize=8)
def _compiled_forward(config: ModelConfig, mesh: Mesh | None) -> Callable[..., ModelOutputs]:
    """Shared by all models of a config, so that new parameters compile nothing again."""
    return jax.jit(partial(forward, config))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(item, (int, np.integer)) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def load(
    path: str | Path,
    step: int | None = None,
    cache_dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    rank_budget: float | None = None,
) -> LanguageModel:
    """Opens a run folder, or a folder in the transformers layout (`config.json`, and
    `model.safetensors` or several files with an index).

    Args:
      path: the folder.
      step: checkpoint of a run folder; None is the newest complete one.
      cache_dtype: "float32" or "bfloat16", of cached keys and values; None is the model's.
      mesh: devices to split parameters and cache over, such as `MeshConfig(data=2, tensor=4)`; None
        is a single device.
      rank_budget: relative error of G_LM, in the Frobenius norm of each head, for which decoding
        caches keys in fewer numbers (docs/low_rank.md), such as 1e-3; for a frozen checkpoint, or
        a G_LM that all prompts share. None caches them whole.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.
    """
    from pldr_jax.interop.weights import open_checkpoint

    if isinstance(mesh, MeshConfig):
        mesh = build_mesh(mesh)
    opened = open_checkpoint(path, step)
    return LanguageModel(
        opened.config.model,
        opened.params,
        opened.g_lm,
        opened.tokenizer,
        cache_dtype,
        mesh,
        rank_budget,
    )
