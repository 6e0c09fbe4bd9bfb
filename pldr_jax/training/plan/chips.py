"""Accelerators, as their makers state them."""

import dataclasses
from typing import Literal

GIB = 2**30
USABLE = 0.92
"""Share of a chip's memory that a program gets; the rest is the runtime's."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      flops: dense bfloat16 operations a second.
      memory: bytes.
      bandwidth: of the memory, bytes a second.
      link: bytes a second that a chip sends to its neighbours along one mesh axis: both directions
        of one axis of a TPU's torus, or one direction of NVLink.
      network: the same between nodes; that of `link` where all chips of a slice are linked.
      node: chips in a node; None where a slice has no nodes.
      topologies: chips -> shape of a slice, for a compiler that knows them.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    node: int | None = None
    topologies: dict[int, str] = dataclasses.field(default_factory=dict, hash=False)


_FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8",
}  # fmt: skip

ChipName = Literal["v5e", "v5p", "v6e", "a100", "h100", "h200"]
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16 * GIB, 0.819e12, 90e9, 90e9, topologies=_FLAT),
        Chip("v5p", 459e12, 95 * GIB, 2.765e12, 180e9, 180e9, topologies=_CUBES),
        Chip("v6e", 918e12, 32 * GIB, 1.64e12, 180e9, 180e9, topologies=_FLAT),
        Chip("a100", 312e12, 80 * GIB, 2.039e12, 300e9, 25e9, node=8),
        Chip("h100", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9, node=8),
        Chip("h200", 989e12, 140 * GIB, 4.8e12, 450e9, 50e9, node=8),
    )
}
"""Name -> chip. A GPU is the SXM model, of the A100 that with 80 GB; networks are 200 Gbit/s a chip
for the A100 and 400 Gbit/s for the others, as in their makers' own servers.
"""
