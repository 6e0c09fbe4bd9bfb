"""`pldr-analyze`: a report on the deductive outputs of one checkpoint or several."""

from pldr_jax.cli.common import FAILURE, STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, parse_args
from pldr_jax.config.load import load_config
from pldr_jax.terminal import print_line

DESCRIPTION = (
    "Measures the deductive outputs A, A_LM, A_P and G_LM of trained models, and writes a report: "
    "report.html, report.json and figures. Several RUNs are measured alike and compared."
)
OPTIONS = (
    Option(
        "run",
        "run folder, or folder with config.json and model.safetensors; several are compared",
        metavar="RUN",
        place=True,
        repeat=True,
    ),
    Option(
        "prompts",
        "text, a document a line, or JSONL with prompt or text; default: the run's held-out text",
        metavar="FILE",
    ),
    Option("out", "folder of the report; default: RUN/analysis, of the first RUN", metavar="DIR"),
    Option("rows", "rows of text to measure on; 0 takes all", type=int, default=32, metavar="ROWS"),
    Option(
        "length", "tokens of a row; default: the context of the model", type=int, metavar="TOKENS"
    ),
    Option("batch_size", "rows at once; no result depends on it", type=int, default=8, metavar="N"),
    STEP,
    Option(
        "sections",
        "comma-separated: invariance, causality, structure, alteration, low_rank, "
        "row_map, symmetry, decoding, contract; default: all",
        metavar="LIST",
    ),
    Option(
        "other_g",
        "another G_LM to try in place of the model's: an NPZ or safetensors file, or another run",
        repeat=True,
        metavar="PATH",
    ),
    Option(
        "intervention",
        "change the deductive outputs: centroid, gain=X, text=FILE, joined by commas",
        metavar="LIST",
    ),
    Option("tensors", "also write tensors.npz; its G_LM is one for Model.g_file", type=bool),
    Option("float64", "also compute the deductive outputs in float64, in NumPy: slow", type=bool),
    Option(
        "over_checkpoints", "also measure every checkpoint that the run folder holds", type=bool
    ),
)


def analyze_main(argv: list[str]) -> None:
    """Parses the command line, and writes the report.

    Raises:
      SystemExit: status 1 if a section could not be measured; the report stands all the same.
    """
    options = parse_args(argv, "pldr-analyze", DESCRIPTION, OPTIONS, ("Mesh", "Data.cache_dir"))
    config = load_config(options.gin_files, options.overrides)
    keep_compiled_programs(config.data.cache_dir)

    from pldr_jax.analysis.report.analyze import ReportOptions, analyze

    report, runs = analyze(
        ReportOptions(
            runs=tuple(options.run),
            prompts=options.prompts,
            output=options.out,
            rows=options.rows,
            length=options.length,
            batch_size=options.batch_size,
            step=options.step,
            sections=options.sections,
            intervention=options.intervention,
            other_g=tuple(options.other_g),
            tensors=options.tensors,
            float64=options.float64,
            over_checkpoints=options.over_checkpoints,
            mesh=config.mesh,
        )
    )
    failed = False
    for measured in runs:
        for section in measured.sections:
            broken = "error" in section.numbers
            text = f"{measured.label}, {section.key}: {section.words[0]}"
            print_line(f"error: {text}" if broken else text, to_stderr=broken)
            failed |= broken
    print_line(f"report: {report}")
    if failed:
        raise SystemExit(FAILURE)


def main() -> None:
    """Entry point."""
    run(analyze_main)
