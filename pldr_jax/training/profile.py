"""A trace of some steps, for TensorBoard or Perfetto: `--profile STEP:COUNT`."""

from pathlib import Path
from typing import Any, Self

import jax

from pldr_jax.config import ConfigError

FOLDER = "profile"


class Profiler:
    """Traces `COUNT` steps from `STEP` on, into `profile/` of the run folder.

    A context manager.

    Args:
      wanted: "STEP:COUNT"; None traces nothing.

    Raises:
      ConfigError: `wanted` is something else.
    """

    def __init__(self, run_dir: Path, wanted: str | None) -> None:
        self.folder = run_dir / FOLDER
        self._steps = parse_steps(wanted) if wanted is not None else range(0)
        self._running = False

    def before(self, step: int) -> None:
        """To be called before each step is started."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, results: Any) -> bool:
        """To be called after each step is started; True where the trace was written."""
        if not self._running or step < self._steps[-1]:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def parse_steps(wanted: str) -> range:
    """The steps that "STEP:COUNT" names."""
    first, _, count = wanted.partition(":")
    if not (first.isdecimal() and count.isdecimal() and int(first) > 0 and int(count) > 0):
        raise ConfigError(f"--profile={wanted}: must be STEP:COUNT, two positive numbers")
    return range(int(first), int(first) + int(count))
