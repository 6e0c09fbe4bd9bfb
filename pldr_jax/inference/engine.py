"""The engine: a queue of requests in, completions out, with fixed shapes and few compilations."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.inference.compiled import compiled_functions
from pldr_jax.inference.request import CacheMode, Completion, Request, check_request
from pldr_jax.inference.sampling import Sampling
from pldr_jax.inference.slots import Emitted, Limits, Slots
from pldr_jax.model.decoder import Params
from pldr_jax.model.low_rank import LowRankG, factorize, no_shared_g_lm

SMALLEST_BUCKET = 16
STOP_IDS = 8
"""Stop tokens a request may have: a fixed number, so that it needs no compilation of its own."""

FindStop = Callable[[Completion], int | None]
"""Tokens of a completion up to a stop string, if it has one; the engine knows no text."""


class Engine:
    """Decodes requests with one set of parameters.

    Args:
      config: of the model.
      params: stacked parameters.
      g_lm: the model's predefined G_LM [L,1,N,H,J], if it has one, or its factors.
      cache_dtype: "float32" or "bfloat16", of keys and values.
      mesh: that `params` live on (`model.shapes.place_params`); slots are split over its data and
        fsdp axes, heads over its tensor axis. None is a single device.
      rank_budget: relative error of G_LM for which keys are cached in fewer numbers
        (`pldr_jax/model/low_rank.py`); one G_LM must serve all requests. None caches them whole.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        g_lm: jax.Array | LowRankG | None = None,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
        rank_budget: float | None = None,
    ) -> None:
        self._config = config
        self._params = params
        self._g_lm = g_lm
        self._cache_dtype = cache_dtype or config.dtype
        self._jitted = compiled_functions(config, mesh)
        self._rank_budget = rank_budget
        self._tensor = 1 if mesh is None else mesh.shape["tensor"]
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    @functools.cached_property
    def _unstacked(self) -> Params:
        return self._jitted.unstack(self._params)

    def run(
        self,
        requests: Iterable[Request],
        rows: int = 8,
        length: int | None = None,
        g_lm: jax.Array | None = None,
        share_first: bool = False,
        mode: CacheMode | None = None,
        steps: int = 8,
        find_stop: FindStop | None = None,
    ) -> Iterator[Completion]:
        """Decodes requests side by side; yields a completion whenever it has grown or ended.

        A request that cannot be decoded ends with the finish reason "error", and the others go on.

        Args:
          requests: read as slots become free: a generator of any length is fine.
          rows: slots, requests decoded side by side; on a mesh, rounded up so that they divide.
          length: tokens a slot holds; None is the model's context. Shorter slots are faster.
          g_lm: G_LM for every request [L,1,N,H,J]; None takes the model's own.
          share_first: the G_LM of the first prompt serves all requests.
          mode: what is cached; keys, values and G_LM unless told otherwise.
          steps: decode steps in one call; 1 streams every token as soon as it is there.
          find_stop: finds stop strings in a completion.
        """
        mode = mode or CacheMode()
        rows += -rows % self._shards
        queue = iter(requests)
        given = self._factorized(g_lm if g_lm is not None else self._g_lm)
        numbered: Iterator[Completion] = (Completion(i, request) for i, request in enumerate(queue))
        if given is None and share_first and self._config.g_source == "learned":
            first = next(numbered, None)
            if first is None:
                return
            numbered = itertools.chain([first], numbered)
            if check_request(first.request, *self._bounds()) is None:
                given = self._factorized(self._g_lm_of(first.request))
        if self._rank_budget is not None and given is None:
            raise no_shared_g_lm(self._config)
        if mode.kv:
            slots = min(length or self._config.context_length, self._config.context_length)
            yield from self._cached(numbered, rows, slots, given, mode.g, steps, find_stop)
        else:
            whole = given.G_LM if isinstance(given, LowRankG) else given
            yield from self._uncached(numbered, whole, mode.g, find_stop)

    def _factorized(self, g_lm: jax.Array | LowRankG | None) -> jax.Array | LowRankG | None:
        if g_lm is None or self._rank_budget is None or isinstance(g_lm, LowRankG):
            return g_lm
        return factorize(g_lm, self._rank_budget, shards=self._tensor)

    def _bounds(self) -> tuple[int, int]:
        return self._config.context_length, self._config.vocab_size

    def _g_lm_of(self, request: Request) -> jax.Array:
        tokens, length = _padded(request, self._config.context_length)
        return self._jitted.prompt_g_lm(self._params, tokens[None], length[None])

    def _cached(
        self,
        queue: Iterator[Completion],
        rows: int,
        length: int,
        g_lm: jax.Array | LowRankG | None,
        keep: str,
        steps: int,
        find_stop: FindStop | None,
    ) -> Iterator[Completion]:
        if g_lm is not None or self._config.g_source != "learned":
            keep = "G_LM"
        slots = self._jitted.empty(
            rows=rows,
            length=length,
            stop_ids=STOP_IDS,
            g_lm_LBNHJ=g_lm,
            keep=keep,
            dtype=self._cache_dtype,
        )
        running: list[Completion | None] = [None] * rows
        while True:
            for slot in range(rows):
                while running[slot] is None and (waiting := next(queue, None)) is not None:
                    waiting.error = self._refusal(waiting.request, length)
                    if waiting.error is not None:
                        waiting.finish_reason = "error"
                        yield waiting
                        continue
                    slots = self._admitted(slots, slot, waiting.request, g_lm, keep)
                    running[slot] = waiting
            if not any(running):
                return
            slots, emitted = self._jitted.decode(self._unstacked, slots, steps=steps)
            made = jax.device_get(emitted)
            ended_by_text = np.zeros((rows,), bool)
            for slot, completion in enumerate(running):
                if completion is None:
                    continue
                self._take(completion, slot, made)
                if find_stop is not None and (cut := find_stop(completion)) is not None:
                    ended_by_text[slot] = completion.finish_reason is None
                    del completion.tokens[cut:], completion.logprobs[cut:]
                    completion.finish_reason, completion.error = "stop", None
                yield completion
                if completion.finish_reason is not None:
                    running[slot] = None
            if ended_by_text.any():
                slots = self._jitted.release(slots, ended_by_text)

    def _refusal(self, request: Request, length: int) -> str | None:
        wrong = check_request(request, *self._bounds())
        if wrong is None and len(request.stop_ids) > STOP_IDS:
            return f"stop_ids has {len(request.stop_ids)} ids, at most {STOP_IDS} are possible"
        needed = len(request.prompt) + request.max_new_tokens
        if wrong is None and min(needed, self._config.context_length) > length:
            return f"the prompt and max_new_tokens need {needed} tokens, the slots hold {length}"
        if wrong is None:
            try:
                _sampling(request)
            except ConfigError as error:
                return str(error)
        return wrong

    def _admitted(
        self,
        slots: Slots,
        slot: int,
        request: Request,
        g_lm: jax.Array | LowRankG | None,
        keep: str,
    ) -> Slots:
        # The bucket depends on the prompt alone, so that its G_LM does, too, to the last bit.
        tokens, real = _padded(request, self._config.context_length)
        stop = np.full((1, STOP_IDS), -1, np.int32)
        stop[0, : len(request.stop_ids)] = request.stop_ids
        left: Any = np.array([request.max_new_tokens], np.int32)
        return self._jitted.admit(
            self._params,
            slots=slots,
            slot=np.int32(slot),
            tokens_T=tokens,
            length=real,
            sampling=_sampling(request),
            limits=Limits(left, stop),  # type: ignore[arg-type]
            g_lm_LBNHJ=g_lm,
            keep=keep,
        )

    def _take(self, completion: Completion, slot: int, made: Emitted) -> None:
        """Appends what the slot made, and says why it ended if it did."""
        for i in range(made.token_CB.shape[0]):
            if made.valid_CB[i, slot]:
                completion.tokens.append(int(made.token_CB[i, slot]))
                completion.logprobs.append(float(made.logprob_CB[i, slot]))
            elif made.stopped_CB[i, slot]:
                completion.finish_reason = "stop"
            elif made.broken_CB[i, slot]:
                completion.finish_reason = "error"
                completion.error = "the logits are not finite: the checkpoint may be broken"
        self._end_when_full(completion)

    def _end_when_full(self, completion: Completion) -> None:
        if completion.finish_reason is not None:
            return
        if len(completion.tokens) >= completion.request.max_new_tokens:
            completion.finish_reason = "length"
        elif len(completion.request.prompt) + len(completion.tokens) >= self._config.context_length:
            completion.finish_reason = "context"

    def _uncached(
        self,
        queue: Iterator[Completion],
        given: jax.Array | None,
        keep: str,
        find_stop: FindStop | None,
    ) -> Iterator[Completion]:
        """One request at a time, everything recomputed at every token but what the mode keeps."""
        for completion in queue:
            request = completion.request
            completion.error = self._refusal(request, self._config.context_length)
            if completion.error is not None:
                completion.finish_reason = "error"
                yield completion
                continue
            g_lm = given
            if g_lm is None and keep != "none" and self._config.g_source == "learned":
                g_lm = self._g_lm_of(request)
            needed = min(len(request.prompt) + request.max_new_tokens, self._config.context_length)
            tokens, length = _padded(request, self._config.context_length, needed)
            sampling = _sampling(request)
            while completion.finish_reason is None:
                token, logprob, finite, tokens, length = self._jitted.full(
                    self._params, tokens, length, g_lm, sampling
                )
                if not finite:
                    completion.finish_reason = "error"
                    completion.error = "the logits are not finite: the checkpoint may be broken"
                elif int(token) in request.stop_ids:
                    completion.finish_reason = "stop"
                else:
                    completion.tokens.append(int(token))
                    completion.logprobs.append(float(logprob))
                    self._end_when_full(completion)
                if find_stop is not None and (cut := find_stop(completion)) is not None:
                    del completion.tokens[cut:], completion.logprobs[cut:]
                    completion.finish_reason = "stop"
                yield completion

    def generate(self, requests: Iterable[Request], **options: Any) -> list[Completion]:
        """The completions of all requests, in their order; options are those of `run`."""
        finished = {c.index: c for c in self.run(requests, **options) if c.finish_reason}
        return [finished[index] for index in sorted(finished)]


def bucket(length: int, limit: int) -> int:
    """The padded length that `length` tokens are compiled for: a power of two, at most `limit`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def _padded(request: Request, limit: int, needed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((bucket(max(len(request.prompt), needed), limit),), np.int32)
    tokens[: len(request.prompt)] = request.prompt
    return tokens, np.int32(len(request.prompt))  # type: ignore[return-value]


def _sampling(request: Request) -> Sampling:
    return Sampling.create(
        1,
        request.temperature,
        request.top_p,
        request.top_k,
        request.seed,
        request.min_p,
        request.repetition_penalty,
    )
