"""Steps that went wrong: updates that were not finite, and spikes of the loss."""

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_jax.config import TrainingConfig
from pldr_jax.files import append_whole

NONFINITE = "nonfinite.jsonl"
WINDOW = 100
"""Steps whose mean loss a spike is measured against."""
FEWEST = 20
"""Steps before the first of which none counts as a spike."""


class Health:
    """Looks at the metrics of every step.

    Args:
      run_dir: a step that is not finite is noted there, in `nonfinite.jsonl`.
      config: of the training.
      enabled: False writes nothing, for the processes other than the first.

    Attributes:
      nonfinite: updates left out so far.
      in_a_row: how many of them the newest steps are.
      spikes: losses far above the mean of the steps before.
    """

    def __init__(self, run_dir: Path, config: TrainingConfig, enabled: bool = True) -> None:
        self.nonfinite = self.in_a_row = self.spikes = 0
        self._path, self._config, self._enabled = run_dir / NONFINITE, config, enabled
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run counts as if it had not stopped."""
        counts = {name: getattr(self, name) for name in ("nonfinite", "in_a_row", "spikes")}
        return {**counts, "losses": list(self._losses)}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        for name in ("nonfinite", "in_a_row", "spikes"):
            setattr(self, name, int(state.get(name, 0)))
        self._losses = collections.deque(state.get("losses", ()), maxlen=WINDOW)

    def check(self, step: int, values: Mapping[str, float], batch: int) -> list[str]:
        """Counts and notes a step, and returns the names of its metrics that are not finite.

        Args:
          step: of the update.
          values: its metrics.
          batch: index of its batch in the stream of training data, from 0.
        """
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        loss = values["train/loss"]
        if broken:
            self.nonfinite, self.in_a_row = self.nonfinite + 1, self.in_a_row + 1
            self._note({"step": step, "batch": batch, "not_finite": broken})
            return broken
        self.in_a_row = 0
        seen = self._losses
        if len(seen) >= FEWEST and loss > sum(seen) / len(seen) + self._config.spike_nats:
            self.spikes += 1
        seen.append(loss)
        return []

    @property
    def stops(self) -> bool:
        """Whether training cannot go on."""
        if not self._config.skip_nonfinite:
            return self.in_a_row > 0
        return self.in_a_row >= self._config.max_nonfinite

    def metrics(self) -> dict[str, float]:
        """The counts."""
        return {"train/nonfinite": self.nonfinite, "train/spikes": self.spikes}

    def _note(self, row: dict[str, object]) -> None:
        if self._enabled:
            with self._path.open("ab", buffering=0) as file:
                append_whole(file, json.dumps(row).encode() + b"\n")
