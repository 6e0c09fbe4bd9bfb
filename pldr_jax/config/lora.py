"""The group `Lora` of the configuration."""

import dataclasses
import re

from pldr_jax.config.fields import Validated, field


@dataclasses.dataclass(frozen=True)
class LoraConfig(Validated):
    """Low-rank adapters, trained in place of the weights that a run begins with (--init_from)."""

    rank: int = field(0, "rank of every adapter; 0 trains the model itself", low=0, high=2**16)
    alpha: float | None = field(
        None, "adapters are scaled by alpha / rank; None is twice the rank", above=0
    )
    targets: tuple[str, ...] = field(
        ("q", "v"),
        "regular expressions of the linear maps that have one: the whole name, such as "
        "layers.attention.q, or its end, such as q, w[12] or head",
    )
    base: str | None = field(
        None, "checkpoint that the adapters belong to; --init_from sets it", path=True
    )
    base_step: int | None = field(
        None, "its step, where it is a run folder; --init_from sets it", low=0
    )
    base_digest: str | None = field(
        None, "SHA-256 of its weights, by which another one is noticed; --init_from sets it"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            self.fail("targets", "names nothing; give a linear map, such as 'q'")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                self.fail("targets", f"{target!r} is no regular expression ({error})")

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / max(self.rank, 1)
