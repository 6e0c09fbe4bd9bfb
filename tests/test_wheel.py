"""The wheel is whole: installed into an empty environment it trains, away from any checkout."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import REPOSITORY

pytestmark = pytest.mark.slow

STEPS = 20


def run(*command: object, cwd: Path) -> str:
    """A command's output; it must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", cwd=REPOSITORY)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_what_the_programs_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"pldr_jax/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.gin")}
    assert len(configs) > 10 and configs <= names
    tasks = {
        f"pldr_jax/evaluation/tasks/{n}" for n in ("pldr_quiz.yaml", "quiz.jsonl", "text/words.txt")
    }
    assert tasks <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/"))]


def test_a_clean_environment_trains(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-compile", wheel, cwd=tmp_path)
    for guide in (REPOSITORY / "docs").glob("*.md"):
        shutil.copy(guide, tmp_path)
    small = [
        "--gin_file=pldr_110m.gin", "--gin.Data.source=*.md", "--gin.Data.tokenizer=None",
        "--gin.Model.vocab_size=400",
        "--gin.Model.num_layers=1", "--gin.Model.num_heads=2", "--gin.Model.head_dim=8",
        "--gin.Model.num_residual_layers=1", "--gin.Model.context_length=32",
        "--gin.Model.dtype=float32", "--gin.Data.batch_size=4", f"--gin.Training.steps={STEPS}",
        "--gin.Optimizer.warmup_steps=5", "--gin.Optimizer.decay_steps=20", "--gin.Mesh.fsdp=1",
    ]  # fmt: skip
    run(home / "bin" / "pldr-train", f"--run_dir={tmp_path / 'run'}", *small, cwd=tmp_path)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert f'"step": {STEPS}' in rows[-1]
    out = run(
        home / "bin" / "pldr-infer", "--checkpoint", tmp_path / "run", "--prompt", "some",
        "--max_new_tokens", 4, cwd=tmp_path,
    )  # fmt: skip
    assert "some" in out
    version = run(python, "-c", "import pldr_jax as p; print(p.__version__)", cwd=home)
    assert version.strip() == wheel.name.split("-")[1]
