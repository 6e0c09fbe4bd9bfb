"""What every test file shares: eight simulated CPU devices, a cache folder, and the goldens."""

import dataclasses
import functools
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no folder asks no hub, but that of test_hub
# See _quick_compilation; for processes too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""  # later ones end the process at a flag that they have not
)

import jax
import numpy as np
import pytest
from jax._src import compiler
from safetensors.numpy import load_file

from pldr_jax.config import ModelConfig
from pldr_jax.interop.transformers import open_transformers
from pldr_jax.model.decoder import Params
from pldr_jax.runs.compiled import keep_programs

pytest.register_assert_rewrite("serving", "sources")  # plugins that test files also import from

# Before the backend starts, else this raises. Arrays that nobody places live on device 0.
jax.config.update("jax_num_cpu_devices", 8)

GOLDENS = Path(__file__).parent / "goldens"

OPTIMISED = (
    "test_parity", "test_convert", "test_pth", "test_model", "test_attention", "test_task_data",
)  # fmt: skip
"""Test files that compile as users do."""

SAME_BITS = ("test_engine", "test_prefix", "test_serve_slots")
"""Test files that compare programs of other shapes bit for bit, which the older code generator does
not keep."""

SLOW_FILES = (
    "test_analyze", "test_audits", "test_bucket_runs", "test_causal_training", "test_chat_data",
    "test_collectives",
    "test_convert_faults", "test_engine", "test_engine_queue", "test_evaluation", "test_finetune",
    "test_freeze",
    "test_given_g", "test_gpu", "test_gpu_benchmark", "test_harness", "test_hosts", "test_hub",
    "test_infer", "test_invariance", "test_job_results", "test_jobs", "test_kills", "test_laws",
    "test_lora", "test_low_rank", "test_low_rank_section",
    "test_mixture", "test_partition", "test_plan", "test_prefix",
    "test_resume", "test_run", "test_segment_count", "test_segments", "test_serve",
    "test_serve_chat", "test_serve_deductive", "test_serve_errors", "test_serve_faults",
    "test_serve_harness", "test_serve_models", "test_serve_page", "test_serve_slots",
    "test_structure_of_g", "test_sweep", "test_task_data", "test_task_training",
    "test_weights",
)  # fmt: skip
"""Test files that run whole programs, or compile many: `pytest -m slow` runs them."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them, before `-m` chooses."""
    for item in items:
        if item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@dataclasses.dataclass(frozen=True, eq=False)
class Golden:
    """One case: the authors' weights, and what their implementation printed for them.

    Attributes:
      folder: the checkpoint in the transformers layout.
      values: `golden.json`.
      tensors: `golden.safetensors`.
      config, params: the checkpoint, read.
      rows: the tokens [B,T+1], of which all but the last are inputs.
    """

    name: str
    folder: Path
    values: dict[str, Any]
    tensors: dict[str, np.ndarray]
    config: ModelConfig
    params: Params

    @property
    def rows(self) -> np.ndarray:
        return self.tensors["tokens"].astype(np.int32)


@functools.cache
def load_golden(name: str) -> Golden:
    folder = GOLDENS / name
    opened = open_transformers(folder)
    config, params = opened.config, opened.params
    # Scans compile in a fraction of the time; unrolled they give the same numbers (test_model.py).
    config = dataclasses.replace(config, unroll=False)
    values = json.loads((folder / "golden.json").read_text())
    return Golden(name, folder, values, load_file(folder / "golden.safetensors"), config, params)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("tiny")` or `golden("deep")`, read once in a session."""
    return load_golden


@pytest.fixture(scope="session", params=["tiny", "deep"])
def case(request: pytest.FixtureRequest) -> Golden:
    """Each golden in turn."""
    return load_golden(request.param)


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most of the time of the tests is compilation, which takes a fifth without most optimisations
    and with the older code generator. Numbers are compared with the authors' as users compile them.
    """
    name = request.module.__name__
    quick, older = name not in OPTIMISED, name not in OPTIMISED + SAME_BITS
    options = COMPILE_OPTIONS if older or not OLDER_EMITTER else _as_users_generate
    before = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options
    if before != (quick, options):
        jax.config.update("jax_disable_most_optimizations", quick)
        compiler.get_compile_options = options
        jax.clear_caches()
    yield


COMPILE_OPTIONS = compiler.get_compile_options
OLDER_EMITTER = "xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]


def _as_users_generate(*args: Any, **kwargs: Any) -> Any:
    options = COMPILE_OPTIONS(*args, **kwargs)
    emitters = ("xla_cpu_use_fusion_emitters", True)
    options.env_option_overrides = [*options.env_option_overrides, emitters]
    return options


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache of tokenised text."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:
            folder = folder.parent  # shared by the workers: what one compiled, the other reads
        patch.setenv("PLDR_CACHE", str(folder / "pldr_cache"))
        # What a file or a worker has compiled, the others read.
        keep_programs(folder / "compiled", 0.3)
        yield


@pytest.fixture
def gin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a gin file into the current folder and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "a.gin") -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write
