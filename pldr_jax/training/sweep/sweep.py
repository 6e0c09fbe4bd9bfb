"""Sweeps: many runs of one config that differ in a few values, each a process of its own.

A sweep folder holds a folder for each run, named by what varies, then `sweep.csv`, `phase.png` and
`curves.png`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.load import describe_differences, load_stored
from pldr_jax.runs.curves import write_comparison
from pldr_jax.terminal import print_line
from pldr_jax.training.finetune.begin import model_of
from pldr_jax.training.progress import SweepProgress
from pldr_jax.training.signals import stop_on_signals
from pldr_jax.training.sweep import critical_line
from pldr_jax.training.sweep.critical import Line, lines_of, most_runs, needed, searches
from pldr_jax.training.sweep.critical_line import runs_made
from pldr_jax.training.sweep.phase import write_phase_diagram
from pldr_jax.training.sweep.points import SweepRun, label, runs_of, share
from pldr_jax.training.sweep.runs import Outcome, execute, outcome
from pldr_jax.training.sweep.settings import Command, CriticalConfig, SweepConfig
from pldr_jax.training.sweep.table import table_text, write_table

_COMPARED = ("Model", "Loss", "Optimizer", "Lora", "Data", "Training", "Task")
_CONFIG = "config.gin"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What became of a sweep, or of a job's share of it.

    Attributes:
      outcomes: of all runs, also those of other jobs.
      failures: name -> reason, of the runs that failed here.
      started: runs of this job.
      signal_name: what stopped it; None where nothing has.
    """

    outcomes: Sequence[Outcome]
    failures: Mapping[str, str]
    started: int
    signal_name: str | None


def list_runs(sweep: SweepConfig, folder: Path, command: Command = Command()) -> list[Outcome]:  # noqa: B008
    """How the runs of a sweep stand; nothing is run.

    Raises:
      ConfigError: a field or value that cannot be, two runs that are the same, or a folder that
        holds a run of another config.
    """
    base = _base(command, folder)
    runs = runs_of(sweep, folder, lambda point: command.config(point, base))
    _check_same_configs(runs, command)
    return [outcome(run) for run in runs]


def run_sweep(sweep: SweepConfig, folder: Path, command: Command = Command()) -> SweepResult:  # noqa: B008
    """Runs a sweep, or a job's share of it, and writes what all its runs have come to.

    Raises:
      ConfigError: what is asked for cannot be done; nothing has been run.
    """
    runs = [one.run for one in list_runs(sweep, folder, command)]
    chosen = runs if sweep.sweep_index is None else share(runs, sweep.sweep_index)
    finished = sum(outcome(run).status == "finished" for run in chosen)
    print_line(f"sweep of {len(chosen)} runs in {folder}, {finished} of them finished before")

    def arguments(run: SweepRun) -> list[str]:
        return command.arguments(run.overrides, run.folder)

    with stop_on_signals() as stop, SweepProgress(len(chosen)) as progress:
        failures = execute(chosen, arguments, progress, stop)
    outcomes = [outcome(run) for run in runs]
    _report(folder, outcomes)
    return SweepResult(outcomes, failures, len(chosen), stop.signal_name)


def open_search(
    config: CriticalConfig,
    folder: Path,
    command: Command = Command(),  # noqa: B008
) -> list[Line]:
    """The lines of a search for critical values; nothing is run.

    Raises:
      ConfigError: a field or value that cannot be, or a folder that holds a run of another config.
    """
    lines = lines_of(config, folder, command, _base(command, folder))
    _check_same_configs([run for line in lines for row in line.runs for run in row], command)
    return lines


def list_search(lines: Sequence[Line], config: CriticalConfig) -> list[Outcome]:
    """How the runs of a search stand: those that there are, and the next one of each line."""
    states = searches(lines, config.critical_below)
    following = [state.following.name for state in states if state.following is not None]
    runs = [run for line in lines for row in line.runs for run in row]
    return [outcome(run) for run in runs if run.folder.exists() or run.name in following]


def run_search(
    config: CriticalConfig,
    folder: Path,
    command: Command = Command(),  # noqa: B008
) -> SweepResult:
    """Searches for critical values, and writes what all runs have come to.

    Raises:
      ConfigError: what is asked for cannot be done; nothing has been run.
    """
    lines, threshold = open_search(config, folder, command), config.critical_below
    count = sum(map(runs_made, searches(lines, threshold)))
    everything = sum(len(line.runs) * len(line.runs[0]) for line in lines)
    print_line(
        f"search in {folder}: up to {most_runs(lines)} of the {everything} runs of the grid, "
        f"{count} of them finished before"
    )
    started: list[SweepRun] = []

    def counted() -> Iterator[SweepRun]:
        for run in needed(lines, threshold):
            started.append(run)
            yield run

    def arguments(run: SweepRun) -> list[str]:
        return command.arguments(run.overrides, run.folder)

    with stop_on_signals() as stop, SweepProgress(most_runs(lines) - count) as progress:
        failures = execute(counted(), arguments, progress, stop)
    states, outcomes = searches(lines, threshold), list_search(lines, config)
    folder.mkdir(parents=True, exist_ok=True)
    print_line(critical_line.table_text(lines, states, threshold))
    print_line(f"{sum(map(runs_made, states))} runs; the grid with every seed has {everything}")
    key = str(config.critical).partition("=")[0]
    print_line(f"line: {critical_line.write_table(folder, lines, states, threshold)}")
    print_line(f"figure: {critical_line.write_figure(folder, key, lines, states, threshold)}")
    print_line(f"runs: {write_table(folder, outcomes)}")
    return SweepResult(outcomes, failures, len(started), stop.signal_name)


def _base(command: Command, folder: Path) -> ExperimentConfig | None:
    """What fine-tuning begins with: the model of the checkpoint, or that of a run that has begun
    with it, where the checkpoint is gone.
    """
    if command.init_from is None:
        return None
    if not Path(command.init_from).is_dir():
        for path in sorted(folder.glob(f"*/{_CONFIG}")):
            return ExperimentConfig(model=load_stored(path).model)
    return ExperimentConfig(model=model_of(command.init_from))


def _check_same_configs(runs: Sequence[SweepRun], command: Command) -> None:
    """Refuses folders whose runs have another config: a table would compare what differs in more
    than its columns.
    """
    for run in runs:
        path = run.folder / _CONFIG
        if not path.is_file():
            continue
        saved = load_stored(path)
        data = run.config.data  # what it leaves open, the run has chosen
        if data.packing == "packed" and data.max_segments is None:
            data = dataclasses.replace(data, max_segments=saved.data.max_segments)
        if command.init_from is not None and data.tokenizer is None:
            data = dataclasses.replace(data, tokenizer=saved.data.tokenizer)
        task, lora = run.config.task, run.config.lora
        if not task.labels:
            task = dataclasses.replace(task, kind=saved.task.kind, labels=saved.task.labels)
        if lora.rank:
            names = ("base", "base_step", "base_digest")
            lora = dataclasses.replace(lora, **{name: getattr(saved.lora, name) for name in names})
        planned = dataclasses.replace(run.config, data=data, task=task, lora=lora)
        if changed := describe_differences(saved, planned, _COMPARED):
            raise ConfigError(
                f"{run.folder}: holds a run of another config ({'; '.join(changed)}); take the old "
                "values or another --run_dir"
            )


def _report(folder: Path, outcomes: Sequence[Outcome]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print_line(table_text(outcomes))
    print_line(f"table: {write_table(folder, outcomes)}")
    diagram = write_phase_diagram(folder, outcomes)
    print_line(
        f"phase diagram: {diagram}"
        if diagram
        else "no phase diagram: neither Optimizer.learning_rate nor Optimizer.warmup_steps varies"
    )
    if curves := write_comparison(folder, {_legend(one.run): one.run.folder for one in outcomes}):
        print_line(f"curves: {curves}")


def _legend(run: SweepRun) -> str:
    """What varies, without fields that are not set."""
    keys = list(run.settings)
    named = {label(key, keys): run.settings[key] for key in keys}
    return ", ".join(f"{name} = {value}" for name, value in named.items() if value is not None)
