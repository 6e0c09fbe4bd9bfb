"""`pldr-freeze`: a checkpoint with one G_LM in place of the PLGA network."""

from pldr_jax.cli.common import CHECKPOINT, keep_compiled_programs, run
from pldr_jax.cli.options import Option, flags_of, parse_args, settings_of
from pldr_jax.config.load import load_config
from pldr_jax.training.freeze.settings import FreezeConfig

DESCRIPTION = (
    "Replaces the PLGA network of a trained PLDR-LLM by one G_LM, and certifies what it changes. "
    "Config fields set here replace the run's."
)
OPTIONS = (
    CHECKPOINT,
    Option("output", "folder of the frozen checkpoint", required=True, metavar="DIR"),
    *flags_of(FreezeConfig),
)


FIELDS = ("Data", "Mesh", "Training.eval_rows")
"""Config fields that this program reads: those of the text, and where it runs."""


def freeze_main(argv: list[str]) -> None:
    """Parses the command line and freezes."""
    options = parse_args(argv, "pldr-freeze", DESCRIPTION, OPTIONS, FIELDS)
    settings = settings_of(FreezeConfig, options)
    keep_compiled_programs(load_config(options.gin_files, options.overrides).data.cache_dir)
    from pldr_jax.training.freeze.freeze import freeze

    freeze(options.checkpoint, options.output, settings, options.gin_files, options.overrides)


def main() -> None:
    """Runs the program with the arguments of this process."""
    run(freeze_main)
