"""The points of a sweep: which runs, in which folders, shared among jobs."""

from pathlib import Path
from typing import Any

import pytest
from test_sweep import RATE, WARMUP, runs_here

from pldr_jax.config import ConfigError
from pldr_jax.config.load import load_run, parse_values
from pldr_jax.training.sweep.points import share


def names(*sweep: str, **others: Any) -> list[str]:
    return [run.name for run in runs_here(Path("runs"), *sweep, **others)]


def test_a_grid_is_every_combination_each_in_its_own_folder() -> None:
    runs = runs_here(Path("runs"), f"{RATE}=8e-4,1e-3", f"{WARMUP}=100,200")
    assert [run.name for run in runs] == [
        "learning_rate=0.0008,warmup_steps=100",
        "learning_rate=0.0008,warmup_steps=200",
        "learning_rate=0.001,warmup_steps=100",
        "learning_rate=0.001,warmup_steps=200",
    ]
    assert runs[2].folder == Path("runs/learning_rate=0.001,warmup_steps=100")
    optimizer = runs[2].config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-3, 100)
    assert runs[2].settings == {RATE: 1e-3, WARMUP: 100}
    assert load_run([], runs[2].overrides) == runs[2].config


def test_zip_pairs_values() -> None:
    assert names(f"{RATE}=8e-4,1e-3", f"{WARMUP}=100,200", sweep_zip=True) == [
        "learning_rate=0.0008,warmup_steps=100",
        "learning_rate=0.001,warmup_steps=200",
    ]
    with pytest.raises(ConfigError, match="^--sweep_zip: .*rate has 1, .*steps has 2$"):
        names(f"{RATE}=8e-4", f"{WARMUP}=100,200", sweep_zip=True)


def test_seeds_repeat_each_point() -> None:
    seeds = ["Training.seed=5", "Data.seed=7"]
    runs = runs_here(Path("runs"), f"{RATE}=8e-4,1e-3", sweep_seeds=2, overrides=seeds)
    assert [run.name for run in runs] == [
        f"learning_rate={rate},seed={seed}" for rate in (0.0008, 0.001) for seed in (5, 6)
    ]
    assert [(r.config.training.seed, r.config.data.seed) for r in runs] == [(5, 7), (6, 8)] * 2
    with pytest.raises(ConfigError, match="^--sweep_seeds: Data.seed is given by --sweep"):
        names("Data.seed=1,2", sweep_seeds=2)
    # The seeds of later repetitions are bounded as any other.
    last = [f"Training.seed={2**32 - 2}"]
    assert len(runs_here(Path("runs"), f"{RATE}=1e-3", sweep_seeds=2, overrides=last)) == 2
    with pytest.raises(ConfigError, match=r"Training.seed = 4294967296: must be at most"):
        runs_here(Path("runs"), f"{RATE}=1e-3", sweep_seeds=3, overrides=last)


def test_as_many_runs_as_nobody_can_make_are_refused_at_once() -> None:
    values = ",".join(str(n) for n in range(1, 300))
    with pytest.raises(ConfigError, match="^--sweep: makes 26,730,899 runs; at most 10,000"):
        names(f"Data.seed={values}", f"Data.batch_size={values}", f"Training.eval_rows={values}")
    with pytest.raises(ConfigError, match="^--sweep_seeds=1000000: must be at most"):
        names(f"{RATE}=1e-3", sweep_seeds=10**6)


def test_values_of_a_sweep() -> None:
    assert parse_values(f"{RATE}=8e-4, 1e-3", "--sweep") == (RATE, ("8e-4", "1e-3"))
    assert parse_values("Data.source='a,b',c", "--sweep") == ("Data.source", ("'a,b'", "c"))
    assert names("Data.source='a,b','t/*.txt'") == ["source=a_b", "source=t__.txt"]
    assert names("Training.seed=1", "Data.seed=2") == ["Training.seed=1,Data.seed=2"]


def test_shares_of_a_job_array_are_all_runs_once() -> None:
    runs = runs_here(Path("runs"), f"{RATE}=1e-3,2e-3,3e-3,4e-3,5e-3")
    assert [share(runs, str(i))[0] for i in range(5)] == runs
    parts = [share(runs, f"{i}/2") for i in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    assert sorted(run.name for part in parts for run in part) == [run.name for run in runs]
    for index, message in [
        ("5", "5 runs, 0 to 4"),
        ("2/2", "2 jobs, 0 to 1"),
        ("-1", "expected I"),
        ("9" * 5000, "expected I"),
        ("1/" + "9" * 30, "expected I"),
    ]:
        with pytest.raises(ConfigError, match=message):
            share(runs, index)
