"""Prints the value of `XLA_FLAGS` for a purpose on NVIDIA GPUs.

    export XLA_FLAGS="$(python -m pldr_jax.cli.xla_flags decode)"

XLA reads the variable once, when JAX starts. What it holds already stays, and comes first: a flag
that it names is not named again.
"""

import os

from pldr_jax.cli.common import run
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import ConfigError
from pldr_jax.terminal import print_line

PRESETS = {
    "decode": {
        "xla_gpu_enable_command_buffer": "+WHILE,+CONDITIONAL",
        "xla_gpu_graph_min_graph_size": "1",
    },
    "train": {"xla_gpu_enable_latency_hiding_scheduler": "true"},
    "deterministic": {"xla_gpu_deterministic_ops": "true"},
}
"""Purpose -> flags; docs/gpu.md says what they do."""


def with_presets(names: list[str], present: str) -> str:
    """The value of `XLA_FLAGS` with the flags of presets behind what it holds already.

    Raises:
      ConfigError: there is no such preset.
    """
    for name in names:
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r}: must be one of {', '.join(PRESETS)}")
    named = {flag.lstrip("-").partition("=")[0] for flag in present.split()}
    flags = {flag: value for name in names for flag, value in PRESETS[name].items()}
    more = [f"--{flag}={value}" for flag, value in flags.items() if flag not in named]
    return " ".join((*present.split(), *more))


def flags_main(argv: list[str]) -> None:
    """Parses the command line and prints the value."""
    assert __doc__ is not None
    preset = Option("preset", ", ".join(PRESETS), repeat=True, place=True)
    program, description = "python -m pldr_jax.cli.xla_flags", __doc__.splitlines()[0]
    options = parse_args(argv, program, description, (preset,), fields=())
    print_line(with_presets(options.preset, os.environ.get("XLA_FLAGS", "")))


if __name__ == "__main__":
    run(flags_main)
