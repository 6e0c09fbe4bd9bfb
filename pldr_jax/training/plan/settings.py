"""What a plan is made for; imported before JAX is."""

import dataclasses

from pldr_jax.config.fields import FlagGroup, field
from pldr_jax.training.plan.chips import ChipName

MOST_DEVICES = 2**16


@dataclasses.dataclass(frozen=True)
class PlanConfig(FlagGroup):
    """The accelerators of a planned run."""

    chip: ChipName | None = field(None, "of --plan: the accelerator that MFU is predicted for")
    devices: int | None = field(
        None,
        "of --plan: accelerators in all; default: what the Mesh.* sizes make, -1 taken for 1",
        low=1,
        high=MOST_DEVICES,
        metavar="N",
    )
