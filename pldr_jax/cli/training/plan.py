"""`train.py --plan`: what a run needs and how fast it could be, without starting it."""

from pldr_jax.cli.options import Option, Options, flags_of, settings_of
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.training.plan.settings import PlanConfig

OPTIONS = (
    Option(
        "plan",
        "allocate and train nothing, but print parameters, memory and FLOPs of the run, and refuse "
        "what --chip has no room for",
        type=bool,
    ),
    *flags_of(PlanConfig),
)


def check(options: Options) -> PlanConfig:
    """What the options ask for.

    Raises:
      ConfigError: an option that cannot be, or that needs --plan.
    """
    for name in ("chip", "devices"):
        if not options.plan and getattr(options, name) is not None:
            raise ConfigError(f"--{name}: needs --plan")
    return settings_of(PlanConfig, options)


def plan(options: Options, config: ExperimentConfig) -> None:
    """Prints the plan of `config`.

    Raises:
      ConfigError: what training refuses, or there is no room for it.
    """
    settings = check(options)
    from pldr_jax.training.plan.plan import plan_run

    plan_run(config, settings, options.init_from is not None)
