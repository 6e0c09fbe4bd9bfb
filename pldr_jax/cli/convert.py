"""`pldr-convert`: checkpoints of others to run folders, run folders to the transformers layout and
to the hub, and pickled G_LM to NPZ.
"""

from pathlib import Path

from pldr_jax.cli.common import run
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config import ConfigError
from pldr_jax.terminal import print_line

IMPORT, EXPORT, MERGE, PUSH, G_LM = "import", "export", "merge", "push", "g_lm"
_USAGE = (
    "'import PATH OUT', 'export RUN OUT', 'merge RUN OUT', 'push RUN REPO' or 'g_lm PICKLE OUT'"
)
_OUT = Option("output", "folder to write; must not exist, or be empty", metavar="OUT", place=True)
_STEP = Option(
    "step", "checkpoint of the run; default: the newest complete one", type=int, metavar="STEP"
)
_RUN = Option("run", "run folder", metavar="RUN", place=True)
_CARD = (
    _STEP,
    Option("license", "SPDX identifier for the weights", default="unknown", metavar="ID"),
    Option("data_license", "licence of the training text", default="unknown", metavar="TEXT"),
    Option(
        "code_repository",
        "of the hub, with the code by which transformers opens the export; default: one of the "
        "authors'",
        metavar="REPO",
    ),
)
OPTIONS = {
    IMPORT: (
        Option(
            "path",
            "folder with config.json and weights, OWNER/NAME[@REVISION] of the hub, a .pth, or "
            "adapters in PEFT's layout",
            metavar="PATH",
            place=True,
        ),
        _OUT,
        Option("base", "checkpoint that the adapters belong to", metavar="DIR"),
        Option(
            "tokenizer", "SentencePiece model; default: tokenizer.model of PATH", metavar="FILE"
        ),
    ),
    EXPORT: (
        _RUN,
        _OUT,
        Option(
            "adapter",
            "of a run with Lora.rank, the adapters alone, in PEFT's layout; default: the model "
            "with them merged",
            type=bool,
        ),
        *_CARD,
    ),
    PUSH: (
        _RUN,
        Option("repository", "OWNER/NAME; made where there is none", metavar="REPO", place=True),
        *_CARD,
        Option("private", "a new repository is seen by its owner alone", type=bool),
    ),
    MERGE: (Option("run", "run folder of adapters", metavar="RUN", place=True), _OUT, _STEP),
    G_LM: (
        Option("path", "pickle of tensors in lists", metavar="PICKLE", place=True),
        Option("output", "NPZ file to write; must not exist", metavar="OUT", place=True),
    ),
}
DESCRIPTIONS = {
    IMPORT: "Makes a run folder of a checkpoint in the transformers layout, or of a native .pth; "
    "for a .pth, --gin_file and --gin.Model.* say what its tensors do not.",
    EXPORT: "Writes a checkpoint in the transformers layout, with tokenizer and model card.",
    MERGE: "Makes a run folder of a run with Lora.rank: a model like any other, with the adapters "
    "added to its weights.",
    PUSH: "Exports a checkpoint and uploads it, with its model card, to a repository of the hub.",
    G_LM: "Writes G_LM of a pickle, as the native code keeps it, to an NPZ file that Model.g_file "
    "and --g_file take. Nothing that is pickled is executed.",
}


def convert_main(argv: list[str]) -> None:
    """Parses the command line and converts."""
    what, rest = (argv[0], argv[1:]) if argv else ("", [])
    if what in ("-h", "--help"):
        listed = "".join(f"\n\n  {name}\n    {DESCRIPTIONS[name]}" for name in OPTIONS)
        print_line(f"usage: pldr-convert COMMAND\n\n{_USAGE}; each has --help{listed}")
        return
    if what not in OPTIONS:
        raise ConfigError(f"{what!r}: must be {_USAGE}")
    fields = ("Model",) if what == IMPORT else ()
    if not fields and any(argument.startswith("--gin") for argument in rest):
        raise ConfigError("--gin: is for an import; leave it out")
    options = parse_args(rest, f"pldr-convert {what}", DESCRIPTIONS[what], OPTIONS[what], fields)
    from pldr_jax.interop.card import Licences
    from pldr_jax.interop.config_json import CODE_REPOSITORY
    from pldr_jax.interop.convert import convert_g_lm, export_run, import_checkpoint
    from pldr_jax.interop.peft import export_adapter, import_adapter, is_adapter, merge_run

    if what == MERGE:
        merge_run(options.run, options.output, options.step)
        return
    if what == EXPORT and options.adapter:
        export_adapter(options.run, options.output, options.step)
        return
    if what == IMPORT and is_adapter(options.path) and options.base is None:
        raise ConfigError("--base: name the checkpoint that the adapters belong to")
    if what == IMPORT and options.base is not None:
        import_adapter(options.path, options.base, options.output)
        return
    if what == IMPORT:
        import_checkpoint(
            options.path, options.output, options.tokenizer, options.gin_files, options.overrides
        )
        return
    if what == G_LM:
        convert_g_lm(options.path, options.output)
        return
    licences = Licences(options.license, options.data_license)
    code = options.code_repository or CODE_REPOSITORY

    def write(output: str | Path) -> None:
        export_run(options.run, output, options.step, licences, code_repository=code)

    if what == EXPORT:
        write(options.output)
        return
    from pldr_jax.runs.hub import push

    push(write, options.repository, options.private)


def main() -> None:
    """Entry point."""
    run(convert_main)
