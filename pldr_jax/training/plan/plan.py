"""What a run needs and how fast it could be, without starting it."""

import math
from collections.abc import Callable

import jax

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.segment_count import with_segment_count
from pldr_jax.model.counts.flops import row_flops
from pldr_jax.model.deductive import predefined_g_lm
from pldr_jax.model.lora import count_adapter_params
from pldr_jax.terminal import print_line, summary_table
from pldr_jax.training.plan.chips import CHIPS, USABLE, Chip
from pldr_jax.training.plan.compile import REMEDY, Plan, make_plan, mesh_size, plan_mesh
from pldr_jax.training.plan.predict import Prediction, predict
from pldr_jax.training.plan.settings import PlanConfig


def plan_run(
    config: ExperimentConfig,
    settings: PlanConfig,
    weights_given: bool = False,
    log: Callable[[str], None] = print_line,
) -> Plan:
    """Prints and returns the plan of a run.

    The text is opened, and made ready where it is not, only where `Data.max_segments` follows from
    it. To be called before JAX has a backend: it is given simulated devices.

    Args:
      weights_given: whether the run begins with a checkpoint, which holds a predefined G_LM.
      log: takes the table.

    Raises:
      ConfigError: what training refuses, or there is no room for it.
    """
    chip = CHIPS[settings.chip] if settings.chip is not None else None
    size = mesh_size(config.mesh, settings.devices)
    # Before the backend starts; nothing is ever put on these devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", size)
    mesh, compiler = plan_mesh(config.mesh, size, chip)
    if config.data.packing == "packed" and config.data.max_segments is None:
        text = open_training_text(config.data, config.model.vocab_size)
        config = with_segment_count(config, text, row_flops(config.model), log)
    if config.model.g_source == "external" and not weights_given:
        predefined_g_lm(config.model)  # says what is wrong with Model.g_file
    plan = make_plan(config, mesh, compiler)
    predicts = chip is not None and config.model.dtype == "bfloat16"
    prediction = predict(config, plan, chip) if chip is not None and predicts else None
    log(summary_table(plan_lines(config, plan, chip, prediction)))
    if chip is not None:
        check_fits(plan, chip)
    return plan


def check_fits(plan: Plan, chip: Chip) -> None:
    """Refuses what a chip has no room for.

    Raises:
      ConfigError: naming what is needed, what there is, and remedies.
    """
    limit = USABLE * chip.memory
    if plan.bytes > limit:
        raise ConfigError(
            f"Mesh = {tuple(plan.mesh.values())}: does not fit {chip.name}: "
            f"{gigabytes(plan.bytes)} a chip (state {gigabytes(plan.state_bytes)}, "
            f"step {gigabytes(plan.step_bytes)}, evaluation {gigabytes(plan.evaluation_bytes)}, "
            f"sample {gigabytes(plan.sample_bytes)}) of {gigabytes(limit)}; {REMEDY}"
        )


def plan_lines(
    config: ExperimentConfig, plan: Plan, chip: Chip | None, prediction: Prediction | None
) -> dict[str, str]:
    """The plan as rows of a table of two columns."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    rows, segments = config.data.batch_size, config.data.segments_per_row
    side_by_side = f", {segments} documents in each at most" if segments > 1 else ""
    parts = config.training.grad_accumulation
    in_parts = f", in {parts} microbatches" if parts > 1 else ""
    adapters = ""
    if config.lora.rank:
        adapters = f", and {count_adapter_params(config.model, config.lora):,} in adapters"
    lines = {
        "parameters": f"{plan.parameters:,}{adapters}",
        "mesh": f"{mesh} = {math.prod(plan.mesh.values())} devices",
        "batch": f"{rows} rows of {config.model.context_length} tokens, {rows // shards} a device"
        f"{in_parts}{side_by_side}",
        "compiled by": plan.compiler,
        "state": f"{gigabytes(plan.state_bytes)} a device: parameters and optimiser",
        "step": f"{gigabytes(plan.step_bytes)} a device: activations and temporaries",
        "evaluation": f"{gigabytes(plan.evaluation_bytes)} a device, in place of the step's",
        "sample": f"{gigabytes(plan.sample_bytes)} a device, in place of the step's: weights as "
        "decode steps read them, cache and temporaries",
        "saved": f"{gigabytes(plan.saved_bytes)} a device: activations that the forward pass keeps "
        "for the backward pass, before the compiler saves on them",
        "together": f"{gigabytes(plan.bytes)} a device: the state, and the largest of step, "
        "evaluation and sample; a checkpoint is restored into the state's own places",
        "FLOPs": f"{plan.model_flops:.3e} a step, {plan.model_flops / plan.tokens:.3e} a token; "
        f"{plan.device_flops:.3e} a device, with what is computed twice",
    }
    if chip is None:
        return lines
    lines["chip"] = (
        f"{chip.name}: {chip.flops / 1e12:.0f} TFLOP/s bfloat16, {chip.bandwidth / 1e12:.2f} TB/s, "
        f"{gigabytes(USABLE * chip.memory)} of {gigabytes(chip.memory)} to use"
    )
    if prediction is None:
        lines["predicted MFU"] = "only for Model.dtype = 'bfloat16'"
        return lines
    p = prediction
    seconds = p.compute + p.memory + p.links, max(p.compute, p.memory, p.links)
    lines["seconds a step"] = (
        f"products {p.compute:.3f}, memory {p.memory:.3f}, links {p.links:.3f}, at stated rates"
    )
    lines["predicted MFU"] = f"{p.low:.0%} if nothing overlaps, {p.high:.0%} if everything does"
    lines["predicted speed"] = " to ".join(f"{plan.tokens / s:,.0f}" for s in seconds) + " tokens/s"
    return lines


def gigabytes(count: float) -> str:
    """`1.32 GB`, of 10^9 bytes."""
    return f"{count / 1e9:.2f} GB"
