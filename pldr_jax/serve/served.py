"""The model that is served: what requests may ask of it, and how it is warmed up."""

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, GenerationConfig, SamplingConfig
from pldr_jax.inference.given.read import Reading, read_text
from pldr_jax.inference.prefix import no_prefixes
from pldr_jax.inference.request import DecodeOptions, Request, bucket
from pldr_jax.model.deductive import identity_g_lm, read_g_lm
from pldr_jax.model.weights import change_plga
from pldr_jax.partition import on_every_device
from pldr_jax.serve.metrics import Metrics
from pldr_jax.serve.settings import ServeConfig
from pldr_jax.serve.wire import ApiError
from pldr_jax.serve.worker import Call, Worker


@dataclasses.dataclass(frozen=True)
class Given:
    """What a request decodes with in place of the model's own.

    Attributes:
      g_lm: G_LM [L,1,N,H,J]; None is that of the prompt, or the one that serves all.
      params: None is the model's.
    """

    g_lm: jax.Array | None = None
    params: Any = None


class Served:
    """A model, the worker that runs it, and the rules of its requests.

    Attributes:
      name: that requests call it by.
      capacity: tokens of prompt and answer together.
      shared: whether one G_LM serves all requests.
      ready: set once every program has been compiled.

    Raises:
      ConfigError: a setting of `generation` that cannot be served.
    """

    def __init__(
        self, lm: LanguageModel, name: str, settings: ServeConfig, generation: GenerationConfig
    ) -> None:
        self.lm, self.name, self.settings = lm, name, settings
        config = lm.config
        self.capacity = min(settings.capacity or config.context_length, config.context_length)
        self.created = int(time.time())
        self.metrics = Metrics(lm.engine.prefixes)
        self.failed = asyncio.Event()
        self.ready = False
        learned, mode = config.g_source == "learned", generation.g_mode
        self.shared = not learned or mode in ("frozen", "identity")
        g_lm = None
        if mode in ("first", "recompute"):
            raise ConfigError(
                f"Generation.g_mode = {mode!r}: depends on more than a request's prompt"
            )
        if mode == "identity":
            g_lm = identity_g_lm(config)
        elif generation.g_file is not None:
            g_lm = read_g_lm(generation.g_file, config, "Generation.g_file")
        elif mode == "frozen" and learned:
            raise ConfigError(
                "Generation.g_mode = 'frozen': this checkpoint learned its G_LM and has none of "
                "its own; name one with Generation.g_file"
            )
        self._shared_g_lm = None if g_lm is None else on_every_device(g_lm, lm.mesh)
        self._identity = None if self.shared else on_every_device(identity_g_lm(config), lm.mesh)
        own = (
            mode if mode != "prompt" else "identity" if config.g_source == "identity" else "frozen"
        )
        self.g_modes = ("prompt", own) if not learned else (own,) if self.shared else _OF_PROMPTS
        self.g_mode = self.g_modes[0]
        megabytes = generation.prefix_cache_mb
        if megabytes and not self.shared:
            raise ConfigError(f"Generation.{no_prefixes(megabytes)}")
        options = DecodeOptions(
            settings.batch_size, self.capacity, settings.steps, prefix_cache_mb=megabytes
        )
        loop = asyncio.get_running_loop()

        def failed(_: BaseException) -> None:
            loop.call_soon_threadsafe(self.failed.set)

        self.worker = Worker(
            lm, options, self._shared_g_lm, settings.max_waiting, self.metrics, failed
        )
        self._scale = jax.jit(lambda plga, eta: {name: plga[name] * eta for name in ("a", "b_a")})

    @property
    def g_lm(self) -> jax.Array | None:
        """The G_LM [L,1,N,H,J] that serves all requests; None where each prompt gives its own."""
        return self._shared_g_lm if self._shared_g_lm is not None else self.lm.g_lm

    def read(self, tokens: Sequence[int], given: Given, g_tokens: int | None = None) -> Reading:
        """One pass over a text; in the worker's thread."""
        params = self.lm.engine.held if given.params is None else given.params
        g_lm = self.g_lm if given.g_lm is None else given.g_lm
        return read_text(self.lm.config, params, tokens, g_tokens, g_lm, self.lm.mesh)

    def given(
        self, g_mode: str, g_text: Sequence[int] | None = None, gain: np.ndarray | None = None
    ) -> Given:
        """What a request decodes with; in the worker's thread.

        Args:
          g_mode: one of `g_modes`.
          g_text: token ids of a text whose G_LM is taken.
          gain: factors [L,N] of G_LM, in every layer of the network that makes it.
        """
        params = None
        if gain is not None:
            eta_LN11: Any = gain.astype(np.float32)[:, :, None, None]
            params = change_plga(
                self.lm.engine.held,
                lambda plga, layer: {**plga, **self._scale(plga, eta_LN11[layer])},
            )
        if g_text is not None:
            reading = self.read(g_text, Given(None, params))
            assert reading.deductive.G_LM is not None
            return Given(on_every_device(reading.deductive.G_LM, self.lm.mesh), params)
        return Given(self._identity if g_mode == "identity" else None, params)

    def check_given(self, g_mode: str, g_text: object, gain: object) -> None:
        """Whether requests may ask for these.

        Raises:
          ApiError: they may not.
        """
        if g_mode not in self.g_modes:
            known = " and ".join(self.g_modes)
            raise ApiError(400, f"g_mode = {g_mode!r}: this server has {known}", "g_mode")
        for name, value in (("g_text", g_text), ("gain", gain)):
            if value is not None and (self.shared or g_mode != "prompt"):
                why = (
                    "one G_LM serves all requests here" if self.shared else "needs g_mode 'prompt'"
                )
                raise ApiError(400, f"{name}: {why}", name)

    async def warm_up(self) -> None:
        """Compiles every program that a request can need: each bucket of prompts, with G_LM of its
        own and with one from outside, the decode step, and the reading of texts.
        """
        lengths, width = [], 0
        while width < self.capacity:
            width = bucket(width + 1, self.capacity)
            lengths.append(min(width, self.capacity - 1))
        call = self.worker.call
        await call(self.lm.engine.unstack)  # or every reading would compile again after it
        kinds = [Given()]
        if not self.shared:
            gain = np.ones((self.lm.config.num_layers, self.lm.config.num_heads))
            kinds += [await call(partial(self.given, "identity"))]
            kinds += [await call(partial(self.given, "prompt", (1,), gain))]
        for length in (*lengths, lengths[-1]):  # the longest twice: what it begins with is kept
            for given in kinds:
                await call(partial(self._read_whole, (1,) * length, given))
                sampling = SamplingConfig(min(2, self.capacity - length), temperature=1.0)
                asked = Request((1,) * length, sampling, g_lm=given.g_lm, params=given.params)
                await self._decoded(asked)
        # One that is ended from outside.
        texts = Call([Request((1,), SamplingConfig(self.capacity))], grows=True)
        self.worker.submit(texts)
        await texts.next()
        self.worker.cancel(texts)
        await self._decoded(Request((1,), SamplingConfig(1)))
        self.ready = True

    def _read_whole(self, tokens: Sequence[int], given: Given) -> None:
        jax.block_until_ready(self.read(tokens, given))

    async def _decoded(self, request: Request) -> None:
        texts = Call([request], grows=False)
        self.worker.submit(texts)
        update = await texts.next()
        assert update is not None
        if update.error:
            raise ConfigError(update.error)


_OF_PROMPTS = ("prompt", "identity")


def gain_of(value: Any, layers: int, heads: int) -> np.ndarray | None:
    """A field `gain` as factors [L,N]: a number, or a list for each layer; None where it is 1.

    Raises:
      ApiError: neither.
    """
    try:
        gain = np.asarray(value, np.float64)
        fits = gain.ndim == 0 or gain.shape == (layers, heads)
        whole = np.broadcast_to(gain, (layers, heads)) if fits else None
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or not np.isfinite(whole).all() or np.abs(whole).max() > 1e6:
        raise ApiError(400, f"gain: must be a number, or {layers} lists of {heads} numbers", "gain")
    return None if (whole == 1).all() else whole
