"""`train.py --plan`: what a run needs and how fast it could be, without starting it."""

from pldr_jax.cli.options import Option, Options
from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.training.plan.chips import CHIPS

OPTIONS = (
    Option(
        "plan",
        "allocate and train nothing, but print parameters, memory and FLOPs of the run, and refuse "
        "what --chip has no room for",
        type=bool,
    ),
    Option(
        "chip",
        "of --plan: the accelerator that MFU is predicted for",
        choices=tuple(CHIPS),
    ),
    Option(
        "devices",
        "of --plan: accelerators in all; default: what the Mesh.* sizes make, -1 taken for 1",
        type=int,
        metavar="N",
    ),
)


def check(options: Options) -> None:
    """Refuses options of a plan without --plan, and a number of devices below 1."""
    if not options.plan:
        for name in ("chip", "devices"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name}: needs --plan")
    if options.devices is not None and options.devices < 1:
        raise ConfigError(f"--devices={options.devices}: must be at least 1")


def plan(options: Options, config: ExperimentConfig) -> None:
    """Prints the plan of `config`.

    The text is opened, and made ready where it is not, only where `Data.max_segments` follows from
    it.

    Raises:
      ConfigError: the mesh or batch cannot be, or there is no room for it.
    """
    import jax

    from pldr_jax.runs.curves import summary_table
    from pldr_jax.terminal import print_line
    from pldr_jax.training.plan import compile as plans

    chip = CHIPS[options.chip] if options.chip is not None else None
    size = plans.mesh_size(config.mesh, options.devices)
    # Before the backend starts; nothing is ever put on these devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", size)
    mesh, compiler = plans.plan_mesh(config.mesh, size, chip)
    if config.data.packing == "packed" and config.data.max_segments is None:
        from pldr_jax.data.mixture import open_training_text
        from pldr_jax.data.segment_count import with_segment_count
        from pldr_jax.model.flops import row_flops

        text = open_training_text(config.data, config.model.vocab_size)
        config = with_segment_count(config, text, row_flops(config.model), print_line)
    made = plans.make_plan(config, mesh, compiler)
    predicts = chip is not None and config.model.dtype == "bfloat16"
    prediction = plans.predict(config, made, chip) if chip is not None and predicts else None
    print(summary_table(plans.plan_lines(config, made, chip, prediction)))
    if chip is not None:
        plans.check_fits(made, chip)
