"""`train.py`: trains a model as a config says."""

from pathlib import Path

from pldr_jax.cli.common import keep_compiled_programs, run
from pldr_jax.flags import Option, load_config, parse_args

DESCRIPTION = (
    "Trains a PLDR-LLM. Without --gin_file it is the small default run, a few minutes on a laptop."
)
OPTIONS = (
    Option(
        "run_dir",
        "run folder; default: runs/ and the name of the last gin file, or runs/nano",
        metavar="DIR",
    ),
    Option(
        "resume",
        "auto continues the run in the folder; never refuses to; required refuses to start anew",
        default="auto",
        choices=("auto", "never", "required"),
    ),
)


def train_main(argv: list[str]) -> None:
    """Parses the command line, binds the config and trains."""
    options = parse_args(argv, "train.py", DESCRIPTION, OPTIONS)
    config = load_config(options.gin_files, options.overrides)
    name = Path(options.gin_files[-1]).stem if options.gin_files else "nano"
    keep_compiled_programs(config.data.cache_dir)
    # After the flags: --help and a typo answer at once, without waiting for JAX.
    from pldr_jax.training.loop import train

    train(config, options.run_dir or Path("runs") / name, options.resume)


def main() -> None:
    """Entry point."""
    run(train_main)
