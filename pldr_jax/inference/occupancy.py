"""Which text is in which slot, as the host knows it: up to one call behind the device."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from pldr_jax.inference.request import Completion, Request, bucket, prompts_together


@dataclasses.dataclass(eq=False)
class Text:
    """A completion in a slot.

    Attributes:
      left: tokens that it may still get from calls that have not been started.
    """

    completion: Completion
    left: int

    @property
    def ended(self) -> bool:
        """Whether the host knows that it has ended, so that its slot is free."""
        return self.completion.finish_reason is not None


class Occupancy:
    """The texts of B slots.

    Args:
      batch: B.
      context: tokens of the model's context.
    """

    def __init__(self, batch: int, context: int) -> None:
        self.texts: list[Text | None] = [None] * batch
        self._context = context

    @property
    def going(self) -> list[Text]:
        """Texts that the next call may give a token."""
        return [text for text in self.texts if text and not text.ended and text.left > 0]

    @property
    def ending(self) -> bool:
        """Whether what has not been read yet surely ends a text."""
        return any(text and not text.ended and text.left <= 0 for text in self.texts)

    @property
    def free(self) -> list[int]:
        """Slots that a prompt can enter."""
        return [i for i, text in enumerate(self.texts) if text is None or text.ended]

    def enter(self, completions: Sequence[Completion]) -> Iterator[dict[int, Request]]:
        """Gives each a free slot; yields requests by their slots, those that enter in one call
        together: as many of one bucket, G_LM and parameters as `prompts_together` says, or fewer.
        """
        batch = len(self.texts)
        buckets: dict[tuple[int, int, int], dict[int, Request]] = {}
        for slot, completion in zip(self.free, completions, strict=False):
            request = completion.request
            room = self._context - len(request.prompt)
            self.texts[slot] = Text(completion, min(request.sampling.max_new_tokens, room))
            width = bucket(len(request.prompt), self._context)
            key = width, id(request.g_lm), id(request.params)
            buckets.setdefault(key, {})[slot] = request
        for (width, *_), requests in buckets.items():
            items = iter(requests.items())
            while group := dict(itertools.islice(items, prompts_together(width, batch))):
                yield group

    def start(self, most: int, waiting: bool) -> int:
        """Decode steps of the next call, at most `most`; they count as taken.

        Where a prompt may be waiting, it ends where the first text surely does, but never after
        less than a quarter of `most`.
        """
        going = self.going
        soonest = max(min(text.left for text in going), most // 4)
        steps = min(most, soonest) if waiting else most
        for text in going:
            text.left -= steps
        return steps
