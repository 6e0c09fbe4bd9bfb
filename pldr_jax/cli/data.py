"""`pldr-data`: prepares text for training, trains tokenizers, shows what prepared text holds."""

from typing import Any

from pldr_jax.cli.common import run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.config import SEED_LIMIT, ConfigError
from pldr_jax.files import user_path, write_whole
from pldr_jax.terminal import print_line

PROGRAM = "pldr-data"
COMMANDS = {
    "build": "tokenise text into shards that train.py reads",
    "tokenizer": "train a SentencePiece tokenizer on a sample of text, or measure one",
    "inspect": "show what prepared text, or one shard of it, holds",
}
FLAGS = {
    "Data.tokenizer_sample_bytes": "--sample_bytes",
    "Data.tokenizer": "--tokenizer",
    "Data.chat_template": "--chat_template",
    "Data.source": "--input",
    "Model.vocab_size": "--vocab_size",
}
"""Config field -> the flag that takes its place here."""
INPUT_OPTIONS = (
    Option(
        "input",
        "text, JSONL, Parquet or Arrow file (text and JSONL also .gz, .bz2, .xz, .zst), folder, "
        "glob, hf:NAME[:CONFIG[:SPLIT]], or stdlib for Python's own sources",
        required=True,
        repeat=True,
        metavar="PATH",
    ),
    Option(
        "chat_template",
        "Jinja file with which JSON lines of messages are written; default: the template beside "
        "the tokenizer, or ours",
        metavar="PATH",
    ),
    Option("text_field", "field or column with the text", default="text", metavar="NAME"),
    Option(
        "documents",
        "what one document of a text file is; paragraphs are parted by empty lines, and a block is "
        "a file, or some 64 KiB of one above 256 KiB",
        default="file",
        choices=("file", "line", "paragraph", "block"),
    ),
    Option(
        "on_error",
        "bad UTF-8, broken lines, empty and huge documents: counted and left out, or an error",
        default="skip",
        choices=("skip", "fail"),
    ),
    Option(
        "max_document_bytes",
        "larger documents are errors",
        type=int,
        default=64 << 20,
        metavar="BYTES",
    ),
    Option(
        "validation_fraction",
        "share of the documents held out for evaluation, chosen by a hash of their text",
        type=float,
        default=0.05,
        metavar="X",
    ),
    Option(
        "test_fraction", "another share, held out from all", type=float, default=0.0, metavar="X"
    ),
    Option("seed", "of the hash that chooses them", type=int, default=0, metavar="SEED"),
)
BUILD_OPTIONS = (
    *INPUT_OPTIONS,
    Option("output", "folder to make", required=True, metavar="DIR"),
    Option("tokenizer", "SentencePiece model file", required=True, metavar="PATH"),
    Option("workers", "processes; default: as many as the text is worth", type=int, metavar="N"),
    Option(
        "shard_bytes", "input that becomes one shard", type=int, default=64 << 20, metavar="BYTES"
    ),
)
TOKENIZER_OPTIONS = (
    *INPUT_OPTIONS,
    Option("output", "SentencePiece model file to write", metavar="PATH"),
    Option("tokenizer", "only measure this model file; trains none", metavar="PATH"),
    Option("vocab_size", "pieces", type=int, default=32000, metavar="V"),
    Option(
        "coverage",
        "share of the characters that get a piece",
        type=float,
        default=0.9995,
        metavar="X",
    ),
    Option("no_byte_fallback", "what has no piece is unknown, not spelled in bytes", type=bool),
    Option("joined_digits", "pieces may hold several digits", type=bool),
    Option("space_pieces", "pieces may be spaces only, which shortens code", type=bool),
    Option(
        "special",
        "further special piece, such as [SEP]; ids from 4, after [PAD] [UNK] [START] [END]",
        repeat=True,
        metavar="PIECE",
    ),
    Option("sample_bytes", "text to train on", type=int, default=10_000_000, metavar="BYTES"),
)
INSPECT_OPTIONS = (
    Option("path", "folder, manifest or shard", required=True, metavar="PATH"),
    Option("samples", "documents to decode of each split", type=int, default=3, metavar="N"),
    Option("seed", "of the choice of samples", type=int, default=0, metavar="SEED"),
)


def data_main(argv: list[str]) -> None:
    """Runs the command that the first argument names."""
    commands = {"build": _build, "tokenizer": _tokenizer, "inspect": _inspect}
    if argv and argv[0] in commands:
        try:
            commands[argv[0]](argv[1:])
        except ConfigError as error:  # the library names config fields, whose place the flags take
            message = str(error)
            for field, flag in FLAGS.items():
                message = message.replace(f"{field} = ", f"{flag}=").replace(field, flag)
            raise ConfigError(message) from None
        return
    listed = "\n".join(f"  {name:<11}{doc}" for name, doc in COMMANDS.items())
    if argv and argv[0] in ("--help", "-h"):
        print(f"usage: {PROGRAM} COMMAND [options]\n\n{listed}\n\n{PROGRAM} COMMAND --help")
        return
    got = f"{argv[0]!r} is no command" if argv else "no command was given"
    raise ConfigError(f"{PROGRAM}: {got}; the commands are {', '.join(COMMANDS)}")


def _parse(argv: list[str], command: str, options: tuple[Option, ...]) -> Options:
    program = f"{PROGRAM} {command}"
    return parse_args(argv, program, f"{PROGRAM}: {COMMANDS[command]}.", options, fields=())


def _at_least(options: Options, low: float, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < low:
            raise ConfigError(f"--{name}={getattr(options, name)}: must be at least {low}")


def _unit_settings(options: Options, pieces: Any, tokenizer: Any) -> Any:
    from pldr_jax.data.shards.units import UnitSettings
    from pldr_jax.data.text.readers import ReadSettings, with_chat

    _at_least(options, 0, "validation_fraction", "test_fraction", "seed")
    _at_least(options, 1, "max_document_bytes")
    if options.seed > SEED_LIMIT:
        raise ConfigError(f"--seed={options.seed}: must be at most {SEED_LIMIT}")
    if options.validation_fraction + options.test_fraction >= 1:
        raise ConfigError("--validation_fraction, --test_fraction: leave nothing to train on")
    read = ReadSettings(options.text_field, options.documents, options.max_document_bytes)
    return UnitSettings(
        with_chat(read, pieces, options.chat_template, options.tokenizer, tokenizer),
        options.validation_fraction,
        options.test_fraction,
        options.seed,
        options.on_error,
    )


def _build(argv: list[str]) -> None:
    from pldr_jax.data.shards.build import BuildSettings, build
    from pldr_jax.data.shards.units import describe_problems
    from pldr_jax.data.text.inputs import find_inputs
    from pldr_jax.data.text.tokenizer import Tokenizer

    options = _parse(argv, "build", BUILD_OPTIONS)
    _at_least(options, 1, "workers", "shard_bytes")
    tokenizer, pieces = Tokenizer.load(options.tokenizer), find_inputs(options.input)
    units = _unit_settings(options, pieces, tokenizer)
    settings = BuildSettings(units, options.shard_bytes, options.workers)
    output = user_path(options.output, "--output")
    manifest = build(
        pieces,
        tokenizer,
        output,
        settings,
        lambda line: print_line(line, to_stderr=True),
    )
    for split in manifest.splits:
        counts = (manifest.count(split, f"n_{what}") for what in ("documents", "tokens", "bytes"))
        print("{}: {:,} documents, {:,} tokens, {:,} bytes".format(split, *counts))
    for line in describe_problems(manifest.problems, manifest.examples):
        print(line)
    print(
        f"train on it with --gin.Data.source={manifest.folder} "
        f"--gin.Model.vocab_size={manifest.vocab_size}"
        f"{'' if manifest.chat_template is None else ' --gin.Data.packing=document'}"
    )


def _tokenizer(argv: list[str]) -> None:
    from pldr_jax.data.shards.build import BuildSettings
    from pldr_jax.data.shards.units import describe_problems
    from pldr_jax.data.text.inputs import find_inputs
    from pldr_jax.data.text.tokenizer import Tokenizer
    from pldr_jax.data.text.vocabulary import measure_tokenizer, take_sample

    options = _parse(argv, "tokenizer", TOKENIZER_OPTIONS)
    _at_least(options, 1000, "sample_bytes")
    if (options.output is None) == (options.tokenizer is None):
        raise ConfigError("--output: name the file to write, or a --tokenizer to measure instead")
    loaded = None if options.tokenizer is None else Tokenizer.load(options.tokenizer)
    pieces = find_inputs(options.input)
    settings = _unit_settings(options, pieces, loaded)
    units = BuildSettings(settings).plan(pieces)
    sample = take_sample(units, settings, options.sample_bytes)
    tokenizer = loaded or Tokenizer.train(
        sample.training,
        options.vocab_size,
        allow_whitespace_only_pieces=options.space_pieces,
        character_coverage=options.coverage,
        byte_fallback=not options.no_byte_fallback,
        split_digits=not options.joined_digits,
        control_symbols=options.special,
    )
    if loaded is None:
        _save(options.output, tokenizer.model_bytes)
        trained_on = sum(len(text.encode()) for text in sample.training)
        print(f"trained on {trained_on:,} bytes, written to {options.output}")
    for line in describe_problems(sample.problems.counts, sample.problems.examples):
        print(line)
    if not sample.held_out:
        print("no held-out text to measure on: raise --validation_fraction or --sample_bytes")
        return
    print("\n".join(measure_tokenizer(tokenizer, sample.held_out).lines()))


def _save(path: str, content: bytes) -> None:
    file = user_path(path, "--output")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)
    except OSError as error:
        raise ConfigError(f"--output={path}: cannot be written ({error.strerror})") from None


def _inspect(argv: list[str]) -> None:
    from pldr_jax.data.shards.inspect import describe, open_shards

    options = _parse(argv, "inspect", INSPECT_OPTIONS)
    _at_least(options, 0, "samples")
    manifest, names = open_shards(options.path)
    for line in describe(manifest, names, options.samples, options.seed):
        print(line)


def main() -> None:
    """Entry point."""
    run(data_main)
