"""What a run says of its steps and evaluations: metrics, progress, samples, curves."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import jax

from pldr_jax.config import ExperimentConfig
from pldr_jax.config.load import config_to_dict
from pldr_jax.runs.folder import append_sample
from pldr_jax.runs.metrics import MetricWriter
from pldr_jax.terminal import Display, summary_table
from pldr_jax.training.health import NONFINITE, Health
from pldr_jax.training.progress import Progress


class Record:
    """Of one run. A context manager; only the first process writes and prints.

    Args:
      config: of the run.
      run_dir: its folder.
      start: step that the run begins or goes on at.
      tokens_per_step: over all devices.

    Attributes:
      health: counts steps that went wrong.
    """

    def __init__(
        self, config: ExperimentConfig, run_dir: Path, start: int, tokens_per_step: int
    ) -> None:
        self._training, self._run_dir = config.training, run_dir
        self._enabled = jax.process_index() == 0
        self.health = Health(run_dir, self._training, self._enabled)
        self._writer = MetricWriter(
            run_dir,
            self._training.tensorboard,
            start,
            enabled=self._enabled,
            wandb_project=self._training.wandb_project,
            config=config_to_dict(config),
        )
        display = Display(enabled=self._enabled)
        self._progress = Progress(self._training.steps, start, tokens_per_step, display)
        self._curves: Path | None = None  # those of all that is written

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        self._writer.close()

    def print(self, text: str) -> None:
        """Prints lines, above the bar where there is one."""
        self._progress.print(text)

    def waiting(self, text: str, at_once: bool = False) -> AbstractContextManager[None]:
        """Shows what is waited for while the block runs, as `LiveBar.waiting`."""
        return self._progress.waiting(text, at_once)

    def step(self, step: int, metrics: Mapping[str, jax.Array], batch: int) -> str | None:
        """Writes and shows the metrics of a step; waits for the device.

        Args:
          batch: index of its batch in the stream of training data, from 0.

        Returns:
          What ends the run, if anything does, such as "train/loss = nan".
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = self.health.check(step, values, batch)
        training = self._training
        if step % training.log_every == 0 or step == training.steps or broken:
            self._writer.write(step, values | self.health.metrics())
            self._curves = None
        self._progress.update(step, values["train/loss"], values["train/learning_rate"])
        if not broken:
            return None
        cause = f"{broken[0]} = {values[broken[0]]}"
        if self.health.stops:
            return cause
        self.print(
            f"step {step}: {cause}; the update of batch {batch} is left out (noted in "
            f"{self._run_dir / NONFINITE})"
        )
        return None

    def evaluation(self, step: int, evaluation: Mapping[str, float], sample: str) -> None:
        """Writes and shows an evaluation and the text that the model has generated, if any."""
        self._writer.write(step, evaluation)
        self.print(report(step, evaluation, self._training.gap_threshold))
        if sample:
            self.print(sample)
        if not self._enabled:
            return
        if sample:
            append_sample(self._run_dir, step, sample)
        self._curves = self._draw()

    def summary(self, evaluation: Mapping[str, float]) -> None:
        """Shows what a run has come to."""
        if self._enabled:
            curves = self._curves or self._draw()
            self.print(summary(evaluation) + (f"\ncurves: {curves}" if curves else ""))

    def _draw(self) -> Path | None:
        from pldr_jax.runs.curves import write_curves  # with matplotlib, which a start does without

        return write_curves(self._run_dir)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"health": self.health.state}


def report(step: int, evaluation: Mapping[str, float], gap_threshold: float) -> str:
    """An evaluation in a line, and a warning where the causal gap is above the threshold."""
    if "eval/bits_per_byte" not in evaluation:  # of a task
        named = ", ".join(f"{n.removeprefix('eval/')} {v:.4g}" for n, v in evaluation.items())
        return f"step {step}: held-out {named}"
    text = (
        f"step {step}: held-out loss {evaluation['eval/loss']:.4f}, "
        f"{evaluation['eval/bits_per_byte']:.3f} bits a byte"
    )
    tasks = {n.removeprefix("eval/tasks/"): v for n, v in evaluation.items() if "/tasks/" in n}
    text += "".join(f", {name} {value:.4g}" for name, value in tasks.items())
    if "eval/causal_gap" not in evaluation:
        return text
    gap = evaluation["eval/causal_gap"]
    order = evaluation["eval/order_parameter/G_LM"]
    text += f", causal gap {gap:+.5f}, order parameter of G_LM {order:.1e}"
    if "eval/prefix_gap" in evaluation:
        text += f", with the G_LM of the first half {evaluation['eval/prefix_gap']:+.5f}"
    if abs(gap) > gap_threshold:
        text += (
            f"\nwarning: with G_LM of another text the loss changes by {gap:+.3f}: the model "
            "is using its future through G_LM and will not generate as well as its loss says"
        )
    return text


def summary(evaluation: Mapping[str, float]) -> str:
    """The last evaluation as a table, one metric a line."""

    def shown(value: float) -> str:
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"

    return summary_table({name: shown(value) for name, value in evaluation.items()})
