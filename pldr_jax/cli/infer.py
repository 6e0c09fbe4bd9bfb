"""`infer.py`: generates text from a checkpoint, for one prompt or a file of them."""

import os
import sys
from typing import TYPE_CHECKING, Any

from pldr_jax.cli.common import CHECKPOINT, FAILURE, STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import load_config
from pldr_jax.inference.jobs import JsonlWriter, count_prompts, read_prompts
from pldr_jax.inference.progress import JobProgress

if TYPE_CHECKING:
    from pldr_jax.inference.batch import Output

DESCRIPTION = "Generates text with a trained PLDR-LLM; its config is read from the checkpoint."
OPTIONS = (
    CHECKPOINT,
    STEP,
    Option("prompt", "text to continue", repeat=True, metavar="TEXT"),
    Option(
        "prompt_file",
        "prompts, one a line: text, or JSONL with prompt or tokens and settings of its own; - is "
        "stdin",
        metavar="PATH",
    ),
    Option("output", "JSONL file for the results; default: stdout", metavar="PATH"),
    Option("resume", "continue the output of a job that was stopped", type=bool),
    Option("logprobs", "add the log-probability of each new token to JSONL", type=bool),
    Option("format", "of stdout", choices=("text", "jsonl"), default="text"),
    Option(
        "stream",
        "print each text as it grows, as lines of [id] piece; a single --prompt always is",
        type=bool,
    ),
    Option("stop", "string that ends a text, which is cut before it", repeat=True, metavar="TEXT"),
    Option(
        "truncate",
        "same as --gin.Generation.truncate; left keeps the end of a prompt that is too long",
        metavar="HOW",
    ),
    Option("max_new_tokens", "same as --gin.Generation.max_new_tokens", type=int, metavar="N"),
    Option(
        "temperature", "same as --gin.Generation.temperature; 0 is greedy", type=float, metavar="T"
    ),
    Option("top_k", "same as --gin.Generation.top_k", type=int, metavar="K"),
    Option("top_p", "same as --gin.Generation.top_p", type=float, metavar="P"),
    Option("min_p", "same as --gin.Generation.min_p", type=float, metavar="P"),
    Option(
        "repetition_penalty",
        "same as --gin.Generation.repetition_penalty",
        type=float,
        metavar="X",
    ),
    Option("seed", "same as --gin.Generation.seed", type=int, metavar="SEED"),
    Option("rows", "same as --gin.Generation.rows", type=int, metavar="N"),
)
SHORTHANDS = (
    "truncate",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "rows",
)


def infer_main(argv: list[str]) -> None:
    """Parses the command line, loads the checkpoint and continues every prompt.

    Raises:
      SystemExit: status 1 if a prompt failed; the others are written all the same.
    """
    if "--freeze_g" in argv:
        raise ConfigError("--freeze_g: is the program pldr-freeze now, with the same options")
    options = parse_args(argv, "infer.py", DESCRIPTION, OPTIONS)
    shorthands = [
        f"Generation.{name}={getattr(options, name)}"
        for name in SHORTHANDS
        if getattr(options, name) is not None
    ]
    config = load_config(options.gin_files, [*options.overrides, *shorthands])
    _check(options)
    try:
        _infer(options, config)
    except BrokenPipeError:  # the reader of stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILURE) from None
    except OSError as error:
        name = error.filename or options.output or options.prompt_file or "stdout"
        print(f"error: {name}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(FAILURE) from None


def _check(options: Options) -> None:
    if not options.prompt and options.prompt_file is None:
        raise ConfigError('--prompt: none was given; add --prompt "..." or --prompt_file PATH')
    if options.prompt and options.prompt_file is not None:
        raise ConfigError("--prompt_file: cannot be given together with --prompt; choose one")
    if options.resume and options.output is None:
        raise ConfigError("--resume: needs the --output that is to be continued")
    if options.stream and options.format == "jsonl" and options.output is None:
        raise ConfigError("--stream: prints text; give --output PATH, or leave --format at text")
    if options.logprobs and options.format == "text" and options.output is None:
        raise ConfigError("--logprobs: are written as JSONL; add --output PATH or --format=jsonl")
    if "" in options.stop:
        raise ConfigError("--stop: must not be an empty string")


def _infer(options: Options, config: ExperimentConfig) -> None:
    settings = config.generation
    # What can be wrong with files is said before the checkpoint is loaded.
    jobs = read_prompts(options.prompt, options.prompt_file)
    total = count_prompts(options.prompt_file) if options.prompt_file else len(options.prompt)
    writer = JsonlWriter(options.output, options.resume) if options.output is not None else None
    try:
        keep_compiled_programs(config.data.cache_dir)
        import jax

        from pldr_jax.api import load
        from pldr_jax.inference.batch import run_batch

        dtype = None if settings.cache_dtype == "auto" else settings.cache_dtype
        mesh = config.mesh if jax.device_count() > 1 else None
        lm = load(options.checkpoint, options.step, dtype, mesh, settings.rank_budget)
        output = _output(options, writer, total)
        with output.progress:
            run_batch(lm, jobs, settings, output, options.stop, total)
    finally:
        if writer is not None:
            writer.close()
    print(output.progress.summary(), file=sys.stderr)
    if writer is not None and writer.failed:
        print(f"{writer.failed} of the earlier results are failures", file=sys.stderr)
    if output.progress.failures or (writer is not None and writer.failed):
        raise SystemExit(FAILURE)


def _output(options: Options, writer: JsonlWriter | None, total: int | None) -> "Output":
    from pldr_jax.inference.batch import Output

    plain = writer is None and options.format == "text"
    single = plain and len(options.prompt) == 1 and not options.stream
    settings: dict[str, Any] = {
        "writer": writer,
        "json": options.format == "jsonl",
        "logprobs": options.logprobs,
        "stream": "text" if single else "pieces" if options.stream else None,
    }
    # A bar and texts would overwrite each other on one terminal.
    to_stdout = writer is None or options.stream
    progress = JobProgress(
        total,
        len(writer.done) if writer is not None else 0,
        enabled=not single,
        terminal=sys.stderr.isatty() and not (to_stdout and sys.stdout.isatty()),
    )
    return Output(progress=progress, **settings)


def main() -> None:
    """Entry point."""
    run(infer_main)
