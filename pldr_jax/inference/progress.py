"""Progress of a batch job on stderr."""

import itertools
from collections.abc import Iterator
from typing import TypeVar

from pldr_jax.terminal import Display, LiveBar

T = TypeVar("T")


class JobProgress(LiveBar):
    """Counts prompts, tokens and failures, and shows them.

    Args:
      total: prompts; None where it is not known.
      finished: prompts that an earlier, stopped job has done.
    """

    def __init__(
        self, total: int | None, finished: int = 0, display: Display | None = None
    ) -> None:
        super().__init__("prompts", total, finished, display)
        self.prompts = self.tokens = self.failures = 0
        self._before = finished

    def first_of(self, results: Iterator[T]) -> Iterator[T]:
        """The results as they are; what is waited for before the first one is shown meanwhile."""
        with self.waiting("loading the prompts and compiling, usually 5 to 30 s"):
            first = list(itertools.islice(results, 1))
        yield from itertools.chain(first, results)

    def add_tokens(self, count: int) -> None:
        """Counts new tokens."""
        self.tokens += count
        self._show()

    def finish(self, failed: bool) -> None:
        """Counts a prompt that ended."""
        self.prompts += 1
        self.failures += failed
        self._show()

    def summary(self) -> str:
        """One line on what was done."""
        prompts = f"{self.prompts} prompt{'' if self.prompts == 1 else 's'}"
        failures = f"{self.failures} failure{'' if self.failures == 1 else 's'}"
        return f"{prompts}, {self.tokens} new tokens, {self._speed()} tokens/s, {failures}"

    def _show(self) -> None:
        text = f"tokens {self.tokens}  tokens/s {self._speed()}"
        self.show(text, self._before + self.prompts)

    def _speed(self) -> str:
        return f"{self.tokens / self.seconds:,.1f}" if self.seconds > 0 else "-"
