"""The search for critical values: which runs it needs, what it concludes, what it refuses."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import run_here
from test_sweep import RATE, WARMUP, python, record

from pldr_jax.cli.training.train import train_main
from pldr_jax.config import ConfigError
from pldr_jax.training.sweep.critical import Line, lines_of, most_runs, needed, searches
from pldr_jax.training.sweep.critical_line import estimate, status
from pldr_jax.training.sweep.settings import Command, CriticalConfig
from pldr_jax.training.sweep.sweep import list_search, open_search

SPAN = f"{RATE}=1e-3:1.6e-2"
BELOW = 1e-3
OrderParameter = Callable[[float, int, int], float]
"""Of a run, by learning rate, warm-up and seed."""


def steep(critical: float) -> OrderParameter:
    return lambda rate, warmup, seed: 1e-6 if rate > critical else 0.4


def lines_here(folder: Path, span: str = SPAN, **others: object) -> list[Line]:
    over = (f"{WARMUP}=50,100",)
    config = CriticalConfig(**{"critical": span, "over": over, "critical_factor": 2.0, **others})
    return lines_of(config, folder, Command(), None)


def made(lines: Sequence[Line], order: OrderParameter, fails: str = "never") -> list[str]:
    """Carries the search out, each run by the record that it would leave; their names."""
    names = []
    for run in needed(lines, BELOW):
        names.append(run.name)
        warmup, rate, seed = run.settings.values()
        if fails not in run.name:
            steps = run.config.training.steps
            record(run, steps, loss=2.0, order_parameter__G_LM=order(rate, warmup, seed))
    return names


def test_a_bisection_needs_few_runs_and_goes_on_beside_the_answer_before(tmp_path: Path) -> None:
    lines = lines_here(tmp_path)
    assert lines[0].values == pytest.approx((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2))
    names = made(lines, steep(3e-3))
    # Two seeds that agree decide a point of three.
    assert [name.split(",")[1] for name in names[::2]] == [
        "learning_rate=0.004", "learning_rate=0.001", "learning_rate=0.002",  # by halves
        "learning_rate=0.004", "learning_rate=0.002",  # the answer, and its neighbour
    ]  # fmt: skip
    assert len(names) == 10 < most_runs(lines) == 24
    for line, state in zip(lines, searches(lines, BELOW), strict=True):
        assert status(state) == "found"
        assert estimate(line, state, BELOW) == pytest.approx((math.sqrt(8e-6), 2e-3, 4e-3))
    assert made(lines, steep(3e-3)) == []  # all of it is in the folders


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_every_place_of_the_line_is_found(tmp_path: Path, values: int, seeds: int) -> None:
    for place in range(values + 2):
        span = f"{RATE}=1e-3:{1e-3 * 2**values:.4g}"
        lines = lines_here(tmp_path / str(place), span, critical_seeds=seeds)
        names = made(lines, steep(1e-3 * 2 ** (place - 0.5)))
        assert len(names) <= most_runs(lines)
        for state in searches(lines, BELOW):
            assert (state.following, state.below) == (None, min(place, values + 1))


def test_beyond_the_ends_there_is_no_value_but_a_bound(tmp_path: Path) -> None:
    lines = lines_here(tmp_path)
    made(lines, lambda rate, warmup, _: 0.4 if warmup == 50 else 1e-6)
    first, second = searches(lines, BELOW)
    assert status(first) == "above at B"
    assert estimate(lines[0], first, BELOW) == (None, pytest.approx(1.6e-2), None)
    assert status(second) == "below at A"
    assert estimate(lines[1], second, BELOW) == (None, None, pytest.approx(1e-3))


def test_the_majority_of_the_seeds_decides_and_the_interval_is_where_all_agree(
    tmp_path: Path,
) -> None:
    lines = lines_here(tmp_path)[:1]
    # Seeds 0, 1, 2 become invariant from 6e-3, 3e-3 and 1.5e-3 on.
    names = made(lines, lambda rate, _, seed: 1e-6 if rate > 6e-3 / 2**seed else 0.4)
    (state,) = searches(lines, BELOW)
    assert state.finished[2] == (0.4, 1e-6, 1e-6)  # 4e-3: the third seed decides
    assert len(names) == 3 + 2 + 2 + 2  # 8e-3 is looked at for the interval alone
    assert estimate(lines[0], state, BELOW) == pytest.approx((math.sqrt(8e-6), 2e-3, 8e-3))
    # With all seeds on one side at no value, the interval has no end there.
    lines = lines_here(tmp_path / "open")[:1]
    made(lines, lambda rate, _, seed: 1e-6 if rate > 3e-3 and seed != 1 else 0.4)
    (state,) = searches(lines, BELOW)
    assert estimate(lines[0], state, BELOW) == (pytest.approx(math.sqrt(8e-6)), 2e-3, None)


def test_a_search_downwards_and_of_whole_numbers(tmp_path: Path) -> None:
    lines = lines_here(tmp_path, f"{WARMUP}=100:10", over=(), critical_factor=1.5)
    assert lines[0].values == (100, 68, 46, 32, 22, 15, 10)
    for run in needed(lines, BELOW):
        value = 1e-6 if run.config.optimizer.warmup_steps < 40 else 0.4
        record(run, run.config.training.steps, loss=2.0, order_parameter__G_LM=value)
    (state,) = searches(lines, BELOW)
    assert estimate(lines[0], state, BELOW) == pytest.approx((math.sqrt(32 * 46), 32, 46))


def test_a_run_that_fails_ends_its_line_alone_and_is_tried_again(tmp_path: Path) -> None:
    lines = lines_here(tmp_path)
    names = made(lines, steep(3e-3), fails=f"{WARMUP.split('.')[1]}=50")
    assert names[0].startswith("warmup_steps=50") and "=50" not in " ".join(names[1:])
    assert [status(state) for state in searches(lines, BELOW)] == ["unfinished", "found"]
    assert made(lines, steep(3e-3))[0] == names[0]


def test_the_command_continues_lists_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        f"--critical={SPAN}", f"--over={WARMUP}=50,100", "--critical_factor=2",
        f"--run_dir={tmp_path}",
    ]  # fmt: skip
    status_, out, _ = run_here(capsys, train_main, *given, "--sweep_list")
    assert status_ == 0 and not any(tmp_path.iterdir())
    next_one = "learning_rate=0.004,seed=0"
    assert out == (
        f"0  unfinished  warmup_steps=50,{next_one}\n1  unfinished  warmup_steps=100,{next_one}\n"
    )
    lines = lines_here(tmp_path)
    made(lines[:1], steep(3e-3))
    monkeypatch.setattr(Command, "arguments", lambda *_: python("print('error: no luck'); exit(3)"))
    status_, out, err = run_here(capsys, train_main, *given)
    assert status_ == 1 and err.count("failed: warmup_steps=100") == 1 and "1 of 1 runs" in err
    assert "the 30 runs of the grid, 6 of them finished before" in out
    assert "6 runs; the grid with every seed has 30" in out
    with (tmp_path / "critical.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        WARMUP: "50", "status": "found", "critical": "0.002828", "low": "0.002", "high": "0.004",
        "runs": "6",
    }  # fmt: skip
    assert (rows[1]["status"], rows[1]["critical"]) == ("unfinished", "")
    assert (tmp_path / "critical.png").read_bytes().startswith(b"\x89PNG")
    assert "no luck" in (tmp_path / "sweep.csv").read_text()


def test_runs_of_another_config_are_refused(tmp_path: Path) -> None:
    config = CriticalConfig(critical=SPAN)
    folder = open_search(config, tmp_path)[0].runs[1][0].folder
    folder.mkdir()
    (folder / "config.gin").write_text(f"{RATE} = 2e-3\nData.batch_size = 4\n")
    with pytest.raises(ConfigError, match="another config"):
        open_search(config, tmp_path)


def test_a_finished_run_without_an_order_parameter(tmp_path: Path) -> None:
    config = CriticalConfig(critical=SPAN, critical_factor=2.0)
    lines = open_search(config, tmp_path)
    run = next(iter(needed(lines, BELOW)))
    record(run, run.config.training.steps, loss=2.0)
    with pytest.raises(ConfigError, match=r"seed=0: its last evaluation has no eval/order"):
        list_search(lines, config)


@pytest.mark.parametrize(
    "given,message",
    [
        ([f"--critical={RATE}=1e-3"], "expected Optimizer.learning_rate=A:B"),
        ([f"--critical={RATE}=1e-3:nan"], "must be different, finite and greater than 0"),
        ([f"--critical={RATE}=2e-3:2e-3"], "must be different"),
        ([f"--critical={RATE}=1e-3:1e-2,3"], "expected Optimizer.learning_rate=A:B"),
        (["--critical=Optimizer.learning_rat=1:2"], "did you mean Optimizer.learning_rate"),
        (["--critical=Optimizer.name=1:2"], "not a number that can be searched"),
        (["--critical=Data.seed=1:9"], "Data.seed is raised from run to run"),
        ([f"--critical={SPAN}", "--critical_factor=1"], "--critical_factor=1.0: must be greater"),
        ([f"--critical={SPAN}", "--critical_factor=1.0001"], "raise --critical_factor"),
        ([f"--critical={SPAN}", f"--over={RATE}=1,2"], "is given twice"),
        ([f"--critical={SPAN}", f"--over={WARMUP}=5,5"], "--over: gives warmup_steps=5"),
        ([f"--critical={SPAN}", f"--over={WARMUP}=-5"], "must be at least 0"),
        ([f"--critical={SPAN}", f"--sweep={WARMUP}=5"], "chooses its runs itself"),
        ([f"--critical={SPAN}", "--plan"], "leave out --critical"),
        ([f"--critical={SPAN}", "--gin.Model.g_source=identity"], "no G_LM is learned"),
        ([f"--over={WARMUP}=5"], "--over: needs --critical"),
        (["--critical_seeds=2"], "--critical_seeds: needs --critical"),
    ],
)
def test_what_cannot_be_searched_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, given: list[str], message: str
) -> None:
    status_, out, err = run_here(capsys, train_main, f"--run_dir={tmp_path / 'runs'}", *given)
    assert status_ == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()
