"""Interventions at inference: changes of the deductive outputs that ask what a model uses them for
(arXiv 2609.34130).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.model.decoder import Params, forward
from pldr_jax.model.deductive import identity_g_lm
from pldr_jax.model.weights import change_plga


@dataclasses.dataclass(frozen=True)
class Intervention:
    """What is changed; the default changes nothing.

    Attributes:
      centroid: every row of A is replaced by the centroid of the rows, before the last three steps
        of power law graph attention.
      gain: factor of G_LM: one number, or eta[layer][head] (nested sequences or an array).
      text: token ids of another text, whose A and G_LM replace those of every text; None takes each
        text's own. The other changes act on it too.

    Examples:
      >>> without = pldr_jax.Intervention(gain=0)
      >>> bool(pldr_jax.load("runs/nano")([[5, 6]], intervention=without).deductive.G_LM.any())
      False
    """

    centroid: bool = False
    gain: Any = 1.0
    text: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        gain = np.asarray(self.gain, np.float64)
        if gain.ndim not in (0, 2) or not np.isfinite(gain).all():
            raise ConfigError("intervention.gain: must be finite: a number, or [layers][heads]")
        nested = float(gain) if gain.ndim == 0 else tuple(map(tuple, gain.tolist()))
        object.__setattr__(self, "gain", nested)
        if self.text is not None:
            object.__setattr__(self, "text", tuple(int(token) for token in self.text))
            if not self.text:
                raise ConfigError("intervention.text: holds no token")


def intervene(
    config: ModelConfig, params: Params, g_lm: jax.Array | None, intervention: Intervention
) -> tuple[ModelConfig, Params, jax.Array | None]:
    """The model under an intervention, as another model: its config, parameters and predefined
    G_LM. What is not changed keeps its bits.

    The centroid of the rows of A, times W, is A times the mean of W over the axis that it is
    multiplied along, and a gain on G_LM is one on a and b_a: no step of the model changes.

    Raises:
      ConfigError: a gain of another shape, token ids outside the vocabulary, or a centroid or a
        text for a model whose G_LM is not learned.
    """
    learned = config.g_source == "learned"
    if not learned and (intervention.centroid or intervention.text is not None):
        raise ConfigError(
            f"intervention: Model.g_source = {config.g_source!r} has no A; only a gain can be set"
        )
    shape = (config.num_layers, config.num_heads)
    eta = np.asarray(intervention.gain, np.float32)
    if eta.ndim == 2 and eta.shape != shape:
        raise ConfigError(
            f"intervention.gain: has shape {eta.shape}, the model needs {shape} [L,N]"
        )
    eta_LN11 = np.broadcast_to(eta, shape)[:, :, None, None]
    if not learned:
        if (eta == 1).all():
            return config, params, g_lm
        whole = identity_g_lm(config) if g_lm is None else g_lm
        external = dataclasses.replace(config, g_source="external", g_file=None)
        return external, params, whole * eta_LN11[:, None]

    def change(plga: Params, layer: Any) -> Params:
        changed = dict(plga)
        if intervention.centroid:
            W = jnp.asarray(changed["W"])
            changed["W"] = jnp.broadcast_to(W.mean(-1, keepdims=True), W.shape)
        if not (eta == 1).all():
            gain = eta_LN11[layer]
            changed |= {name: jnp.asarray(changed[name]) * gain for name in ("a", "b_a")}
        return changed

    params = change_plga(params, change)
    if intervention.text is None:
        return config, params, g_lm
    if not all(0 <= token < config.vocab_size for token in intervention.text):
        raise ConfigError("intervention.text: a token id outside the vocabulary")
    tokens_1T = jnp.asarray([intervention.text], jnp.int32)
    kept = jax.jit(lambda p, tokens: forward(config, p, tokens).deductive.G_LM)(params, tokens_1T)
    external = dataclasses.replace(config, g_source="external", g_file=None)
    return external, change_plga(params, lambda *_: None), kept


def parse_intervention(text: str, encode: Callable[[str], Sequence[int]]) -> Intervention:
    """An intervention from a flag: `centroid`, `gain=X` (a number, or an NPY file of [L,N]) and
    `text=FILE` (UTF-8), joined by commas.

    Raises:
      ConfigError: one line, for what is none of these or cannot be read.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = item.partition("=")
        try:
            if item == "centroid":
                values["centroid"] = True
            elif name == "gain":
                values["gain"] = float(value) if _is_number(value) else np.load(value)
            elif name == "text":
                with open(value, encoding="utf-8") as file:
                    values["text"] = tuple(encode(file.read()))
            else:
                raise ConfigError(
                    f"--intervention={text}: {item!r} is none of centroid, gain=X, text=FILE"
                )
        except (OSError, ValueError) as error:
            raise ConfigError(f"--intervention={text}: {item!r} cannot be read ({error})") from None
    return Intervention(**values)


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
