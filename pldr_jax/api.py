"""The Python API: `load` a checkpoint, call it, generate with it."""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.data.tokenizer import Tokenizer
from pldr_jax.flags import config_from_dict
from pldr_jax.inference.engine import CacheMode, Completion, Engine
from pldr_jax.inference.sampling import Sampling
from pldr_jax.model.decoder import ModelOutputs, Params, forward

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Generation:
    """One prompt's result.

    Attributes:
      prompt_tokens: the prompt's token ids.
      tokens: new token ids.
      text: their text; "" where the checkpoint has no tokenizer.
      finish_reason: "stop", "length" or "context"; None while it is still being decoded.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: str | None


class LanguageModel:
    """A loaded model.

    Attributes:
      config: the model's config.
      params: its parameters, stacked over layers.
      g_lm: its predefined G_LM [L,1,N,H,J]; None where it is learned, or the identity.
      tokenizer: None where the checkpoint has none; token ids work all the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        g_lm: jax.Array | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.g_lm = g_lm
        self.tokenizer = tokenizer
        self._engine = Engine(config, params, g_lm)
        self._forward = jax.jit(functools.partial(forward, config))

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
        seed: int = 0,
        g_lm: jax.Array | np.ndarray | None = None,
        kv_cache: bool = True,
        g_cache: str = "G_LM",
        stop_ids: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continues the prompts, decoded as one batch.

        Args:
          prompts: strings or lists of token ids; a single one is a batch of one.
          max_new_tokens: at most this many new tokens each.
          temperature: 0 is greedy.
          top_k, top_p: restrict the draw; 0 and 1 are off.
          seed: prompt i draws with seed + i.
          g_lm: one G_LM for every prompt, [L,N,H,J]; None takes what each prompt gives.
          kv_cache: cache keys and values.
          g_cache: "G_LM" keeps the prompt's G_LM, "A" its metric tensor, "none" recomputes G_LM at
            every token (the definition of the model; without a kv cache).
          stop_ids: tokens that end a text; None is the tokenizer's end token, if there is a
            tokenizer.

        Returns:
          One `Generation` a prompt, with `.tokens` and `.text`.
        """
        steps = self.stream(
            prompts,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            seed,
            g_lm,
            kv_cache,
            g_cache,
            stop_ids,
        )
        return deque(steps, maxlen=1).pop()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        g_lm: jax.Array | np.ndarray | None = None,
        kv_cache: bool = True,
        g_cache: str = "G_LM",
        stop_ids: Sequence[int] | None = None,
    ) -> Iterator[list[Generation]]:
        """As `generate`, yielding the texts as they grow, once a token."""
        encoded = [self._encoded(prompt) for prompt in _as_list(prompts)]
        sampling = Sampling.create(len(encoded), temperature, top_p, top_k, seed)
        if stop_ids is None:
            stop_ids = [self.tokenizer.eos_id] if self.tokenizer else []
        mode = CacheMode(kv=kv_cache, g=g_cache)
        for completions in self._engine.stream(
            encoded, max_new_tokens, sampling, frozenset(stop_ids), self._checked_g_lm(g_lm), mode
        ):
            yield [self._generation(completion) for completion in completions]

    def _encoded(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ConfigError("prompt: this checkpoint has no tokenizer; pass lists of token ids")
        return self.tokenizer.encode(prompt)

    def _generation(self, completion: Completion) -> Generation:
        text = self.tokenizer.decode(completion.tokens) if self.tokenizer else ""
        return Generation(
            completion.prompt, list(completion.tokens), text, completion.finish_reason
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
        return jnp.asarray(g_lm, jnp.float32)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(item, (int, np.integer)) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def load(path: str | Path, step: int | None = None) -> LanguageModel:
    """Opens a run folder, or a folder in the transformers layout (`config.json` and
    `model.safetensors`).

    Args:
      path: the folder.
      step: checkpoint of a run folder; None is the newest complete one.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{str(path)!r}: no such folder; give a run folder, or one with config.json"
        )
    tokenizer_path = folder / "tokenizer.model"
    tokenizer = Tokenizer.load(tokenizer_path) if tokenizer_path.is_file() else None
    if (folder / "config.json").is_file():
        from pldr_jax.interop.transformers import read_checkpoint

        config, params, g_lm = read_checkpoint(folder)
        return LanguageModel(config, params, g_lm, tokenizer)
    from pldr_jax.training.checkpoint import read_weights

    weights = read_weights(folder, step)
    config = config_from_dict(weights.config_dict, str(folder)).model
    return LanguageModel(config, weights.params, weights.g_lm, tokenizer)
