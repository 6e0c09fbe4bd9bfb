"""Progress of a preparation on stderr: a bar on a terminal, otherwise a line every few seconds."""

from pldr_jax.terminal import Display, LiveBar, duration


class BuildProgress(LiveBar):
    """Counts bytes of input, documents and tokens, and shows them with speed and time left.

    Args:
      n_input_bytes: 0 where not known.
      n_before: bytes that earlier, interrupted work has done.
    """

    def __init__(
        self, n_input_bytes: int, n_before: int = 0, display: Display | None = None
    ) -> None:
        self.n_bytes = self.n_documents = self.n_tokens = 0
        self._n_input_bytes, self._n_before = n_input_bytes, n_before
        super().__init__(total=n_input_bytes or None, completed=n_before, display=display)

    def add(self, n_bytes: int, n_documents: int, n_tokens: int) -> None:
        """Counts what one process has just done."""
        self.n_bytes += n_bytes
        self.n_documents += n_documents
        self.n_tokens += n_tokens
        self.show(self.text(), self._n_before + self.n_bytes)

    def text(self) -> str:
        """`12.0 of 40.0 MB  1,000 documents  3,000,000 tokens  1,000,000 tokens/s  0:28 left`."""
        seconds = max(self.seconds, 1e-9)
        done, total = self._n_before + self.n_bytes, self._n_input_bytes
        of = f" of {total / 1e6:,.1f}" if total else ""
        line = f"{done / 1e6:,.1f}{of} MB  {self.n_documents:,} documents  {self.n_tokens:,} tokens"
        line += f"  {self.n_tokens / seconds:,.0f} tokens/s"
        if total and self.n_bytes and done < total:
            line += f"  {duration((total - done) * seconds / self.n_bytes)} left"
        return line
