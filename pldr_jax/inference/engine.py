"""The engine: a queue of requests in, completions out, with fixed shapes and few compilations."""

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ModelConfig
from pldr_jax.config.sampling import MAX_STOP_IDS
from pldr_jax.inference.occupancy import Occupancy, Text
from pldr_jax.inference.prefix import PrefixCache, no_prefixes
from pldr_jax.inference.recompute import compiled_steps, recompute
from pldr_jax.inference.request import (
    BROKEN,
    Completion,
    DecodeOptions,
    FindStop,
    Request,
    bias_of,
    check_request,
    padded,
    prompts_together,
)
from pldr_jax.inference.sampling import slot_sampling
from pldr_jax.inference.slots import Emitted, Prompts, Slots, compiled_slots
from pldr_jax.model.decoder import Params
from pldr_jax.model.low_rank import LowRankG, factorize, no_shared_g_lm

Queue = Iterator[Completion | None]
"""What is to be decoded; None where nothing waits at the moment."""


class Engine:
    """Decodes requests with one set of parameters.

    Args:
      config: of the model.
      params: stacked, or what `unstack_layers` makes of them.
      g_lm: the model's predefined G_LM [L,1,N,H,J], if it has one, or its factors.
      cache_dtype: "float32" or "bfloat16", of keys and values.
      mesh: that `params` live on (`counts.shapes.place_params`); slots are split over its data and
        fsdp axes, heads over its tensor axis. None is a single device.
      rank_budget: relative error of G_LM for which keys are cached in fewer numbers
        (`pldr_jax/model/low_rank.py`); one G_LM must serve all requests. None caches them whole.
      pieces: ids from this one on are never drawn, and no prompt may have them; None is the
        vocabulary.

    Attributes:
      held: the parameters, once: stacked until the first request is decoded, then a layer at a
        time.
      prefixes: what is kept of prompts where `DecodeOptions.prefix_cache_mb` says so.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        g_lm: jax.Array | LowRankG | None = None,
        cache_dtype: str | None = None,
        mesh: Mesh | None = None,
        rank_budget: float | None = None,
        pieces: int | None = None,
    ) -> None:
        self._config = config
        self.held: Params = jax.tree.map(jnp.asarray, params)  # in dicts that are the engine's
        self._g_lm = g_lm
        self._cache_dtype = cache_dtype or config.dtype
        self._slots, self._steps = compiled_slots(config, mesh), compiled_steps(config, mesh)
        self.prefixes = PrefixCache(config, mesh)
        self._rank_budget = rank_budget
        self._pieces = min(pieces or config.vocab_size, config.vocab_size)
        self._tensor = 1 if mesh is None else mesh.shape["tensor"]
        self._shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    @property
    def stacked(self) -> Params:
        """The parameters, stacked over layers: a copy, if the engine has decoded, whose kernels are
        in the compute dtype.
        """
        unstacked = isinstance(self.held["layers"], tuple)
        return self._slots.stack(self.held) if unstacked else self.held

    def unstack(self) -> None:
        """Holds the weights as decoding reads them, from now on."""
        if not isinstance(self.held["layers"], tuple):
            self.held = self._slots.unstack(self.held)

    def run(
        self,
        requests: Iterable[Request | None],
        options: DecodeOptions | None = None,
        g_lm: jax.Array | None = None,
        find_stop: FindStop | None = None,
    ) -> Iterator[Completion]:
        """Decodes requests side by side; yields a completion whenever it has grown or ended.

        A request that cannot be decoded ends with the finish reason "error", and the others go on.

        Args:
          requests: read as slots become free: a generator of any length is fine. One that lives on
            yields None where nothing waits, and only while something is decoded.
          options: on a mesh, slots are rounded up so that they divide; a capacity of None is the
            model's context here. Smaller slots are faster.
          g_lm: G_LM for every request [L,1,N,H,J]; None takes the model's own.
          find_stop: finds stop strings in a completion.
        """
        options = options or DecodeOptions()
        if options.kv_cache:
            self.unstack()
        numbers = itertools.count()
        queue: Queue = (None if r is None else Completion(next(numbers), r) for r in requests)
        shared = self._factorized(g_lm if g_lm is not None else self._g_lm)
        first = options.share_first_g and self._config.g_source == "learned"
        if shared is None and first:
            shared, queue = self._first_g_lm(queue, options)
        elif shared is None and self._rank_budget is not None:
            raise no_shared_g_lm(self._config)
        elif shared is None and options.prefix_cache_mb and self._config.g_source == "learned":
            raise no_prefixes(options.prefix_cache_mb)
        if options.kv_cache:
            yield from self._cached(queue, options, shared, find_stop)
        else:
            whole = shared.G_LM if isinstance(shared, LowRankG) else shared
            yield from self._uncached(queue, options, whole, find_stop)

    def generate(
        self,
        requests: Iterable[Request],
        options: DecodeOptions | None = None,
        g_lm: jax.Array | None = None,
        find_stop: FindStop | None = None,
    ) -> list[Completion]:
        """The completions of all requests, in their order; arguments are those of `run`."""
        completions = self.run(requests, options, g_lm, find_stop)
        ended = {c.index: c for c in completions if c.finish_reason}
        return [ended[index] for index in sorted(ended)]

    def _factorized(self, g_lm: jax.Array | LowRankG | None) -> jax.Array | LowRankG | None:
        if g_lm is None or self._rank_budget is None or isinstance(g_lm, LowRankG):
            return g_lm
        return factorize(g_lm, self._rank_budget, shards=self._tensor)

    def _g_lm_of(self, request: Request) -> jax.Array:
        tokens, length = padded(request.prompt, self._config.context_length)
        return self._steps.prompt_g_lm(self.held, tokens[None], length[None])

    def _first_g_lm(
        self, queue: Queue, options: DecodeOptions
    ) -> tuple[jax.Array | LowRankG | None, Queue]:
        """G_LM of the first request that can be decoded, and the whole queue."""
        passed = []
        for completion in queue:
            passed.append(completion)
            if completion and self._refusal(completion.request, options) is None:
                g_lm = self._factorized(self._g_lm_of(completion.request))
                return g_lm, itertools.chain(passed, queue)
        return None, iter(passed)

    def _refusal(self, request: Request, options: DecodeOptions) -> str | None:
        alone = request.top_logprobs or request.g_lm is not None or request.params is not None
        if alone and not options.kv_cache:
            return "kv_cache = False: has no top_logprobs and no G_LM or parameters of one request"
        if options.prefix_cache_mb and (request.g_lm is not None or request.params is not None):
            return "prefix_cache_mb: keeps no G_LM and no parameters of one request"
        capacity = options.capacity if options.kv_cache else None
        return check_request(request, self._config, self._pieces, capacity)

    def _cached(
        self,
        queue: Queue,
        options: DecodeOptions,
        g_lm: jax.Array | LowRankG | None,
        find_stop: FindStop | None,
    ) -> Iterator[Completion]:
        own = g_lm is None and self._config.g_source == "learned"
        keep = options.g_cache if own else "G_LM"
        batch = options.batch_size + -options.batch_size % self._shards
        context = self._config.context_length
        slots = self._slots.empty(
            batch=batch,
            capacity=min(options.capacity or context, context),
            g_lm_LBNHJ=g_lm,
            keep=keep,
            dtype=self._cache_dtype,
        )
        occupancy = Occupancy(batch, context)
        unread: tuple[Emitted, list[Text | None]] | None = None
        more = True  # whether a prompt may be waiting
        while True:
            waiting: list[Completion] = []
            free = len(occupancy.free)
            while len(waiting) < free:
                completion = next(queue, None)
                more = completion is not None
                if completion is None:
                    break
                if refusal := self._refusal(completion.request, options):
                    completion.fail(refusal)
                    yield completion
                else:
                    waiting.append(completion)
            for group in occupancy.enter(waiting):
                if options.prefix_cache_mb:
                    slots = self._extended(slots, group, g_lm, options.prefix_cache_mb << 20)
                else:
                    slots = self._admitted(slots, group, g_lm, keep)
            # The next call is started before the last one is read, and the device does not wait;
            # unless the last one has surely freed a slot for a prompt.
            read, unread = unread, None
            if occupancy.going and not (read and more and occupancy.ending):
                texts = list(occupancy.texts)
                limit: Any = np.int32(occupancy.start(options.steps, more))
                slots, emitted = self._slots.decode(
                    self.held,
                    slots=slots,
                    steps=options.steps,
                    pieces=self._pieces,
                    limit=limit,
                )
                unread = emitted, texts
            elif read is None:
                return
            if read is not None:
                ended_here_B = yield from self._read(*read, occupancy, find_stop)
                if ended_here_B.any():
                    slots = self._slots.release(slots, ended_here_B)

    def _read(
        self,
        emitted: Emitted,
        texts: list[Text | None],
        occupancy: Occupancy,
        find_stop: FindStop | None,
    ) -> Generator[Completion, None, Any]:
        """Yields every completion that a call has made grow. Returns which slots [B] have a text
        that ended for a reason that the device does not know.
        """
        made = jax.device_get(emitted)
        ended_here_B: Any = np.zeros((len(texts),), bool)
        for slot, text in enumerate(texts):
            if text is None or text.completion.finish_reason is not None:
                continue
            completion = text.completion
            self._take(completion, slot, made)
            device_goes_on = completion.finish_reason is None and occupancy.texts[slot] is text
            if find_stop is not None and (cut := find_stop(completion)) is not None:
                completion.stop(cut)
            yield completion
            ended_here_B[slot] = device_goes_on and completion.finish_reason is not None
        return ended_here_B

    def _admitted(
        self,
        slots: Slots,
        group: Mapping[int, Request],
        g_lm: jax.Array | LowRankG | None,
        keep: str,
    ) -> Slots:
        """The slots with the prompts of one bucket, by their slots, in one call."""
        context = self._config.context_length
        # The bucket depends on the prompt alone, so that its G_LM does, too, to the last bit.
        tokens, lengths = zip(*(padded(r.prompt, context) for r in group.values()), strict=True)
        batch = slots.active_B.shape[0]
        missing = prompts_together(len(tokens[0]), batch) - len(group)
        prompts = self._prompts(group, np.stack(tokens), np.array(lengths, np.int32))
        repeated = jax.tree.map(lambda x: np.concatenate([x, *[x[-1:]] * missing]), prompts)
        one = next(iter(group.values()))  # all of a call have the same G_LM and parameters
        return self._slots.admit(
            self.held if one.params is None else one.params,
            slots=slots,
            prompts=repeated,
            g_lm_LBNHJ=g_lm if one.g_lm is None else one.g_lm,
            keep=keep,
        )

    def _extended(
        self,
        slots: Slots,
        group: Mapping[int, Request],
        g_lm: jax.Array | LowRankG | None,
        most: int,
    ) -> Slots:
        """The slots with some prompts, of which only what is not kept is run; at most `most` bytes
        are kept.
        """
        whole = g_lm.G_LM if isinstance(g_lm, LowRankG) else g_lm
        for slot, request in group.items():
            logits_QV, outputs = self.prefixes.run(self.held, request.prompt, whole, most)
            tokens_1T: Any = np.zeros((1, self._config.context_length), np.int32)
            tokens_1T[0, : len(request.prompt)] = request.prompt
            length_1: Any = np.array([len(request.prompt)], np.int32)
            prompts = self._prompts({slot: request}, tokens_1T, length_1)
            slots = self.prefixes.enter(slots, prompts, logits_QV, outputs, g_lm)
        return slots

    def _prompts(self, group: Mapping[int, Request], tokens_QT: Any, length_Q: Any) -> Prompts:
        """What slots are told of the requests that enter them."""
        stop_QZ: Any = np.full((len(group), MAX_STOP_IDS), -1, np.int32)
        for row, request in enumerate(group.values()):
            stop_ids = request.sampling.stop_ids or ()
            stop_QZ[row, : len(stop_ids)] = stop_ids
        slot_Q: Any = np.array(list(group), np.int32)
        bias_QV: Any = np.stack([bias_of(r, self._config.vocab_size) for r in group.values()])
        told_Q: Any = np.array([r.top_logprobs > 0 for r in group.values()])
        sampling = slot_sampling([r.sampling for r in group.values()])
        return Prompts(slot_Q, tokens_QT, length_Q, sampling, stop_QZ, bias_QV, told_Q)

    def _take(self, completion: Completion, slot: int, made: Emitted) -> None:
        """Appends what the slot made, and says why it ended if it did."""
        for i in range(made.token_XB.shape[0]):
            if made.valid_XB[i, slot]:
                completion.tokens.append(int(made.token_XB[i, slot]))
                completion.logprobs.append(float(made.logprob_XB[i, slot]))
                if count := completion.request.top_logprobs:
                    ids, logprobs = made.top_token_XBY[i, slot], made.top_logprob_XBY[i, slot]
                    top = zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True)
                    completion.top.append(list(top))
            elif made.stopped_XB[i, slot]:
                completion.finish_reason = "stop"
            elif made.broken_XB[i, slot]:
                completion.fail(BROKEN)
        completion.end_when_full(self._config.context_length)

    def _uncached(
        self,
        queue: Queue,
        options: DecodeOptions,
        shared: jax.Array | None,
        find_stop: FindStop | None,
    ) -> Iterator[Completion]:
        """One request at a time, everything recomputed at every token but what is kept."""
        learned = self._config.g_source == "learned"
        for completion in filter(None, queue):
            if refusal := self._refusal(completion.request, options):
                completion.fail(refusal)
                yield completion
                continue
            g_lm = shared
            if shared is None and learned and options.g_cache != "none":
                g_lm = self._g_lm_of(completion.request)
            yield from recompute(
                self._steps, self.held, completion, g_lm, self._config, self._pieces, find_stop
            )
