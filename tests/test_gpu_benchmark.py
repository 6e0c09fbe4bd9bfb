"""`benchmarks/gpu.py` where nothing but JAX, Flax, Optax and NumPy is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = (
    "orbax", "grain", "sentencepiece", "tensorboardX", "matplotlib", "safetensors", "array_record",
    "torch",
)  # fmt: skip
PROGRAM = f"""
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
sys.path[:] = [path for path in sys.path if path not in ("", {str(ROOT)!r})]
sys.argv[0] = {str(ROOT / "benchmarks" / "gpu.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def rows_of(folder: Path, minutes: float, sections: list[str]) -> list[dict[str, Any]]:
    """Rows of the sections, each with the section's name."""
    options = ["--tiny", "--minutes", str(minutes), "--output", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OUT")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options, "--sections", *sections],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "gpu.json").read_text())
    return [{"in": name, **row} for name, rows in report["sections"].items() for row in rows]


def test_runs_with_few_packages(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 15, ["rates", "step", "prefill"])
    assert {row["in"] for row in rows} == {"rates", "training", "profile", "prefill"}
    assert not [row for row in rows if "error" in row or "skipped" in row], rows
    step = next(row for row in rows if row["in"] == "training")
    assert 0 < step["utilised"] < 1 and step["inputs"] % 2, "rows as train.py has them"
    assert "## rates" in (tmp_path / "gpu.md").read_text()
    for name in ("kernels.txt", "hlo_summary.txt", "step.hlo.gz"):
        assert (tmp_path / name).stat().st_size


def test_skips_what_there_is_no_time_for(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, 0.2, ["rates", "decode", "batches", "more"])
    later = [row for row in rows if row["in"] != "rates"]
    assert len(later) > 15 and {row.get("skipped") for row in later} == {"no time"}
