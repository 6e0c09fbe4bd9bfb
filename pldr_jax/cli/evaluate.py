"""`pldr-eval`: a checkpoint on tasks of lm-evaluation-harness."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr_jax.bucket import Bucket, bucket_url
from pldr_jax.cli.common import STEP, keep_compiled_programs, run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.cli.training.tasks import open_tasks
from pldr_jax.config import CALIBRATION_ROWS, ConfigError
from pldr_jax.config.load import load_config
from pldr_jax.files import TOKENIZER, write_whole
from pldr_jax.inference.given.modes import SCORE_MODES
from pldr_jax.terminal import LiveBar

if TYPE_CHECKING:
    from pldr_jax.api import LanguageModel

DESCRIPTION = (
    "Scores a checkpoint on tasks of lm-evaluation-harness, with G_LM of the whole text (full), "
    "of the context alone (causal) or of no text (frozen)."
)
OPTIONS = (
    Option(
        "run",
        "run folder, folder in the transformers layout, or OWNER/NAME[@REVISION] of the hub",
        metavar="RUN",
        place=True,
    ),
    Option(
        "tasks",
        "comma-separated: names of the harness, pldr_quiz, pldr_text, pldr_zero_shot, or YAML "
        "files with local data",
        required=True,
        metavar="LIST",
    ),
    Option("output", "folder for results.json and results.md", required=True, metavar="DIR"),
    Option(
        "mode",
        "comma-separated: full, causal, frozen; default: full,causal, or frozen where G_LM is not "
        "learned",
        metavar="MODES",
    ),
    Option("g_file", "npz or safetensors file holding G_LM, for frozen", metavar="FILE"),
    Option(
        "g_text", "text file, folder or glob; frozen takes the mean G_LM over it", metavar="PATH"
    ),
    STEP,
    Option("rows", "texts side by side; no result depends on it", type=int, default=8, metavar="N"),
    Option("limit", "examples of each task; default: all", type=int, metavar="N"),
    Option("num_fewshot", "examples in the context; default: the task's", type=int, metavar="N"),
    Option(
        "overlap",
        "tokens of context of the windows after the first, in perplexity tasks",
        type=int,
        default=1,
        metavar="N",
    ),
)
RESULTS, TABLE = "results.json", "results.md"


def evaluate_main(argv: list[str]) -> None:
    """Parses the command line, evaluates, writes both files and prints the table."""
    options = parse_args(argv, "pldr-eval", DESCRIPTION, OPTIONS, ("Mesh", "Data.cache_dir"))
    config = load_config(options.gin_files, options.overrides)
    modes = _modes(options)
    output, url = Path(options.output), bucket_url(options.output)
    there = Bucket(url, "--output").objects() if url else [p.name for p in output.glob("*")]
    for name in (RESULTS, TABLE):
        if name in there:
            raise ConfigError(f"--output={output}: already holds {name}; name another folder")
    if options.rows < 1:
        raise ConfigError(f"--rows={options.rows}: must be at least 1")
    from pldr_jax.runs.hub import find_checkpoint

    source = find_checkpoint(options.run)
    if not source.folder.is_dir():
        raise ConfigError(f"{options.run!r}: no such folder; give a run folder")
    tasks = open_tasks(options.tasks, options.limit, options.num_fewshot)
    keep_compiled_programs(config.data.cache_dir)
    import jax

    from pldr_jax.api import load
    from pldr_jax.evaluation.report import results_json, results_table
    from pldr_jax.evaluation.scorer import TextScorer

    lm = load(source.folder, options.step, mesh=config.mesh if jax.device_count() > 1 else None)
    learned = lm.config.g_source == "learned"
    modes = modes or (["full", "causal"] if learned else ["frozen"])
    given = _given_g_lm(options, lm, source.folder) if "frozen" in modes else None
    # On stderr; the harness's own bars are caught.
    bars = {mode: LiveBar(f"{mode}: texts", 0) for mode in modes}
    scorers = {
        mode: TextScorer(
            lm,
            mode,
            options.rows,
            given if mode == "frozen" else None,
            options.overlap,
            functools.partial(_count, bars[mode]),
        )
        for mode in modes
    }
    results = {}
    for mode, scorer in scorers.items():
        with bars[mode], bars[mode].waiting("computing (compiled the first time)"):
            results[mode] = tasks.evaluate(scorer)
    head = {
        "checkpoint": str(options.run),
        **source.origin,
        "step": options.step,
        "tasks": options.tasks,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "overlap": options.overlap,
    }
    table = results_table(results)
    files = {RESULTS: results_json(head, results).encode(), TABLE: table.encode()}
    print(table, end="")
    _write(options.output, files)
    print(f"results: {url or output}/{RESULTS}")


def _write(output: str, files: dict[str, bytes]) -> None:
    """Writes files into a folder, or one of a bucket; ConfigError where that fails."""
    try:
        if url := bucket_url(output):
            bucket = Bucket(url, "--output")
            for name, content in files.items():
                bucket.write(name, content)
            return
        Path(output).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(Path(output) / name, content)
    except (OSError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--output={output}: cannot be written to ({reason}); the table is on stdout"
        ) from None


def _count(bar: LiveBar, done: int, total: int) -> None:
    """Texts of the current kind of requests."""
    bar.show("", done, total)


def _modes(options: Options) -> list[Any]:
    modes = [mode.strip() for mode in (options.mode or "").split(",") if mode.strip()]
    for i, mode in enumerate(modes):
        if mode not in SCORE_MODES or mode in modes[:i]:
            raise ConfigError(
                f"--mode={options.mode}: {mode!r} must be one of {', '.join(SCORE_MODES)}, each "
                "once"
            )
    for name in ("g_file", "g_text"):
        if getattr(options, name) is not None and "frozen" not in modes:
            raise ConfigError(f"--{name}: is G_LM of the mode frozen; add --mode=frozen")
    if options.g_file is not None and options.g_text is not None:
        raise ConfigError("--g_text: cannot be given together with --g_file; choose one")
    return modes


def _given_g_lm(options: Options, lm: "LanguageModel", folder: Path) -> Any:
    """G_LM of `--g_file`, or the mean over the rows of `--g_text`; None is the checkpoint's own."""
    if options.g_file is not None:
        from pldr_jax.model.deductive import read_g_lm

        return read_g_lm(options.g_file, lm.config, "--g_file")
    if options.g_text is None:
        return None
    from pldr_jax.config import DataConfig
    from pldr_jax.data.mixture import open_training_text
    from pldr_jax.data.rows import join_rows
    from pldr_jax.training.freeze.calibrate import calibrate, check_learned, some_rows

    check_learned(lm.config, options.run)
    data = DataConfig(source=options.g_text, tokenizer=str(folder / TOKENIZER))
    text = open_training_text(data, lm.config.vocab_size)
    rows = join_rows(text.rows("train", lm.config.context_length, data))
    some = some_rows(rows, CALIBRATION_ROWS)
    return calibrate(lm.config, lm.params, some).g_lm


def main() -> None:
    """Entry point."""
    run(evaluate_main)
