"""`pldr-serve`: a checkpoint behind HTTP."""

from pathlib import Path

from pldr_jax.cli.common import STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, flags_of, parse_args, settings_of
from pldr_jax.config import ConfigError
from pldr_jax.config.load import load_config
from pldr_jax.serve.settings import ServeConfig

DESCRIPTION = (
    "Serves a trained PLDR-LLM to every client of OpenAI's API, and a page to look at. Needs the "
    "extra: pip install 'pldr_jax[serve]'."
)
OPTIONS = (
    Option(
        "run", "run folder, or folder with config.json and model.safetensors", metavar="RUN",
        place=True,
    ),
    STEP,
    *flags_of(ServeConfig),
)  # fmt: skip
_DECODING = ("g_mode", "g_file", "cache_dtype", "weights", "rank_budget", "prefix_cache_mb")
FIELDS = (*(f"Generation.{name}" for name in _DECODING), "Mesh", "Data.cache_dir")
"""Config fields that this program reads: the others are the checkpoint's, or a request's."""


def serve_main(argv: list[str]) -> None:
    """Parses the command line, loads the checkpoint and serves it until SIGTERM."""
    options = parse_args(argv, "pldr-serve", DESCRIPTION, OPTIONS, FIELDS)
    settings = settings_of(ServeConfig, options)
    config = load_config(options.gin_files, options.overrides)
    try:
        from pldr_jax.serve.server import Server, bind, read_keys
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pldr_jax"):
            raise
        raise ConfigError(f"pldr-serve needs {error.name}: pip install 'pldr_jax[serve]'") from None
    # What can be wrong with flags is said before the checkpoint is loaded.
    read_keys(settings.api_key_file)
    listener = bind(settings)
    keep_compiled_programs(config.data.cache_dir)
    import jax

    from pldr_jax.api import load

    generation = config.generation
    dtype = None if generation.cache_dtype == "auto" else generation.cache_dtype
    mesh = config.mesh if jax.device_count() > 1 else None
    budget, weights = generation.rank_budget, generation.weights
    lm = load(options.run, options.step, dtype, mesh, budget, weights=weights)
    name = settings.model_name or Path(options.run).resolve().name
    Server(lm, name, settings, generation, listener).run()


def main() -> None:
    """Entry point."""
    run(serve_main)
