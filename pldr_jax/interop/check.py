"""The logit check of a conversion: the same tokens through our model and through the reference."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from pldr_jax.config import ConfigError, ModelConfig
from pldr_jax.interop.reference import reference_logits
from pldr_jax.interop.transformers import G_VALUES
from pldr_jax.model.decoder import ModelOutputs, Params, forward

ROWS, TOKENS = 2, 24
LARGE = 1e-3
"""Share of the largest logit above which the figure comes with a warning."""


@dataclasses.dataclass(frozen=True)
class LogitCheck:
    """How far the logits of two readings of one checkpoint are apart.

    Attributes:
      difference: the largest one, as a share of the largest logit.
      tokens: in all.
      agreement: share of the positions whose most probable token is the same.
    """

    difference: float
    tokens: int
    agreement: float

    def line(self) -> str:
        """The figure, for a person; with a warning where it is large."""
        text = (
            f"logit check: {self.tokens} tokens, largest difference {self.difference:.1e} of the "
            f"largest logit, same most probable token at {self.agreement:.1%}"
        )
        if self.difference <= LARGE:
            return text
        return text + (
            f"\nwarning: that is more than {LARGE:.0e}: rounding is amplified where G_LM depends "
            "on its input, or a tensor is not what its name says"
        )


@functools.lru_cache(maxsize=4)
def _jitted(config: ModelConfig) -> Callable[..., ModelOutputs]:
    return jax.jit(functools.partial(forward, config))


def check_logits(
    config: ModelConfig,
    params: Params,
    g_lm: jax.Array | None,
    tensors: Mapping[str, np.ndarray],
    where: object,
) -> LogitCheck:
    """Our model in float32 against the reference in float64.

    Args:
      params, g_lm: as read from a run folder.
      tensors: as read from the files of the transformers layout, or of a `.pth`.

    Raises:
      ConfigError: logits that are not finite.
    """
    exact = dataclasses.replace(
        config,
        dtype="float32",
        plga_precision="highest",
        attention_kernel="auto",
        unroll=False,
    )
    shape = (ROWS, min(TOKENS, config.context_length))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    ours = np.asarray(_jitted(exact)(params, tokens_BT, g_lm).logits)
    given = np.asarray(tensors[G_VALUES])[:, 2, 0] if G_VALUES in tensors else None
    if given is None and g_lm is not None:
        given = np.asarray(g_lm)[:, 0]
    theirs = np.stack([reference_logits(exact, tensors, row, given) for row in tokens_BT])
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ConfigError(f"{where}: its logits are not finite; the weights are broken")
    return LogitCheck(
        float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        tokens_BT.size,
        float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    )
