"""What the programs share: options, one-line errors, the compilation cache."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from pldr_jax.cli.options import Option, Options
from pldr_jax.config import ConfigError, ExperimentConfig, UnavailableError
from pldr_jax.config.annotations import LONGEST_LINE, shorten
from pldr_jax.terminal import one_line, print_line

if TYPE_CHECKING:
    from pldr_jax.api import LanguageModel

USAGE, FAILURE = 2, 1

CHECKPOINT = Option(
    "checkpoint",
    "run folder, folder with config.json and model.safetensors, one of these in a bucket (gs://, "
    "s3://), or OWNER/NAME[@REVISION] of the hub",
    required=True,
    metavar="DIR",
)
STEP = Option(
    "step",
    "checkpoint of a run folder; default: the newest complete one",
    type=int,
    metavar="STEP",
)


def run(program: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a program; an error that its user can mend is one line on stderr and a non-zero exit
    status.

    Args:
      program: takes its arguments.
      argv: the arguments; None takes those of this process.
    """
    try:
        program(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        _exit(error, FAILURE if isinstance(error, UnavailableError) else USAGE)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of stdout has seen enough
        raise SystemExit(FAILURE) from None
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _exit(f"{place}{error.strerror or error}", FAILURE)
    except MemoryError:
        _exit("there is too little memory", FAILURE)
    except RuntimeError as error:
        if (known := _known(error)) is None:
            raise
        _exit(known, FAILURE)


def _known(error: RuntimeError) -> str | None:
    """What to say of an error that is no fault of the program; None of one that may be."""
    text = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" in text:
        return f"the device has too little memory: {text}"
    if "Unable to initialize backend" in text:
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {text}"
    # Imported only now: --help and a typo must not wait for JAX.
    from pldr_jax.data.shards.records import DataError
    from pldr_jax.runs.checkpoint import CheckpointError
    from pldr_jax.runs.metrics import MetricsError
    from pldr_jax.training.loop import TrainingError

    ours = isinstance(error, (CheckpointError, DataError, MetricsError, TrainingError))
    return str(error) if ours else None


def _exit(error: object, status: int) -> NoReturn:
    print_line(f"error: {shorten(one_line(str(error)), LONGEST_LINE)}", to_stderr=True)
    raise SystemExit(status)


def open_model(options: Options, config: ExperimentConfig) -> "LanguageModel":
    """The checkpoint that the options name, on the devices that there are."""
    import jax

    from pldr_jax.api import load

    settings = config.generation
    dtype = None if settings.cache_dtype == "auto" else settings.cache_dtype
    mesh = config.mesh if jax.device_count() > 1 else None
    budget, weights = settings.rank_budget, settings.weights
    return load(options.checkpoint, options.step, dtype, mesh, budget, weights=weights)


def keep_compiled_programs(cache_dir: str | None) -> None:
    """Keeps XLA's compiled programs beside the tokenised text, so that the next start of the same
    run is quick.
    """
    from pldr_jax.files import cache_folder
    from pldr_jax.runs.compiled import keep_programs

    with contextlib.suppress(ConfigError):  # there is no home folder: every start compiles
        keep_programs(cache_folder(cache_dir) / "xla")
