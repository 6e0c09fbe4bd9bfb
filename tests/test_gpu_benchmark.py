"""`benchmarks/gpu.py` where nothing but JAX, Flax, Optax and NumPy is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_runs_with_few_packages_and_in_little_time(tmp_path: Path) -> None:
    options = ["--tiny", "--minutes", "0.4", "--output", str(tmp_path)]
    sections = ["--sections", "rates", "prefill", "decode", "training", "more"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OUT")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options, *sections],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = [row for rows in report["sections"].values() for row in rows]
    assert not [row for row in rows if "error" in row and "skipped" not in row], done.stdout
    assert {row["of"] for row in report["sections"]["rates"]} > {"bfloat16", "copy"}
    assert report["sections"]["more"][-1]["skipped"] == "no time"
    assert "## rates" in (tmp_path / "gpu.md").read_text()
