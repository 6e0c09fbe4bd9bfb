"""PLDR-LLM in JAX: language models with power law graph attention.

import pldr_jax
lm = pldr_jax.load("runs/nano")
print(lm.generate(["def "], max_new_tokens=64)[0].text)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("pldr_jax")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
__all__ = [
    "ConfigError",
    "Generation",
    "Intervention",
    "LanguageModel",
    "SamplingConfig",
    "load",
]

_PLACES = {
    "ConfigError": "config",
    "Generation": "inference.request",
    "Intervention": "inference.intervention",
    "LanguageModel": "api",
    "SamplingConfig": "config",
    "load": "api",
}

if TYPE_CHECKING:
    from pldr_jax.api import LanguageModel, load
    from pldr_jax.config import ConfigError, SamplingConfig
    from pldr_jax.inference.intervention import Intervention
    from pldr_jax.inference.request import Generation


def __getattr__(name: str) -> Any:
    # Imported on first use: `import pldr_jax` alone must not start an accelerator.
    if name in _PLACES:
        return getattr(import_module(f"pldr_jax.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'pldr_jax' has no attribute {name!r}")
