"""The table of a sweep: one row a run, as `sweep.csv` and on the screen."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pldr_jax.files import write_whole
from pldr_jax.training.sweep.points import label
from pldr_jax.training.sweep.runs import Outcome

FILE_NAME = "sweep.csv"
METRICS = (
    "eval/loss",
    "eval/loss_frozen_g",
    "eval/causal_gap",
    "eval/loss_prefix_g",
    "eval/prefix_gap",
    "eval/order_parameter/G_LM",
    "eval/rmse_over_std/G_LM",
    "eval/bits_per_byte",
    "eval/accuracy",
)
"""Columns of `sweep.csv`: the last evaluation, whose step is a column too."""
_SHOWN = {
    "held-out loss": ("eval/loss", ".4f"),
    "causal gap": ("eval/causal_gap", "+.5f"),
    "order par. G_LM": ("eval/order_parameter/G_LM", ".1e"),
    "RMSE/std": ("eval/rmse_over_std/G_LM", ".1e"),
}


def write_table(folder: Path, outcomes: Sequence[Outcome]) -> Path:
    """Writes `sweep.csv`, all at once: run, status, what varies, metrics, error; its path."""
    keys = list(outcomes[0].run.settings)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "status", *keys, "step", *METRICS, "error"])
    for one in outcomes:
        values = [one.evaluation.get(name) for name in ("step", *METRICS)]
        settings = [one.run.settings[key] for key in keys]
        row = [one.run.name, one.status, *settings, *values, one.error]
        writer.writerow(["" if value is None else value for value in row])
    path = folder / FILE_NAME
    write_whole(path, text.getvalue().encode())  # jobs of an array may meet here
    return path


def table_text(outcomes: Sequence[Outcome]) -> str:
    """The same as text, with fewer metrics."""
    keys = list(outcomes[0].run.settings)
    table = Table(box=SIMPLE_HEAD)
    for key in keys:
        table.add_column(label(key, keys), justify="right", overflow="fold")
    table.add_column("status")
    for name in _SHOWN:
        table.add_column(name, justify="right")
    for one in outcomes:
        settings = [str(one.run.settings[key]) for key in keys]
        at = one.evaluation.get("step")
        status = one.status if one.status == "finished" or at is None else f"{one.status}, at {at}"
        shown = [_number(one.evaluation.get(metric), form) for metric, form in _SHOWN.values()]
        table.add_row(*settings, status, *shown)
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(table, markup=False)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "-"
