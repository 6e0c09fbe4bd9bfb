"""`train.py --sweep`: the runs of a sweep, one after the other or as a job of an array."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pldr_jax.training.sweep.runs as sweeps
from pldr_jax.cli.common import FAILURE
from pldr_jax.cli.options import Option, Options
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import config_to_dict, describe_differences, load_config, parse_values
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import StopRequest, stop_on_signals

OPTIONS = (
    Option(
        "sweep",
        "run every combination of the values given for some config fields, each in its own folder "
        "under --run_dir; a table, a phase diagram and curves at the end",
        repeat=True,
        metavar="Group.field=A,B,...",
    ),
    Option("sweep_zip", "take the first values together, then the second, and so on", type=bool),
    Option("sweep_seeds", "repeat each point with so many seeds", type=int, metavar="N"),
    Option(
        "sweep_index",
        "of a job array: only run I, from 0; or I/N, every Nth run from I on",
        metavar="I",
    ),
    Option("sweep_list", "print the runs and how they stand, and run nothing", type=bool),
)
_COMPARED = ("Model", "Loss", "Optimizer", "Data", "Training")
_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


def check(options: Options) -> None:
    """Refuses options of a sweep without --sweep, and --sweep_seeds below 1."""
    given = [o.name for o in OPTIONS[1:] if getattr(options, o.name) not in (None, False)]
    if given and not options.sweep:
        raise ConfigError(f"--{given[0]}: needs --sweep Group.field=A,B")
    if options.sweep_seeds is not None and options.sweep_seeds < 1:
        raise ConfigError(f"--sweep_seeds={options.sweep_seeds}: must be at least 1")


def plan_runs(options: Options, folder: Path) -> list[sweeps.SweepRun]:
    """The runs that the options ask for, with their configs.

    Raises:
      ConfigError: a field or value that cannot be, or two runs that are the same.
    """
    axes = [sweeps.Axis(*parse_values(text, "--sweep")) for text in options.sweep]
    keys = [axis.key for axis in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--sweep: {twice[0]} is given twice; give all its values in one")
    points = (sweeps.zipped if options.sweep_zip else sweeps.grid)(axes)
    if options.sweep_seeds is not None:
        first = _config(options, points[0])
        seeds = {key: _value(first, key) for key in sweeps.SEED_FIELDS}
        points = sweeps.repeated(points, seeds, options.sweep_seeds)
        keys.append("Training.seed")
    configs = [_config(options, point) for point in points]
    settings = [{key: _value(config, key) for key in keys} for config in configs]
    names = sweeps.run_names(settings)
    return [
        sweeps.SweepRun(name, folder / name, values, _overrides(point), config)
        for name, values, point, config in zip(names, settings, points, configs, strict=True)
    ]


def _overrides(point: Sequence[sweeps.Setting]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in point)


def _config(options: Options, point: Sequence[sweeps.Setting]) -> ExperimentConfig:
    return load_config(options.gin_files, [*options.overrides, *_overrides(point)])


def _value(config: ExperimentConfig, key: str) -> Any:
    group, _, field = key.partition(".")
    return config_to_dict(config)[group][field]


def check_same_configs(runs: Sequence[sweeps.SweepRun]) -> None:
    """Refuses folders whose runs have another config: a table would compare what differs in more
    than its columns.
    """
    for run in runs:
        path = run.folder / "config.gin"
        if not path.is_file():
            continue
        changed = describe_differences(load_config([path]), run.config, _COMPARED)
        if changed:
            raise ConfigError(
                f"{run.folder}: holds a run of another config ({'; '.join(changed)}); take the old "
                "values or another --run_dir"
            )


def sweep(options: Options, folder: Path, forwarded: Sequence[str]) -> None:
    """Runs a sweep, or a job's share of it, and reports what all its runs have come to.

    Args:
      options: the command line.
      folder: of the sweep.
      forwarded: other options for each run.

    Raises:
      ConfigError: what is asked for cannot be done; nothing has been run.
      SystemExit: status 1 where a run failed; 130 or 143 after a signal.
    """
    check(options)
    runs = plan_runs(options, folder)
    check_same_configs(runs)
    index = options.sweep_index
    chosen = runs if index is None else sweeps.share(runs, index)
    standing = [sweeps.outcome(run) for run in runs]
    if options.sweep_list:
        for number, one in enumerate(standing):
            print(f"{number}  {one.status:<10}  {one.run.name}")
        return
    finished = sum(sweeps.outcome(run).status == "finished" for run in chosen)
    print(f"sweep of {len(chosen)} runs in {folder}, {finished} of them finished before")
    flags = [*(f"--gin_file={path}" for path in options.gin_files), *forwarded]
    flags += [f"--gin.{override}" for override in options.overrides]

    def command(run: sweeps.SweepRun) -> list[str]:
        own = [f"--gin.{override}" for override in run.overrides]
        where = f"--run_dir={run.folder}"
        return [sys.executable, "-m", "pldr_jax.cli.train", *flags, *own, where]

    environment = sweeps.child_environment(Path(__file__).parents[2])
    with stop_on_signals() as stop, SweepProgress(len(chosen)) as progress:
        failures = sweeps.execute(chosen, command, environment, progress, stop)
    _report(folder, [sweeps.outcome(run) for run in runs])
    _end(failures, stop, len(chosen))


def _report(folder: Path, outcomes: Sequence[sweeps.Outcome]) -> None:
    from pldr_jax.runs.curves import write_comparison
    from pldr_jax.training.sweep.phase import write_phase_diagram
    from pldr_jax.training.sweep.table import table_text, write_table

    folder.mkdir(parents=True, exist_ok=True)
    print(table_text(outcomes))
    print(f"table: {write_table(folder, outcomes)}")
    diagram = write_phase_diagram(folder, outcomes)
    print(f"phase diagram: {diagram}" if diagram else "no phase diagram: neither "
          "Optimizer.learning_rate nor Optimizer.warmup_steps varies")  # fmt: skip
    compared = {_legend(one.run): one.run.folder for one in outcomes}
    if curves := write_comparison(folder, compared):
        print(f"curves: {curves}")


def _legend(run: sweeps.SweepRun) -> str:
    """What varies, without fields that are not set."""
    keys = list(run.settings)
    shown = {sweeps.label(key, keys): run.settings[key] for key in keys}
    return ", ".join(f"{name} = {value}" for name, value in shown.items() if value is not None)


def _end(failures: dict[str, str], stop: StopRequest, runs: int) -> None:
    """The failures, and the exit status."""
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if failures:
        print(
            f"error: {len(failures)} of {runs} runs failed; the same command tries them again",
            file=sys.stderr,
        )
    if stop.signal_name is not None:
        print(f"{stop.signal_name}: stopped; the same command continues", file=sys.stderr)
        raise SystemExit(_SIGNALS[stop.signal_name])
    if failures:
        raise SystemExit(FAILURE)
