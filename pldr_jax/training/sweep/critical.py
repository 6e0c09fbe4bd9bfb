"""`train.py --critical`: where between two values of a field G_LM becomes invariant.

The values between are a grid on a log scale. A point of it counts as below the threshold where most
of its seeds end below; a point has runs until that is decided. A bisection over the grid then needs
about log2 of its points, and fewer where it begins beside the answer of the line before. What is
known is read from the run folders, so that the same command continues what was broken off.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.config.annotations import alternatives, shorten
from pldr_jax.config.load import FIELDS, parse_values
from pldr_jax.training.sweep.points import (
    MOST_RUNS,
    SEED_FIELDS,
    Axis,
    SweepRun,
    grid,
    repeated,
    runs_at,
    value_of,
)
from pldr_jax.training.sweep.runs import outcome
from pldr_jax.training.sweep.settings import Command, CriticalConfig

ORDER_PARAMETER = "eval/order_parameter/G_LM"


@dataclasses.dataclass(frozen=True)
class Line:
    """One search: the values of the other fields, and the runs that it may need.

    Attributes:
      settings: `Group.field` -> value, of --over.
      values: of the searched field, in the direction of the search.
      runs: [value][seed].
    """

    settings: Mapping[str, Any]
    values: tuple[float, ...]
    runs: tuple[tuple[SweepRun, ...], ...]


@dataclasses.dataclass(frozen=True)
class Search:
    """How far a search is.

    Attributes:
      above, below: indices of neighbouring values, once `following` is None, of which the first
        is above the threshold and the second below; -1 and the number of values stand for what
        lies beyond the ends.
      following: the run that the search needs next.
      size: number of values.
      finished: order parameters of the seeds of each value that the search has looked at.
    """

    above: int
    below: int
    following: SweepRun | None
    size: int
    finished: Mapping[int, tuple[float, ...]]

    def unanimous(self, threshold: float) -> tuple[int, int]:
        """Indices of the values nearest to the answer at which every seed is above the threshold,
        and below it; -1 and the number of values where there is none.
        """
        low = [k for k, found in self.finished.items() if found and min(found) >= threshold]
        high = [k for k, found in self.finished.items() if found and max(found) < threshold]
        return (
            max((k for k in low if k <= self.above), default=-1),
            min((k for k in high if k >= self.below), default=self.size),
        )


def lines_of(
    config: CriticalConfig, folder: Path, command: Command, base: ExperimentConfig | None
) -> list[Line]:
    """The searches of a command, with the config of every run that they may need.

    Raises:
      ConfigError: a field or value that cannot be; or G_LM that no run learns.
    """
    key, values = _values(config)
    axes = [Axis(*parse_values(text, "--over")) for text in config.over]
    keys = [*(axis.key for axis in axes), key]
    for one in keys:
        if keys.count(one) > 1 or one in SEED_FIELDS:
            why = "is raised from run to run" if one in SEED_FIELDS else "is given twice"
            raise ConfigError(f"--critical, --over: {one} {why}; leave it out")
    size = len(values) * config.critical_seeds
    count = size * math.prod(len(axis.values) for axis in axes)
    if count > MOST_RUNS:
        raise ConfigError(
            f"--critical: searches among {count:,} runs, at most {MOST_RUNS:,} are possible; raise "
            "--critical_factor"
        )
    points = grid([*axes, Axis(key, values)])
    first = command.config(points[0], base)
    seeds = {field: value_of(first, field) for field in SEED_FIELDS}
    points = repeated(points, seeds, config.critical_seeds)
    runs = runs_at(
        points, [*keys, SEED_FIELDS[0]], folder, lambda p: command.config(p, base), "--over"
    )
    if constant := [run for run in runs if run.config.model.g_source != "learned"]:
        source = constant[0].config.model.g_source
        raise ConfigError(f"--critical: Model.g_source is {source!r}, and no G_LM is learned")
    lines = []
    for start in range(0, len(runs), size):
        mine = runs[start : start + size]
        by_value = tuple(
            tuple(mine[k : k + config.critical_seeds])
            for k in range(0, size, config.critical_seeds)
        )
        settings = {axis.key: mine[0].settings[axis.key] for axis in axes}
        numbers = tuple(float(row[0].settings[key]) for row in by_value)
        lines.append(Line(settings, numbers, by_value))
    return lines


def _values(config: CriticalConfig) -> tuple[str, tuple[str, ...]]:
    """The searched field and the texts of its values, A and B among them."""
    shown = f"--critical={shorten(str(config.critical))}"
    key, (span, *more) = parse_values(str(config.critical), "--critical")
    kinds = {kind for kind in alternatives(FIELDS[key]) if kind is not type(None)}
    if not kinds <= {int, float}:
        raise ConfigError(f"{shown}: {key} is not a number that can be searched")
    match = re.fullmatch(r"([^:]+):([^:]+)", span)
    try:
        if more or match is None:
            raise ValueError
        first, last = float(match[1]), float(match[2])
    except ValueError:
        raise ConfigError(f"{shown}: expected {key}=A:B, two numbers") from None
    if not (0 < first < math.inf and 0 < last < math.inf) or first == last:
        raise ConfigError(f"{shown}: A and B must be different, finite and greater than 0")
    steps = math.ceil(abs(math.log(last / first)) / math.log(config.critical_factor) - 1e-9)
    if steps > MOST_RUNS:
        raise ConfigError(f"{shown}: has {steps:,} values between; raise --critical_factor")
    between = [first * (last / first) ** (k / steps) for k in range(1, steps)]
    form = ".0f" if kinds == {int} else ".4g"
    texts = [match[1].strip(), *(format(value, form) for value in between), match[2].strip()]
    return key, tuple(dict.fromkeys(texts))


def search(line: Line, threshold: float, begin: int | None = None) -> Search:
    """What the finished runs of a line say, and which run is needed next.

    Args:
      begin: index of the value that is looked at first, and its neighbour after it; None bisects
        from the start.

    Raises:
      ConfigError: a finished run has no order parameter.
    """
    above, below = -1, (size := len(line.values))
    found: dict[int, tuple[float, ...]] = {}
    near = [] if begin is None else [begin, begin - 1, begin + 1]
    while below - above > 1:
        between = [k for k in near if above < k < below]
        probe = between[0] if between else (above + below) // 2
        found[probe], following = _seeds(line.runs[probe], threshold)
        if following is not None:
            return Search(above, below, following, size, found)
        lower = sum(value < threshold for value in found[probe])
        above, below = (above, probe) if 2 * lower > len(line.runs[probe]) else (probe, below)
    # The interval: on to the nearest values, outwards, at which all seeds agree.
    for outwards in (range(above, -1, -1), range(below, size)):
        for k in outwards:
            found[k], following = _seeds(line.runs[k], threshold)
            if following is not None:
                return Search(above, below, following, size, found)
            if len({value < threshold for value in found[k]}) == 1:
                break
    return Search(above, below, None, size, found)


def _seeds(runs: Sequence[SweepRun], threshold: float) -> tuple[tuple[float, ...], SweepRun | None]:
    """Order parameters of a point's seeds, as many as decide it, and the run that is missing."""
    values: list[float] = []
    lower = higher = 0
    for run in runs:
        if 2 * lower > len(runs) or 2 * higher >= len(runs):
            break
        if (value := order_parameter(run)) is None:
            return tuple(values), run
        values.append(value)
        lower, higher = lower + (value < threshold), higher + (value >= threshold)
    return tuple(values), None


def order_parameter(run: SweepRun) -> float | None:
    """Of G_LM at the end of a run; None where it is not finished."""
    one = outcome(run)
    if one.status != "finished":
        return None
    value = one.evaluation.get(ORDER_PARAMETER)
    if not isinstance(value, (int, float)):
        raise ConfigError(f"{run.folder}: its last evaluation has no {ORDER_PARAMETER}")
    return float(value)


def searches(lines: Sequence[Line], threshold: float) -> list[Search]:
    """How far every search is; each begins at the answer of the one before."""
    made: list[Search] = []
    for line in lines:
        made.append(search(line, threshold, _begin(line, made)))
    return made


def needed(lines: Sequence[Line], threshold: float) -> Iterator[SweepRun]:
    """The runs that the searches need, each when those before it are over. A line whose run fails
    is left.
    """
    done: list[Search] = []
    for line in lines:
        tried = None
        while True:
            state = search(line, threshold, _begin(line, done))
            if state.following is None or state.following is tried:
                break
            tried = state.following
            yield tried
        done.append(state)


def _begin(line: Line, before: Sequence[Search]) -> int | None:
    """Where a search begins: at the answer of the last line that has one."""
    answers = [one.below for one in before if one.following is None]
    return min(answers[-1], len(line.values) - 1) if answers else None


def most_runs(lines: Sequence[Line]) -> int:
    """Runs that the bisections need at most; where seeds disagree, the intervals need more."""
    return sum(
        min(math.ceil(math.log2(len(line.values) + 1)) + 2 * bool(number), len(line.values))
        * len(line.runs[0])
        for number, line in enumerate(lines)
    )
