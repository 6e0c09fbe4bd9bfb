"""What a compiled program sends between devices, copies and holds, read from its text.

XLA's own cost analysis counts the body of a loop once and says nothing of collectives; here every
instruction is counted as often as its loops run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "token": 0}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(
    r"\b(pred|bf16|[suf]\d+(?:e\dm\d\w*)?|c64)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?"
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"[\w.\-]+")
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
      order: of its axes in memory, the fastest first.
      tile: that its last axes in memory are padded to.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

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

    @property
    def padded(self) -> int:
        """Bytes, with the padding to whole tiles."""
        dims = list(self.dims)
        for axis, tile in zip(self.order, reversed(self.tile), strict=False):
            dims[axis] += -dims[axis] % tile
        return math.prod(dims) * self.nbytes // max(self.size, 1)

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
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", self.text[: self.text.find(")")])

    @property
    def called(self) -> list[str]:
        """Names of the computations it calls."""
        return [name for called in _CALLED.findall(self.text) for name in _NAME.findall(called)]

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
                shapes = tuple(_shape(*written) for written in _SHAPE.findall(kind))
                yield Instruction(name, op, shapes, computation, times[computation], rest)


def _times(lines: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in lines}
    for name, body in lines.items():
        for line in body:
            trips = _trips(lines, line)
            for called in _CALLED.findall(line):
                for callee in _NAME.findall(called):
                    if callee in lines:
                        calls[name].append((callee, trips))
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


def _trips(lines: dict[str, list[str]], line: str) -> int:
    """How often a line runs what it calls: a loop states it, or its condition compares with it."""
    if stated := _TRIPS.search(line):
        return int(stated[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(lines[condition[1]]) if condition else ""
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", text)
    return max(map(int, bounds)) if bounds and "direction=LT" in text else 1


def _shape(dtype: str, *numbers: str) -> Shape:
    return Shape(dtype, *(tuple(int(n) for n in of.split(",") if n) for of in numbers))


def collectives(text: str) -> list[Collective]:
    """The collectives of a program. An all-reduce of which each device keeps a slice, in a fusion
    of its own, is a reduce-scatter.
    """
    found = list(instructions(text))
    sliced = {i.computation: i for i in found if i.op == "dynamic-slice"}
    made: dict[str, Collective] = {}
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
        # One that runs beside other work is in several fusions, of which some are in loops, under
        # one channel.
        channel = re.search(r"channel_id=(\d+)", i.text)
        key = channel[1] if channel else f"{i.computation}/{i.name}"
        if key not in made or i.times < made[key].times:
            made[key] = Collective(kind, shapes, i.times, _groups(i.text), i.scope)
    return list(made.values())


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
    """`replica_groups` in any of its spellings."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", text):
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(int(n) for n in group.split(",") if n) for group in groups)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _split(_iota(iota[3], iota[4]), int(iota[2]))
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}",
        text,
    ):
        axes = re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1])
        names, dims = [a for a, _ in axes], [int(n) for _, n in axes]
        along = [names.index(a) for a in re.findall(r"'([\w.]+)'", mesh[4])]
        rest = [a for a in range(len(dims)) if a not in along]
        places, width = _transposed(dims, rest + along), math.prod(dims[a] for a in along)
        ids = _iota(mesh[2], mesh[3]) if mesh[2] else list(range(len(places)))
        return _split([ids[place] for place in places], width)
    return ()


def _iota(dims: str, order: str | None) -> list[int]:
    """Devices written as `[4,2]T(1,0)`."""
    sizes = [int(n) for n in dims.split(",")]
    return _transposed(sizes, [int(n) for n in order.split(",")] if order else range(len(sizes)))


def _split(ids: list[int], width: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ids[i : i + width]) for i in range(0, len(ids), width))


def _transposed(dims: list[int], order: Sequence[int]) -> list[int]:
    """0, 1, ... in an array of these dimensions, read with its axes in another order."""
    strides = [math.prod(dims[axis + 1 :]) for axis in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [i + n * strides[axis] for i in ids for n in range(dims[axis])]
    return ids
