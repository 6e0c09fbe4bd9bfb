"""What a compiled program sends between devices, copies and holds, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing of collectives; here every
instruction is counted as often as its loops run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "token": 0}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+(?:e\dm\d\w*)?|c64)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes, without padding."""
        width = ITEM_BYTES.get(self.dtype)
        if width is None:
            width = max(1, int(re.sub(r"e\d.*", "", self.dtype)[1:]) // 8)
        return self.size * width

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program.

    Attributes:
      shapes: of its results.
      times: how often it runs in one call of the program.
      text: operands and attributes.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    computation: str
    times: int
    text: str

    @property
    def scope(self) -> str:
        """Where in the model it comes from."""
        named = re.search(r'op_name="([^"]*)"', self.text)
        return named[1] if named else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Arrays that devices exchange; `groups` are the devices that do so with each other."""

    kind: str
    shapes: tuple[Shape, ...]
    times: int
    groups: tuple[tuple[int, ...], ...]
    scope: str

    @property
    def link_bytes(self) -> float:
        """Bytes that one device sends in one call of the program, by the ring algorithms."""
        n = max(len(self.groups[0]), 1) if self.groups else 1
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        sent = share.get(self.kind, (n - 1) / n)
        return self.times * sent * sum(shape.nbytes for shape in self.shapes)


def instructions(text: str) -> Iterator[Instruction]:
    """All instructions that run."""
    lines: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            lines[current] = []
            entry = current if found[1] else entry
        elif current:
            lines[current].append(line)
    times = _times(lines, entry)
    for computation, body in lines.items():
        for line in body:
            found = _INSTRUCTION.match(line)
            if found and times.get(computation):
                name, kind, op, rest = found.groups()
                shapes = tuple(_shape(*pair) for pair in _SHAPE.findall(kind))
                yield Instruction(name, op, shapes, computation, times[computation], rest)


def _times(lines: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in lines}
    for name, body in lines.items():
        for line in body:
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in lines:
                        calls[name].append((callee, int(trips[1]) if trips else 1))
    callers: dict[str, list[tuple[str, int]]] = {name: [] for name in lines}
    for name, called in calls.items():
        for callee, trips in called:
            callers[callee].append((name, trips))

    @functools.cache
    def times(name: str) -> int:
        if name == entry:
            return 1
        return sum(times(caller) * trips for caller, trips in callers[name])

    return {name: times(name) for name in lines}


def _shape(dtype: str, dims: str) -> Shape:
    return Shape(dtype, tuple(int(n) for n in dims.split(",") if n))


def collectives(text: str) -> list[Collective]:
    """The collectives of a program. An all-reduce of which each device keeps a slice, in a fusion
    of its own, is a reduce-scatter.
    """
    found = list(instructions(text))
    sliced = {i.computation: i for i in found if i.op == "dynamic-slice"}
    made = []
    for i in found:
        kind = i.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        shapes = i.shapes
        if i.op in ("all-gather-start", "collective-permute-start"):  # operands and results
            shapes = tuple(s for s in shapes if s.dims or s.dtype != "u32")
            shapes = shapes[len(shapes) // 2 :]
        if kind == "all-reduce" and "scatter" in i.computation and i.computation in sliced:
            kind, shapes = "reduce-scatter", sliced[i.computation].shapes
        made.append(Collective(kind, shapes, i.times, _groups(i.text), i.scope))
    return made


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """`replica_groups` in any of its spellings."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", text):
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(int(n) for n in group.split(",") if n) for group in groups)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        dims = [int(n) for n in iota[3].split(",")]
        order = [int(n) for n in iota[4].split(",")] if iota[4] else range(len(dims))
        ids = _transposed(dims, list(order))
        width = int(iota[2])
        return tuple(tuple(ids[i : i + width]) for i in range(0, len(ids), width))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        axes = re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1])
        names, dims = [a for a, _ in axes], [int(n) for _, n in axes]
        along = [names.index(a) for a in re.findall(r"'([\w.]+)'", mesh[2])]
        rest = [a for a in range(len(dims)) if a not in along]
        ids, width = _transposed(dims, rest + along), math.prod(dims[a] for a in along)
        return tuple(tuple(ids[i : i + width]) for i in range(0, len(ids), width))
    return ()


def _transposed(dims: list[int], order: list[int]) -> list[int]:
    """0, 1, ... in an array of these dimensions, read with its axes in another order."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [i + n * strides[axis] for i in ids for n in range(dims[axis])]
    return ids
