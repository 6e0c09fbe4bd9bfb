"""`pldr-convert`: checkpoints of others to run folders, and run folders to the transformers
layout.
"""

from pldr_jax.cli.common import run
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import ConfigError

IMPORT, EXPORT = "import", "export"
_OUT = Option("output", "folder to write; must not exist, or be empty", metavar="OUT", place=True)
_STEP = Option(
    "step", "checkpoint of the run; default: the newest complete one", type=int, metavar="STEP"
)
OPTIONS = {
    IMPORT: (
        Option(
            "path", "folder with config.json and weights, or a .pth", metavar="PATH", place=True
        ),
        _OUT,
        Option(
            "tokenizer", "SentencePiece model; default: tokenizer.model of PATH", metavar="FILE"
        ),
    ),
    EXPORT: (
        Option("run", "run folder", metavar="RUN", place=True),
        _OUT,
        _STEP,
        Option("license", "SPDX identifier for the weights", default="unknown", metavar="ID"),
        Option("data_license", "licence of the training text", default="unknown", metavar="TEXT"),
    ),
}
DESCRIPTIONS = {
    IMPORT: "Makes a run folder of a checkpoint in the transformers layout, or of a native .pth; "
    "for a .pth, --gin_file and --gin.Model.* say what its tensors do not.",
    EXPORT: "Writes a checkpoint in the transformers layout, with tokenizer and model card.",
}


def convert_main(argv: list[str]) -> None:
    """Parses the command line and converts."""
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what in ("-h", "--help"):
        print("usage: pldr-convert import PATH OUT | pldr-convert export RUN OUT; each has --help")
        return
    if what not in OPTIONS:
        raise ConfigError(f"{what!r}: must be 'import PATH OUT' or 'export RUN OUT'")
    options = parse_args(rest, f"pldr-convert {what}", DESCRIPTIONS[what], OPTIONS[what])
    if what == EXPORT and (options.gin_files or options.overrides):
        raise ConfigError("--gin: an export is what the run folder holds; leave it out")
    from pldr_jax.interop.card import Licences
    from pldr_jax.interop.convert import export_run, import_checkpoint

    if what == IMPORT:
        import_checkpoint(
            options.path, options.output, options.tokenizer, options.gin_files, options.overrides
        )
        return
    licences = Licences(options.license, options.data_license)
    export_run(options.run, options.output, options.step, licences)


def main() -> None:
    """Entry point."""
    run(convert_main)
