"""How a checkpoint is frozen; imported before JAX is."""

import dataclasses
from typing import Literal

from pldr_jax.config import CALIBRATION_ROWS
from pldr_jax.config.fields import FlagGroup, field


@dataclasses.dataclass(frozen=True)
class FreezeConfig(FlagGroup):
    """What G_LM is calibrated on, and what its certificate measures."""

    step: int | None = field(
        None, "checkpoint of a run folder; default: the newest complete one", metavar="STEP"
    )
    text: str | None = field(
        None,
        "text file, folder or glob, cut in two by documents to calibrate and to evaluate on; "
        "default: the run's held-out text",
        path=True,
        metavar="PATH",
    )
    rows: int = field(CALIBRATION_ROWS, "rows that G_LM is calibrated on", low=1, metavar="ROWS")
    eval_rows: int | None = field(
        None,
        "other rows that the certificate measures; default: Training.eval_rows; 0 takes all",
        low=0,
        metavar="ROWS",
    )
    calibration: Literal["mean", "first"] = field(
        "mean", "mean of G_LM over the rows, or that of the first"
    )
    kl_threshold: float = field(
        0.01, "nats a token above which a warning says that this is another model", low=0,
        metavar="X",
    )  # fmt: skip
    save_g: str | None = field(
        None,
        "also write the calibrated G_LM alone, as NPZ, which Model.g_file and Generation.g_file "
        "read",
        path=True,
        metavar="FILE",
    )
    rank_budget: tuple[float, ...] = field(
        (),
        "also certify decoding with keys cached in fewer numbers, at this relative error of G_LM",
        low=0,
        high=1,
        metavar="X",
    )
