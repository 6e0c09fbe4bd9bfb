"""The Python API: `load` a checkpoint, call it, generate with it."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, MeshConfig, ModelConfig, SamplingConfig
from pldr_jax.config.sampling import override, renamed
from pldr_jax.data.text.chat import Message, prompt_ids
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.given.classify import check_head, classify
from pldr_jax.inference.given.modes import ScoreMode
from pldr_jax.inference.given.score import Score, score
from pldr_jax.inference.intervention import Intervention, intervene
from pldr_jax.inference.prompts import Prompt, Prompts, as_list, token_array, token_ids
from pldr_jax.inference.request import (
    Completion,
    DecodeOptions,
    Generation,
    Request,
    bucket,
    check_request,
)
from pldr_jax.inference.text import find_stop, text_of
from pldr_jax.model.counts.shapes import place_params
from pldr_jax.model.decoder import ModelOutputs, Params, compiled_forward
from pldr_jax.model.deductive import given_g_lm
from pldr_jax.model.low_rank import LowRankG, check_budget, factorize
from pldr_jax.model.weights import WeightsDtype, check_weights, has_scales, rounded
from pldr_jax.partition import build_mesh, mesh_scope, on_every_device


class LanguageModel:
    """A loaded model.

    Attributes:
      config: the model's config.
      g_lm: its predefined G_LM [L,1,N,H,J]; None where it is learned, or the identity. With a
        `rank_budget`, of the ranks that decoding keeps.
      tokenizer: None where the checkpoint has none; token ids work all the same.
      end_ids: tokens that end a text where `stop_ids` is None: the tokenizer's end piece, or what
        the checkpoint says.
      mesh: that the parameters are split over; None is a single device.
      engine: what decodes.
      low_rank: the factors of `g_lm` with which keys are cached; None without a `rank_budget`.

    Examples:
      >>> lm = pldr_jax.load("runs/nano")
      >>> [len(one.tokens) for one in lm.generate(["def ", "class "], 4, stop_ids=())]
      [4, 4]
      >>> lm([[5, 6, 7]]).deductive.G_LM.ndim  # [L,B,N,H,J]
      5
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
        end_ids: Sequence[int] = (),
    ) -> None:
        self.config = config
        there = has_scales(params) or isinstance(params["layers"], tuple)  # lies where it lay
        placed = params if there or mesh is None else place_params(config, params, mesh)
        self.tokenizer = tokenizer
        end = -1 if tokenizer is None else tokenizer.eos_id
        self.end_ids = tuple(end_ids) or ((end,) if end >= 0 else ())
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
        pieces = None if tokenizer is None else tokenizer.vocab_size
        self._decoding = (cache_dtype, mesh, rank_budget)
        self._intervened: dict[Intervention, LanguageModel] = {}
        self.engine = Engine(config, placed, own, cache_dtype, mesh, rank_budget, pieces)
        self._forward = compiled_forward(config, mesh)

    @property
    def params(self) -> Params:
        """Stacked over layers; after generating, a copy each time (docs/decoding.md)."""
        return self.engine.stacked

    def __call__(
        self,
        tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
        g_lm: jax.Array | np.ndarray | None = None,
        intervention: Intervention | None = None,
    ) -> ModelOutputs:
        """One jitted full forward pass.

        Args:
          tokens_BT: token ids [B,T]; no padding.
          g_lm: G_LM to use instead of the model's, [L,N,H,J], or with a batch axis after L.
          intervention: a change of the deductive outputs; not together with `g_lm`.

        Returns:
          `.logits` [B,T,V], `.deductive.A`, `.A_LM`, `.A_P`, `.G_LM` [L,B,N,H,J], `.hidden`
          [B,T,D].

        Raises:
          ConfigError: tokens that are not [B,T] ids of the vocabulary, or a G_LM of another shape.
        """
        if intervention is not None:
            return self.intervened(intervention, g_lm)(tokens_BT)
        tokens = token_array(tokens_BT, self.config.vocab_size)
        own = self.g_lm if g_lm is None else given_g_lm(self.config, g_lm, self.mesh)
        with mesh_scope(self.mesh):
            return self._forward(self.engine.held, jnp.asarray(tokens), own)

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingConfig | int | None = None,
        g_lm: jax.Array | np.ndarray | None = None,
        intervention: Intervention | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Continues the prompts.

        Args:
          prompts: strings or token ids of any kind; a single one is a list of one.
          sampling: how the next token is drawn and what ends a text; a number is
            `max_new_tokens`. Prompt i draws with seed + i. `stop_ids` None is the tokenizer's end
            token, if there is one.
          g_lm: one G_LM for every prompt, [L,N,H,J]; None takes what each prompt gives.
          intervention: a change of the deductive outputs; not together with `g_lm`.
          overrides: fields of `SamplingConfig` and of `DecodeOptions`, such as `temperature=0.7`,
            `stop="\n\n"`, `batch_size=32`, `share_first_g=True`, `kv_cache=False`.

        Returns:
          One `Generation` a prompt, with `.tokens` and `.text`. That of a prompt that cannot be
          decoded has `.error`, which is also warned of, and no tokens.

        Raises:
          ConfigError: no prompt at all can be decoded, or a setting is out of range.
        """
        if intervention is not None:
            self.engine.unstack()  # now, so that the other model shares these weights
            return self.intervened(intervention, g_lm).generate(prompts, sampling, **overrides)
        results: dict[int, Generation] = {}
        for index, result in self.stream(prompts, sampling, g_lm, **{"steps": 8, **overrides}):
            results[index] = result
        errors = {i: r.error for i, r in sorted(results.items()) if r.error is not None}
        lines = [f"prompt {index}: {error}" for index, error in errors.items()]
        if len(lines) == len(results):
            raise ConfigError(lines[0] if lines else "prompts: none were given")
        for line in lines:
            warnings.warn(f"{line}; its result has .error", stacklevel=2)
        return [results[index] for index in sorted(results)]

    def stream(
        self,
        prompts: Prompts,
        sampling: SamplingConfig | int | None = None,
        g_lm: jax.Array | np.ndarray | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, Generation]]:
        """As `generate`, yielding (index of the prompt, its text so far) as the texts grow.

        A prompt that cannot be decoded yields one result with `.error`, and the others go on.
        `steps=N` is the number of tokens between two yields, 1 unless told otherwise.
        """
        if not isinstance(sampling, SamplingConfig):
            sampling = SamplingConfig() if sampling is None else SamplingConfig(sampling)
        shared, options = override(renamed(overrides), sampling, DecodeOptions(steps=1))
        requests = [
            self.request(prompt, shared.of_prompt(i)) for i, prompt in enumerate(as_list(prompts))
        ]
        return self.run(requests, options, g_lm)

    @property
    def task(self) -> str | None:
        """What the head is for: "sequence", "token" or "question"; None is the next token."""
        return self.config.task

    def classify(self, prompts: Prompts, batch_size: int = 8) -> list[np.ndarray]:
        """Logits of a task's head, one array a prompt: [Y] of its labels for "sequence", [T,Y] of
        each token's for "token", [T,2] of the start and the end of an answer for "question".

        Args:
          prompts: as for `generate`; `config.pad_id` at their end is padding.
          batch_size: prompts side by side; no result depends on it. Not for language models.
        """
        check_head(self.config, self.engine.held, "classify", task=True)
        ids = [self.encode(prompt) for prompt in as_list(prompts)]
        with mesh_scope(self.mesh):
            return classify(self.config, self.engine.held, ids, self.g_lm, batch_size)

    def chat(self, messages: Sequence[Message], **overrides: Any) -> Generation:
        """The answer to messages {"role": ..., "content": ...}, user and assistant in turn, perhaps
        after a system message; ConfigError where they are not, or the chat template fails.
        """
        return self.generate([prompt_ids(self.tokenizer, messages)], **overrides)[0]

    def request(self, prompt: Prompt, sampling: SamplingConfig, cut_left: bool = False) -> Request:
        """What the engine is asked for a prompt, or why it cannot be.

        Args:
          cut_left: a prompt that is too long keeps its end, so that `max_new_tokens` fit, or half
            of the model's context where they alone would fill it.
        """
        check_head(self.config, self.engine.held, "generate")
        context = self.config.context_length
        try:
            if sampling.stop and self.tokenizer is None:
                raise ConfigError("stop: this checkpoint has no tokenizer; use stop_ids")
            tokens = tuple(self.encode(prompt))
        except ConfigError as error:
            return Request((), sampling, str(error))
        if cut_left:
            kept = context - sampling.max_new_tokens
            tokens = tokens[-(kept if kept > 0 else context // 2) :]
        pieces = self.config.vocab_size
        if self.tokenizer is not None:
            pieces = min(pieces, self.tokenizer.vocab_size)
        if sampling.stop_ids is None:
            ends = tuple(token for token in self.end_ids if token < pieces)
            sampling = dataclasses.replace(sampling, stop_ids=ends)
        request = Request(tokens, sampling)
        return dataclasses.replace(request, error=check_request(request, self.config, pieces))

    def run(
        self,
        requests: Iterable[Request],
        options: DecodeOptions | None = None,
        g_lm: jax.Array | np.ndarray | None = None,
        **overrides: Any,
    ) -> Iterator[tuple[int, Generation]]:
        """Decodes a queue of requests, each with its own settings; see `Engine.run`.

        Args:
          requests: a sequence, or a generator that is read as slots become free.
          options: a capacity of None is what a sequence of requests needs, and the model's context
            for a generator.
          g_lm: one G_LM for every request, [L,N,H,J]; None takes what each prompt gives.
          overrides: fields of `DecodeOptions`.
        """
        check_head(self.config, self.engine.held, "generate")
        (options,) = override(renamed(overrides), options or DecodeOptions())
        if isinstance(requests, Sequence):
            context = self.config.context_length
            needs = [len(r.prompt) + r.sampling.max_new_tokens for r in requests if not r.error]
            capacity = bucket(min(max(needs, default=1), context), context)
            several = 1 << max(len(requests) - 1, 0).bit_length()
            options = dataclasses.replace(
                options,
                batch_size=min(options.batch_size, several),
                capacity=options.capacity or capacity,
            )
        stop = None if self.tokenizer is None else partial(find_stop, self.tokenizer)
        completions = self.engine.run(
            requests, options, given_g_lm(self.config, g_lm, self.mesh), stop
        )
        return ((completion.index, self._generation(completion)) for completion in completions)

    def score(
        self,
        contexts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        mode: ScoreMode = "full",
        g_lm: jax.Array | np.ndarray | None = None,
        batch_size: int = 8,
        rows: int | None = None,
        intervention: Intervention | None = None,
    ) -> list[Score]:
        """Log-probability of each continuation after its context.

        Two strings are tokenised as `encode_pair` says.

        Args:
          contexts, continuations: as many of each; strings or lists of token ids, a single one is
            a list of one.
          mode: "full" takes G_LM from context and continuation, so that a token's score depends on
            what follows it; "causal" from the context alone; "frozen" from `g_lm` or the model.
          g_lm: one G_LM for every text, [L,N,H,J]; for "causal" and "frozen".
          batch_size: texts scored side by side; no score depends on it. Formerly `rows`.
          intervention: a change of the deductive outputs; not together with `g_lm`.

        Raises:
          ConfigError: a text that cannot be scored, or a mode that the model or `g_lm` rules out.
        """
        if intervention is not None:
            changed = self.intervened(intervention, g_lm)
            return changed.score(contexts, continuations, mode, None, batch_size, rows)
        check_head(self.config, self.engine.held, "score")
        before, after = as_list(contexts), as_list(continuations)
        if len(before) != len(after):
            raise ConfigError(
                f"continuations: {len(after)} for {len(before)} contexts; give one for each"
            )
        pairs = [self.encode_pair(*pair) for pair in zip(before, after, strict=True)]
        given = self.g_lm if g_lm is None else given_g_lm(self.config, g_lm, self.mesh)
        with mesh_scope(self.mesh):
            batch = batch_size if rows is None else rows
            return score(self.config, self.engine.held, pairs, mode, given, batch)

    def intervened(
        self, intervention: Intervention, g_lm: jax.Array | np.ndarray | None = None
    ) -> "LanguageModel":
        """The model under an intervention, a model like any other; kept for the next call.
        ConfigError where it has not what would be changed, or a `g_lm` is given besides.
        """
        if g_lm is not None:
            raise ConfigError("g_lm: cannot be given together with intervention; choose one")
        if intervention not in self._intervened:
            cache_dtype, mesh, rank_budget = self._decoding
            with mesh_scope(mesh):
                changed = intervene(self.config, self.engine.held, self.g_lm, intervention)
            self._intervened[intervention] = LanguageModel(
                *changed, self.tokenizer, cache_dtype, mesh, rank_budget, self.end_ids
            )
        return self._intervened[intervention]

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a context and its continuation, as every backend of lm-evaluation-harness
        splits two strings: trailing white space of the context belongs to the continuation, and of
        the tokens of both together as many are the context as the context alone has.
        """
        if not (isinstance(context, str) and isinstance(continuation, str)):
            return self.encode(context), self.encode(continuation)
        bare = context.rstrip()
        alone = self.encode(bare)
        return alone, self.encode(context + continuation)[len(alone) :]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ConfigError where it is neither a string nor token ids, or is a
        string and the checkpoint has no tokenizer.
        """
        return token_ids(prompt, self.tokenizer)

    def _generation(self, completion: Completion) -> Generation:
        return Generation(
            prompt_tokens=list(completion.request.prompt),
            tokens=list(completion.tokens),
            text="" if self.tokenizer is None else text_of(self.tokenizer, completion),
            finish_reason=completion.finish_reason,
            logprobs=list(completion.logprobs),
            error=completion.error,
        )


def load(
    path: str | Path,
    step: int | None = None,
    cache_dtype: str | None = None,
    mesh: Mesh | MeshConfig | None = None,
    rank_budget: float | None = None,
    revision: str | None = None,
    weights: WeightsDtype = "float32",
) -> LanguageModel:
    """Opens a run folder, a folder in the transformers layout (`config.json`, and
    `model.safetensors` or several files with an index), or a repository of the hub with these.

    Args:
      path: the folder; else OWNER/NAME of the hub, or OWNER/NAME@REVISION.
      step: checkpoint of a run folder; None is the newest complete one.
      cache_dtype: "float32" or "bfloat16", of cached keys and values; None is the model's.
      mesh: devices to split parameters and cache over, such as `MeshConfig(data=2, tensor=4)`; None
        is a single device.
      rank_budget: relative error of G_LM, in the Frobenius norm of each head, for which decoding
        caches keys in fewer numbers (docs/low_rank.md), such as 1e-3; for a frozen checkpoint, or
        a G_LM that all prompts share. None caches them whole.
      revision: branch, tag or commit on the hub; None is the newest.
      weights: "bfloat16" or "int8" holds kernels outside PLGA in fewer bytes, for everything that
        the model computes (docs/decoding.md); "float32" is as trained.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.

    Examples:
      >>> pldr_jax.load("runs/nano").task is None  # a language model
      True
    """
    from pldr_jax.interop.weights import open_checkpoint

    if isinstance(mesh, MeshConfig):
        mesh = build_mesh(mesh)
    check_weights(weights)
    opened = open_checkpoint(path, step, tasks=True, revision=revision, mesh=mesh)
    own = opened.g_lm, opened.tokenizer, cache_dtype, mesh, rank_budget, opened.end_ids
    return LanguageModel(opened.config.model, rounded(opened.params, weights), *own)
