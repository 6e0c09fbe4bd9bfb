"""`train.py --sweep` and `--critical`: the runs of a sweep, one after the other or as a job of an
array, and those that a search for critical values needs.
"""

from collections.abc import Sequence
from pathlib import Path

from pldr_jax.cli.common import FAILURE
from pldr_jax.cli.options import Option, Options, flags_of, settings_of
from pldr_jax.config import ConfigError
from pldr_jax.terminal import print_line
from pldr_jax.training.sweep.settings import Command, CriticalConfig, SweepConfig

OPTIONS = (
    *flags_of(SweepConfig),
    *flags_of(CriticalConfig),
    Option("sweep_list", "print the runs and how they stand, and run nothing", type=bool),
)
_SIGNALS = {"SIGINT": 130, "SIGTERM": 143}


def check(options: Options) -> tuple[SweepConfig, CriticalConfig]:
    """What the options ask for.

    Raises:
      ConfigError: an option that cannot be, or that needs --sweep or --critical.
    """
    if options.sweep_list and not options.sweep and options.critical is None:
        raise ConfigError("--sweep_list: needs --sweep Group.field=A,B or --critical")
    if options.sweep and options.critical is not None:
        raise ConfigError("--critical: chooses its runs itself; give other fields by --over")
    return settings_of(SweepConfig, options), settings_of(CriticalConfig, options)


def sweep(options: Options, folder: Path, flags: Sequence[str]) -> None:
    """Runs or lists a sweep, or a search for critical values.

    Args:
      options: the command line.
      folder: of the runs.
      flags: other flags of `train.py` for each run.

    Raises:
      ConfigError: what is asked for cannot be done; nothing has been run.
      SystemExit: status 1 where a run failed; 130 or 143 after a signal.
    """
    settings, critical = check(options)
    command = Command(options.gin_files, options.overrides, options.init_from, flags)
    from pldr_jax.training.sweep import sweep as made

    if options.sweep_list:
        if settings.sweep:
            outcomes = made.list_runs(settings, folder, command)
        else:
            outcomes = made.list_search(made.open_search(critical, folder, command), critical)
        for number, one in enumerate(outcomes):
            print_line(f"{number}  {one.status:<10}  {one.run.name}")
        return
    if settings.sweep:
        result = made.run_sweep(settings, folder, command)
    else:
        result = made.run_search(critical, folder, command)
    for name, reason in result.failures.items():
        print_line(f"failed: {name}: {reason}", to_stderr=True)
    if failed := len(result.failures):
        print_line(
            f"error: {failed} of {result.started} runs failed; the same command tries them again",
            to_stderr=True,
        )
    if result.signal_name is not None:
        print_line(f"{result.signal_name}: stopped; the same command continues", to_stderr=True)
        raise SystemExit(_SIGNALS[result.signal_name])
    if failed:
        raise SystemExit(FAILURE)
