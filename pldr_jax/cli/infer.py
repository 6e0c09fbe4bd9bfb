"""`infer.py`: generates text from a checkpoint, for one prompt or a file of them."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal

from pldr_jax.cli.common import CHECKPOINT, FAILURE, STEP, keep_compiled_programs, open_model, run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.config import ConfigError, ExperimentConfig, SamplingConfig
from pldr_jax.config.load import load_config
from pldr_jax.copies import growing_file, readable_path
from pldr_jax.inference.jobs import JsonlWriter, count_prompts, read_prompts
from pldr_jax.inference.progress import JobProgress
from pldr_jax.terminal import Display, is_terminal, print_line

if TYPE_CHECKING:
    from pldr_jax.inference.batch import Output

DESCRIPTION = "Generates text with a trained PLDR-LLM; its config is read from the checkpoint."


def _sampling_option(field: "dataclasses.Field[Any]") -> Option:
    """The flag of a field of `SamplingConfig`; a tuple's may be given several times."""
    several = {"stop": str, "stop_ids": int}
    kind = several.get(field.name, type(field.default))
    doc = f"{field.metadata['doc']}; same as --gin.Generation.{field.name}"
    return Option(field.name, doc, kind, repeat=field.name in several, metavar="X")


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
    Option("retry_failed", "as --resume, and try failed prompts again", type=bool),
    Option("chat", "talk to the model: a message a line of stdin; /new begins anew", type=bool),
    Option("system", "system message that a --chat begins with", metavar="TEXT"),
    Option("logprobs", "add the log-probability of each new token to JSONL", type=bool),
    Option("format", "of stdout", choices=("text", "jsonl"), default="text"),
    Option(
        "stream",
        "print each text as it grows, as lines of [id] piece; a single --prompt always is",
        type=bool,
    ),
    *map(_sampling_option, dataclasses.fields(SamplingConfig)),
    Option(
        "truncate",
        "same as --gin.Generation.truncate; left keeps the end of a prompt that is too long",
        metavar="HOW",
    ),
    Option("batch_size", "same as --gin.Generation.batch_size", type=int, metavar="N"),
)
SHORTHANDS = (*(one.name for one in dataclasses.fields(SamplingConfig)), "truncate", "batch_size")
FORMER = {
    "--rows": "is called --batch_size now",
    "--freeze_g": "is the program pldr-freeze now, with the same options",
}
FIELDS = ("Generation", "Mesh", "Data.cache_dir")
"""Config fields that this program reads; the others are the checkpoint's."""


def infer_main(argv: list[str]) -> None:
    """Parses the command line, loads the checkpoint and continues every prompt.

    Raises:
      SystemExit: status 1 if a prompt failed; the others are written all the same.
    """
    for argument in argv:
        if (flag := argument.partition("=")[0]) in FORMER:
            raise ConfigError(f"{flag}: {FORMER[flag]}")
    options = parse_args(argv, "infer.py", DESCRIPTION, OPTIONS, FIELDS)
    config = load_config(options.gin_files, options.overrides)
    given = {name: getattr(options, name) for name in SHORTHANDS}
    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    generation = dataclasses.replace(config.generation, **chosen)
    config = dataclasses.replace(config, generation=generation)
    if options.chat:
        from pldr_jax.cli.chat import chat

        chat(options, config)
        return
    _check(options)
    with growing_file(options.output, "--output") as output_file:
        _infer(options, config, output_file)


def _check(options: Options) -> None:
    options.resume = options.resume or options.retry_failed
    if options.system is not None:
        raise ConfigError("--system: begins a --chat; add that, or leave it out")
    if not options.prompt and options.prompt_file is None:
        raise ConfigError(
            '--prompt: none was given; add --prompt "...", --prompt_file PATH or --chat'
        )
    if options.prompt and options.prompt_file is not None:
        raise ConfigError("--prompt_file: cannot be given together with --prompt; choose one")
    if options.resume and options.output is None:
        raise ConfigError("--resume: needs the --output that is to be continued")
    if options.stream and options.format == "jsonl" and options.output is None:
        raise ConfigError("--stream: prints text; give --output PATH, or leave --format at text")
    if options.logprobs and options.format == "text" and options.output is None:
        raise ConfigError("--logprobs: are written as JSONL; add --output PATH or --format=jsonl")


def _infer(options: Options, config: ExperimentConfig, output_file: str | None) -> None:
    settings, source = config.generation, options.prompt_file
    # What can be wrong with files is said before the checkpoint is loaded.
    if source not in (None, "-"):
        source = str(readable_path(source, "--prompt_file"))
    lines = read_prompts(options.prompt, source)
    total = count_prompts(source) if source else len(options.prompt)
    writer = None
    if output_file is not None:
        writer = JsonlWriter(output_file, options.resume, options.retry_failed)
    try:
        keep_compiled_programs(config.data.cache_dir)
        from pldr_jax.inference.batch import run_batch

        lm = open_model(options, config)
        output = _output(options, writer, total)
        with output.progress:
            run_batch(lm, lines, settings, output, total)
    finally:
        if writer is not None:
            writer.close()
    print_line(output.progress.summary(), to_stderr=True)
    earlier = writer.failed if writer is not None else 0
    if earlier:
        message = f"{earlier} of the earlier results are failures; --retry_failed tries them again"
        print_line(message, to_stderr=True)
    if output.progress.failures or earlier:
        raise SystemExit(FAILURE)


def _output(options: Options, writer: JsonlWriter | None, total: int | None) -> "Output":
    from pldr_jax.inference.batch import Output

    plain = writer is None and options.format == "text"
    single = plain and len(options.prompt) == 1 and not options.stream
    stream: Literal["text", "pieces"] | None = "pieces" if options.stream else None
    # A bar and texts would overwrite each other on one terminal.
    to_stdout = writer is None or options.stream
    bar = not single and is_terminal(sys.stderr) and not (to_stdout and is_terminal(sys.stdout))
    display = Display(terminal=bar, interval=float("inf") if single else 10.0)
    progress = JobProgress(total, len(writer.done) if writer is not None else 0, display)
    as_json = options.format == "jsonl"
    return Output(progress, writer, as_json, options.logprobs, "text" if single else stream)


def main() -> None:
    """Entry point."""
    run(infer_main)
