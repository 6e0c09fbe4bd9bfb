"""The three kinds of requests that benchmarks make, in plain tuples: log-likelihoods of a
continuation, log-likelihoods of a whole text in windows ("rolling"), and generations.

`pldr_jax/inference/given/modes.py` says which tokens G_LM comes from in each mode.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, SamplingConfig
from pldr_jax.evaluation.settings import read_settings
from pldr_jax.evaluation.windows import rolling_windows
from pldr_jax.inference.given.modes import SCORE_MODES, ScoreMode
from pldr_jax.inference.given.score import Pair, Score
from pldr_jax.inference.request import DecodeOptions, Request

_CHUNK = 1024
"""Texts scored between two calls of `on_progress`."""


class TextScorer:
    """Answers the three kinds of requests with one model and one mode.

    Texts are scored in batches of similar lengths; neither their number side by side nor their
    order changes a result.

    Args:
      lm: with a tokenizer.
      mode: see above.
      rows: texts side by side.
      g_lm: G_LM [L,N,H,J] for the mode "frozen"; None is the checkpoint's own.
      overlap: tokens of context of the windows after the first, in rolling requests.
      on_progress: called with the number of texts that are done, and that of all, of a call.

    Raises:
      ConfigError: a mode that the model rules out, or no tokenizer.
    """

    def __init__(
        self,
        lm: LanguageModel,
        mode: ScoreMode = "causal",
        rows: int = 8,
        g_lm: jax.Array | np.ndarray | None = None,
        overlap: int = 1,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if mode not in SCORE_MODES:
            raise ConfigError(
                f"mode = {mode!r}: must be one of {', '.join(map(repr, SCORE_MODES))}"
            )
        if mode == "frozen" and g_lm is None and lm.config.g_source == "learned":
            raise ConfigError(
                "mode = 'frozen': this model learns G_LM; freeze it with pldr-freeze, or give a "
                "G_LM"
            )
        if mode != "frozen" and g_lm is not None:
            raise ConfigError(f"mode = {mode!r}: a given G_LM needs 'frozen'")
        if not 1 <= overlap < lm.config.context_length:
            raise ConfigError(
                f"overlap = {overlap}: must be 1 to {lm.config.context_length - 1}, below the "
                "model's context"
            )
        if lm.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.model, and tasks are text")
        self.lm, self.mode, self.rows = lm, mode, rows
        self.prefix = lm.tokenizer.eos_id if lm.tokenizer.eos_id >= 0 else lm.tokenizer.bos_id
        """Stands before a text without context: training puts it before every document."""
        if self.prefix < 0:
            raise ConfigError("the tokenizer has neither an end nor a start piece")
        self._g_lm, self._overlap, self._on_progress = g_lm, overlap, on_progress

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation after its context, nats; whether greedy decoding
        gives it), for each request.

        A context that is empty is the end piece; one that is too long loses its beginning.

        Raises:
          ConfigError: a continuation that fills the model's context by itself.
        """
        pairs = [self._fitted(i, *self.lm.encode_pair(*r)) for i, r in enumerate(requests)]
        asked = [index for index, (_, continuation) in enumerate(pairs) if continuation]
        scores = dict(zip(asked, self._scores([pairs[i] for i in asked]), strict=True))
        nothing = (0.0, True)
        return [
            (scores[i].logprob, scores[i].is_greedy) if i in scores else nothing
            for i in range(len(pairs))
        ]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Log-probability of each text, nats, in windows (`rolling_windows`).

        Every mode has the same windows. "causal" takes G_LM from the context of a window alone:
        from the end piece in the first one, and from `overlap` tokens in the later ones.
        """
        context_length = self.lm.config.context_length
        owners: list[int] = []
        windows: list[Pair] = []
        for index, text in enumerate(texts):
            tokens = self.lm.encode(text)
            for window in rolling_windows(tokens, self.prefix, context_length, self._overlap):
                owners.append(index)
                windows.append(window)
        totals = [0.0] * len(texts)
        for owner, scored in zip(owners, self._scores(windows), strict=True):
            totals[owner] += scored.logprob
        return totals

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """The continuation of each context, cut before the first of its `until` strings.

        Settings are those of the harness (`evaluation/settings.py`). New tokens take at most half
        of the model's context, and a context that is too long loses its beginning. "full"
        recomputes G_LM at every token.

        Raises:
          ConfigError: an unknown setting, or a context that cannot be decoded.
        """
        asked = {i: self._request(i, *request) for i, request in enumerate(requests)}
        made = {i: request for i, request in asked.items() if request is not None}
        options = DecodeOptions(self.rows)
        if self.mode == "full" and self.lm.config.g_source == "learned":
            options = DecodeOptions(self.rows, kv_cache=False, g_cache="none")
        texts, numbers = dict.fromkeys(asked, ""), list(made)
        done = 0
        for place, result in self.lm.run(list(made.values()), options, self._g_lm):
            if result.error is not None:
                raise ConfigError(f"request {numbers[place]}: {result.error}")
            if result.finish_reason is not None:
                texts[numbers[place]] = result.text
                done += 1
                self._on_progress(done, len(made))
        return list(texts.values())

    def _scores(self, pairs: Sequence[Pair]) -> list[Score]:
        scores: list[Score] = []
        mode: ScoreMode = self.mode
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            contexts, continuations = [c for c, _ in chunk], [c for _, c in chunk]
            scores += self.lm.score(contexts, continuations, mode, self._g_lm, self.rows)
            self._on_progress(len(scores), len(pairs))
        return scores

    def _fitted(self, index: int, context: list[int], continuation: list[int]) -> Pair:
        # The last token is only predicted.
        room = self.lm.config.context_length + 1 - len(continuation)
        if room < 1:
            raise ConfigError(
                f"request {index}: the continuation has {len(continuation)} tokens, the model's "
                f"context is {self.lm.config.context_length}"
            )
        return (context or [self.prefix])[-room:], continuation

    def _request(self, index: int, context: str, settings: Mapping[str, Any]) -> Request | None:
        """None where no new token is asked for."""
        assert self.lm.tokenizer is not None
        end, context_length = self.lm.tokenizer.eos_id, self.lm.config.context_length
        try:
            read = read_settings(settings)
            if read.new_tokens == 0:
                return None
            new_tokens = min(read.new_tokens, context_length // 2)
            sampling = SamplingConfig(
                max_new_tokens=new_tokens,
                seed=index,
                stop_ids=(end,) if end >= 0 else (),
                stop=read.until,
                **read.sampling,
            )
        except ConfigError as error:
            raise ConfigError(f"request {index}: {error}") from None
        prompt = (self.lm.encode(context) or [self.prefix])[-(context_length - new_tokens) :]
        return Request(tuple(prompt), sampling)
