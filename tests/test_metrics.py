"""The record of a run, its progress lines and its curves."""

import contextlib
import io
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import small_disk
from matplotlib import image

from pldr_jax.runs.curves import write_curves
from pldr_jax.runs.folder import append_sample
from pldr_jax.runs.metrics import MetricsError, MetricWriter, read_metrics
from pldr_jax.terminal import Display, summary_table
from pldr_jax.training.progress import Progress


def record(run_dir: Path, steps: range, resume_step: int | None = None) -> None:
    with MetricWriter(run_dir, False, resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step})


def recorded_steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricWriter(tmp_path / "run", False, None)
    writer.write(3, {"train/loss": np.float32(2.5), "eval/loss_frozen_g": 3})
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row.pop("time") > 1.7e9
    assert row == {"step": 3, "train/loss": 2.5, "eval/loss_frozen_g": 3.0}
    writer.close()


def test_resume_leaves_neither_gaps_nor_repeats(tmp_path: Path) -> None:
    record(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    record(tmp_path, range(6, 10), resume_step=5)
    assert recorded_steps(tmp_path) == list(range(1, 10))
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after.splitlines()[:5] == before.splitlines()[:5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_before_the_first_row_and_without_a_record(tmp_path: Path) -> None:
    record(tmp_path, range(1, 3), resume_step=0)
    record(tmp_path, range(5, 7), resume_step=0)
    assert recorded_steps(tmp_path) == [5, 6]


def test_a_new_run_does_not_touch_an_old_record(tmp_path: Path) -> None:
    record(tmp_path, range(1, 3))
    with pytest.raises(MetricsError, match="resume that, or give another --run_dir"):
        MetricWriter(tmp_path, False, None)
    assert recorded_steps(tmp_path) == [1, 2]


def test_only_the_last_line_may_be_half_written(tmp_path: Path) -> None:
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-12])
    assert recorded_steps(tmp_path) == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(MetricsError, match="metrics.jsonl:2: is no row"):
        read_metrics(path)
    with pytest.raises(MetricsError, match="cannot be read"):
        read_metrics(tmp_path / "absent")


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with MetricWriter(tmp_path, False, None) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [row[name] for name in "abcd"] == [None, None, None, 1.0]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    with MetricWriter(tmp_path / "run", True, None, enabled=False) as writer:
        writer.write(1, {"a": 1.0})
    assert not any(tmp_path.iterdir())


def test_tensorboard(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("tensorboardX")
    with MetricWriter(tmp_path, True, None) as writer:
        writer.write(1, {"train/loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricWriter(tmp_path, True, 1) as writer:
        writer.write(2, {"train/loss": 1.0})
    assert recorded_steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("\n") == 1


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_lines(capsys: Any) -> None:
    clock = Clock()
    with Progress(3000, 100, 2410, Display(terminal=False, clock=clock)) as progress:
        for step in range(110, 401, 10):
            clock.now += 1.0
            progress.update(step, 2.712, 2e-2)
        progress.print("a sample [bold]")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 200/3000  loss 2.712  lr 2.0e-02  tokens/s 24,100  left 4:40",
        "step 300/3000  loss 2.712  lr 2.0e-02  tokens/s 24,100  left 4:30",
        "step 400/3000  loss 2.712  lr 2.0e-02  tokens/s 24,100  left 4:20",
        "a sample [bold]",
    ]


def test_the_last_step_has_a_line_and_other_processes_have_none(capsys: Any) -> None:
    with Progress(20, 0, 1, Display(terminal=False)) as progress:
        progress.update(10, 1.0, 0.1)
        progress.update(20, math.nan, 0.1)
    assert capsys.readouterr().out.startswith("step 20/20  loss nan")
    with Progress(20, 0, 1, Display(enabled=False)) as progress:
        progress.update(20, 1.0, 0.1)
        progress.print("text")
    assert capsys.readouterr().out == ""


def test_the_bar_of_a_terminal(monkeypatch: Any) -> None:
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", screen)
    with Progress(3000, 100, 10, Display(terminal=True)) as progress:
        progress.update(200, 2.5, 2e-2)
        progress.print("a sample [bold]")
    assert "a sample [bold]\n" in screen.getvalue()
    assert "loss 2.500" in screen.getvalue() and "elapsed 0:00" in screen.getvalue()


def make_rows(steps: int) -> list[dict[str, Any]]:
    """What a run of `steps` might leave, with a null."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        loss = 2.2 + 4 * math.exp(-step / 400)
        rows.append({"step": step, "train/loss": loss + 0.15 * rng.normal()})
        if step % 100 == 0:
            gap = 1e-4 + 2.0 * max(0.0, step / steps - 0.4) ** 2
            rows.append({"step": step, "eval/loss": loss + 0.05, "eval/causal_gap": gap})
            rows[-1]["eval/loss_frozen_g"] = loss + 0.05 + gap
            for i, name in enumerate(("A", "A_LM", "A_P", "G_LM")):
                rows[-1][f"eval/order_parameter/{name}"] = 10 ** (-1 - i - step / steps)
    rows[5]["train/loss"] = None
    return rows


def write_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ink(path: Path) -> int:
    """Coloured pixels, which only curves have."""
    pixels = image.imread(path)[..., :3]
    return int((np.ptp(pixels, axis=-1) > 0.2).sum())


def test_curves(tmp_path: Path) -> None:
    write_rows(tmp_path / "nano", make_rows(3000))
    path = write_curves(tmp_path / "nano")
    assert path == tmp_path / "nano" / "curves.png"
    assert ink(path) > 5000
    assert sorted(p.name for p in path.parent.iterdir()) == ["curves.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "train/loss": None}],
        [{"step": 1}],
        [{"step": 1, "eval/causal_gap": -0.5, "eval/order_parameter/A": 0.0}],
        [{"step": 100, "train/loss": 3.0, "eval/causal_gap": 0.0, "eval/order_parameter/A": 1e-3}],
    ],
)
def test_curves_of_little(tmp_path: Path, rows: list[dict[str, Any]], recwarn: Any) -> None:
    write_rows(tmp_path, rows)
    path = write_curves(tmp_path)
    assert path is not None and path.stat().st_size > 10_000
    assert not recwarn.list


def test_no_curves_without_metrics(tmp_path: Path) -> None:
    assert write_curves(tmp_path) is None
    write_rows(tmp_path, [])
    assert write_curves(tmp_path) is None


def test_summary_table() -> None:
    table = summary_table({"held-out loss": "2.31", "a [b]": "c [d]"}, title="nano")
    assert table.splitlines()[0].strip() == "nano"
    assert [line.split("  ") for line in map(str.strip, table.splitlines())][1][
        0
    ] == "held-out loss"
    assert "2.31" in table and "a [b]" in table and "c [d]" in table


def test_rows_go_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an id of the run: the same after a restart and a move, another in a new run."""
    sent: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((step, values))

        def finish(self) -> None:
            sent.append("finished")

    def init(**settings: Any) -> Run:
        sent.append(settings)
        return Run()

    def write(run_dir: Path, step: int) -> None:
        config = {"Model": {"num_layers": 2}}
        resume = step - 1 or None
        with MetricWriter(run_dir, False, resume, wandb_project="mine", config=config) as writer:
            writer.write(step, {"train/loss": 2.5})

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    write(tmp_path / "run", 1)
    write(tmp_path / "run", 2)
    (tmp_path / "run").rename(tmp_path / "moved")
    write(tmp_path / "moved", 3)
    write(tmp_path / "run", 1)
    first, again, moved, other = sent[::3]
    assert first["project"] == "mine" and first["resume"] == "allow"
    assert first["config"] == {"Model": {"num_layers": 2}}
    assert sent[1:3] == [(1, {"train/loss": 2.5}), "finished"]
    assert first == again and first["id"] == moved["id"] != other["id"]


@pytest.mark.parametrize("error", [ValueError("api_key not configured\nrun wandb login"), None])
def test_weights_and_biases_that_cannot_be_used_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def init(**_: Any) -> None:
        assert error is not None
        raise error

    module = None if error is None else types.SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(MetricsError, match=r"^Training\.wandb_project = 'mine': ") as found:
        MetricWriter(tmp_path, False, None, wandb_project="mine")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "5"}',
        '{"step": true}',
        '{"step": 2.0}',
        '{"step": -1}',
        '{"step": null}',
        '{"step": 2, "train/loss": "low"}',
        '{"step": 2, "train/loss": [1.0]}',
        '{"step": 2, "train/loss": false}',
        '{"step": 2, "train/loss": 1' + "0" * 400 + "}",
        "[2]",
        "2",
        "[" * 99999,
        "\xff",
    ],
)
def test_a_row_of_another_type_is_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n' + line.encode("latin-1") + b'\n{"step": 3}\n'
    )
    for read in (read_metrics, write_curves, lambda path: MetricWriter(path, False, 3)):
        with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: .*; remove the line$") as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KB."""
    with small_disk(tmp_path / "disk", 64) as folder:
        yield folder


def fill(folder: Path) -> None:
    """Leaves no byte free."""
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 100)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_is_one_line_and_loses_nothing(full_disk: Path, tensorboard: bool) -> None:
    run_dir = full_disk / "run"
    writer = MetricWriter(run_dir, tensorboard, None)
    writer.write(1, {"train/loss": 1.0})
    before = (run_dir / "metrics.jsonl").read_bytes()
    fill(full_disk)
    with pytest.raises(
        MetricsError, match=r"cannot be written \(No space left on device\)"
    ) as error:
        for step in range(2, 200):
            before = (run_dir / "metrics.jsonl").read_bytes()
            writer.write(step, {"train/loss": 1.0, "train/accuracy": 0.5})
    assert "\n" not in str(error.value)
    writer.close()
    after = (run_dir / "metrics.jsonl").read_bytes()
    assert after.startswith(before) and after.endswith(b"}\n")
    (full_disk / "filler").unlink()
    last = recorded_steps(run_dir)[-1]
    with MetricWriter(run_dir, tensorboard, last) as writer:
        writer.write(last + 1, {"train/loss": 1.0})
    assert recorded_steps(run_dir) == list(range(1, last + 2))


def test_a_full_disk_leaves_samples_and_curves_whole(full_disk: Path) -> None:
    append_sample(full_disk, 1, "a sample")
    write_rows(full_disk, [{"step": 1, "train/loss": 2.0}])
    (full_disk / "curves.png").write_bytes(b"earlier")
    fill(full_disk)
    names = {path.name for path in full_disk.iterdir()}
    for act in (lambda: append_sample(full_disk, 2, "x" * 9999), lambda: write_curves(full_disk)):
        with pytest.raises(OSError, match="No space left"):
            act()
    assert (full_disk / "samples.txt").read_bytes() == b"--- step 1\na sample\n"
    assert (full_disk / "curves.png").read_bytes() == b"earlier"
    assert {path.name for path in full_disk.iterdir()} == names
