"""`train.py`: trains a model as a config says, or several models that differ in a few values."""

from pathlib import Path

from pldr_jax.bucket import bucket_url
from pldr_jax.cli.common import keep_compiled_programs, run
from pldr_jax.cli.options import Option, Options, parse_args
from pldr_jax.cli.training import plan as planning
from pldr_jax.cli.training import sweep as sweeping
from pldr_jax.cli.training.tasks import task_metrics
from pldr_jax.config import ConfigError
from pldr_jax.config.load import load_run

DESCRIPTION = (
    "Trains a PLDR-LLM. Without --gin_file and --init_from it begins with the values of nano.gin, "
    "the small default run, a few minutes on a laptop; else with the defaults below."
)
OPTIONS = (
    Option(
        "run_dir",
        "run folder, or gs://... or s3://...; default: runs/ and the name of the last gin file, or "
        "runs/nano; of a sweep or search, the folder of its runs, with _sweep or _critical behind "
        "that name",
        metavar="DIR",
    ),
    Option(
        "resume",
        "auto continues the run in the folder; never refuses to; required refuses to start anew",
        default="auto",
        choices=("auto", "never", "required"),
    ),
    Option("profile", "write a trace of COUNT steps from STEP on", metavar="STEP:COUNT"),
    Option(
        "coordinator",
        "HOST:PORT of process 0 in a run of several processes; TPU pods, Slurm and Open MPI need "
        "none of these three",
        metavar="HOST:PORT",
    ),
    Option("processes", "number of processes", type=int, metavar="N"),
    Option("process_index", "of this process, from 0", type=int, metavar="I"),
    Option(
        "init_from",
        "fine-tuning: run folder or transformers layout whose model, weights and tokenizer the run "
        "begins with; a run that goes on does not read it again",
        metavar="DIR",
    ),
    Option(
        "eval_tasks",
        "tasks of lm-evaluation-harness to run at each evaluation, comma-separated, as for "
        "pldr-eval; metrics eval/tasks/...",
        metavar="LIST",
    ),
    Option(
        "eval_tasks_limit", "examples of each of these tasks; default: all", type=int, metavar="N"
    ),
)


def train_main(argv: list[str]) -> None:
    """Parses the command line, binds the config and trains."""
    options = parse_args(
        argv, "train.py", DESCRIPTION, (*OPTIONS, *sweeping.OPTIONS, *planning.OPTIONS)
    )
    name = Path(options.gin_files[-1]).stem if options.gin_files else "nano"
    planning.check(options)
    several = options.sweep or options.critical is not None
    if several and options.plan:
        flag = "--sweep" if options.sweep else "--critical"
        raise ConfigError(f"--plan: plans one run; leave out {flag}")
    if several:
        if bucket_url(options.run_dir or ""):
            raise ConfigError(f"--run_dir={options.run_dir}: several runs need a local folder")
        folder = Path(
            options.run_dir or Path("runs") / f"{name}_{'sweep' if options.sweep else 'critical'}"
        )
        sweeping.sweep(options, folder, _forwarded(options))
        return
    sweeping.check(options)
    if options.eval_tasks_limit is not None and options.eval_tasks is None:
        raise ConfigError("--eval_tasks_limit: limits tasks; name them with --eval_tasks")
    if options.init_from is None:
        config = load_run(options.gin_files, options.overrides)
        keep_compiled_programs(config.data.cache_dir)
        if options.plan:
            planning.plan(options, config)
            return
    # After the flags: --help and a typo answer at once, without waiting for JAX.
    from pldr_jax.hosts import join

    join(options.coordinator, options.processes, options.process_index)
    from pldr_jax.runs.remote.place import open_run
    from pldr_jax.training.loop import train

    with open_run(options.run_dir or Path("runs") / name) as place:
        initial, measure = None, None
        if options.init_from is not None:
            from pldr_jax.training.finetune.begin import start_from

            config, initial = start_from(
                options.init_from,
                place.folder,
                options.gin_files,
                options.overrides,
                on_mesh=not options.plan,
            )
            keep_compiled_programs(config.data.cache_dir)
            if options.plan:
                planning.plan(options, config)
                return
        if options.eval_tasks is not None:
            measure = task_metrics(
                options.eval_tasks, options.eval_tasks_limit, config.data.batch_size
            )
        train(config, place, options.resume, options.profile, initial, measure)


def _forwarded(options: Options) -> list[str]:
    """The options of this program that each run of a sweep gets as well."""
    given = {option.name: getattr(options, option.name) for option in OPTIONS}
    return [
        f"--{option.name}" if option.type is bool else f"--{option.name}={given[option.name]}"
        for option in OPTIONS
        if option.name not in ("run_dir", "init_from") and given[option.name] != option.default
    ]


def main() -> None:
    """Entry point."""
    run(train_main)


if __name__ == "__main__":
    from pldr_jax.cli.scripts import train

    train()
