"""Windows over a text that is longer than the model's context: every token is predicted once."""

from collections.abc import Iterator, Sequence

from pldr_jax.inference.given.score import Pair


def rolling_windows(
    tokens: Sequence[int], prefix: int, context_length: int, overlap: int = 1
) -> Iterator[Pair]:
    """Contexts and continuations, together at most `context_length + 1` tokens each, since the last
    one is only predicted: the windows of lm-evaluation-harness.

    The first context is `prefix` alone. Every later window begins with the last `overlap` tokens
    that were predicted, and the last one with as many as fit. The windows depend on nothing but
    the text, so that batches of any size give the same ones.

    Args:
      tokens: of the text; none gives no windows.
      prefix: the token that stands before a text.
      overlap: tokens of context from the second window on, 1 to context_length - 1.
    """
    if not 1 <= overlap < context_length:
        raise ValueError(f"overlap = {overlap}: must be 1 to {context_length - 1}")
    done = min(len(tokens), context_length)
    if done:
        yield [prefix], list(tokens[:done])
    while done < len(tokens):
        end = min(done + context_length + 1 - overlap, len(tokens))
        start = max(end - context_length - 1, 0) if end == len(tokens) else done - overlap
        yield list(tokens[start:done]), list(tokens[done:end])
        done = end
