"""What the tests of whole runs share: a small text, a small config, the programs as a user starts
them."""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import pldr_jax
from pldr_jax.cli.common import keep_compiled_programs, run
from pldr_jax.config import ConfigError, ExperimentConfig, MeshConfig
from pldr_jax.config.load import config_from_dict, config_to_dict, load_config
from pldr_jax.data.mixture import open_training_text
from pldr_jax.data.pipeline import TrainIterator
from pldr_jax.data.shards.prepared import Manifest, ShardedTokens
from pldr_jax.data.shards.records import ShardWriter
from pldr_jax.model.decoder import init_params
from pldr_jax.model.deductive import predefined_g_lm
from pldr_jax.partition import build_mesh
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.training import loop
from pldr_jax.training.step import TrainState, abstract_state

REPOSITORY = Path(__file__).parents[1]
WORDS = "def return self the of value list for in if else print range tokens model layer".split()
STEPS = 12

TINY = {
    "Data.batch_size": 8,
    "Data.validation_fraction": 0.2,
    "Model.vocab_size": 300,
    "Model.num_layers": 2,
    "Model.num_heads": 2,
    "Model.head_dim": 8,
    "Model.num_residual_layers": 1,
    "Model.context_length": 32,
    "Optimizer.learning_rate": 1.5e-2,  # these four are the defaults, which train.py alone replaces
    "Optimizer.generator_learning_rate": None,
    "Optimizer.weight_decay": 1.0,
    "Optimizer.metric_learner_weight_decay": None,
    "Optimizer.warmup_steps": 2,
    "Optimizer.decay_steps": STEPS,
    "Training.steps": STEPS,
    "Training.log_every": 2,
    "Training.eval_every": 4,
    "Training.eval_rows": 12,
    "Training.gap_threshold": 1e-9,
    "Training.sample_tokens": 4,
    "Training.tensorboard": False,
    "Checkpoint.save_every": 3,
}
FINISHED = {"Training.tensorboard": True, "Checkpoint.save_every": 1}
QUICK = {"Training.steps": 2, "Training.sample_prompt": "", "Optimizer.warmup_steps": 1}


def make_corpus(folder: Path, documents: int = 40) -> Path:
    """A folder of small text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(documents):
        words = random.Random(k).choices(WORDS, k=300)
        (folder / f"{k:02d}.txt").write_text(f"document {k}\n{' '.join(words)}\n")
    return folder


@contextlib.contextmanager
def shared(session: Path) -> Iterator[Path]:
    """A folder that all workers of a session share, and that one at a time writes to."""
    folder = (session.parent if "PYTEST_XDIST_WORKER" in os.environ else session) / "shared"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@functools.cache
def corpus_of(session: Path) -> Path:
    """The text that the tests of one session share."""
    with shared(session) as folder:
        text = folder / "text"
        return text if text.exists() else make_corpus(text)


def overrides(source: Path, fields: dict[str, Any] | None = None) -> list[str]:
    """`Group.field=value` of the small config, with some fields changed."""
    chosen = {"Data.source": source, **TINY, **(fields or {})}
    return [f"{name}={value}" for name, value in chosen.items()]


def flags(source: Path, fields: dict[str, Any] | None = None) -> list[str]:
    """The same as flags of the programs."""
    return [f"--gin.{override}" for override in overrides(source, fields)]


def shard_of(
    folder: Path, tokens: np.ndarray, lengths: np.ndarray | None = None, vocab_size: int = 1 << 17
) -> ShardedTokens:
    """A prepared folder that holds these tokens, of documents of these lengths or of one."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    writer = ShardWriter(folder, "train-000000", dtype)
    writer.add(tokens, np.asarray([len(tokens)]) if lengths is None else lengths, 2 * len(tokens))
    splits = {"train": (writer.close(),)}
    manifest = Manifest(folder, {}, "", "", vocab_size, 3, dtype, {}, {}, splits)
    (folder / "manifest.json").write_bytes(manifest.dump())
    return ShardedTokens(manifest, "train")


def tiny_config(source: Path, fields: dict[str, Any] | None = None) -> ExperimentConfig:
    return load_config([], overrides(source, fields))


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """`python train.py ...` at the root of the repository, on one device."""
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_program(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return finish(start(program, *arguments))


def run_here(capsys: pytest.CaptureFixture[str], main: Any, *arguments: object) -> tuple[Any, ...]:
    """A program in this process: exit status, stdout, stderr."""
    capsys.readouterr()
    status: Any = 0
    with compiled_programs_kept():
        try:
            run(main, [str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    return status, *capsys.readouterr()


@contextlib.contextmanager
def compiled_programs_kept() -> Iterator[None]:
    """As the programs do, and only here: most of the time of these tests is compilation."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    keep_compiled_programs(None)
    reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


@functools.cache
def finished_run(session: Path) -> tuple[Path, str]:
    """The folder and the output of `train.py`, run once a session; nothing may change it."""
    text = corpus_of(session)
    with shared(session) as folder:
        run_dir, output = folder / "run", folder / "run.txt"
        if not output.exists():
            result = run_program("train.py", f"--run_dir={run_dir}", *flags(text, FINISHED))
            assert result.returncode == 0, result.stderr
            output.write_text(result.stdout)
        return run_dir, output.read_text()


@functools.cache
def untrained_run(session: Path) -> Path:
    """A run folder with two checkpoints of a model that was not trained, and whose G_LM depends on
    its input; nothing may change it.
    """
    source = corpus_of(session)
    with shared(session) as folder:
        run_dir = folder / "untrained"
        if not (run_dir / "tokenizer.model").exists():
            _save_untrained(run_dir, source)
        return run_dir


def _save_untrained(run_dir: Path, source: Path) -> None:
    config = tiny_config(source, {"Model.unroll": False, "Model.num_gated_units": 1})
    params = nn.unbox(jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(2)))
    plga = params["layers"]["attention"]["plga"]
    with Checkpointer(run_dir, config.checkpoint) as checkpointer:
        for step, scale in ((3, 20.0), (7, 2.0)):
            plga["a"] = scale * plga["a"]
            state = {"params": params, "g_lm": None}
            checkpointer.save(step, state, {}, config_to_dict(config), {}, wait=True)
    text = open_training_text(config.data, config.model.vocab_size)
    (run_dir / "tokenizer.model").write_bytes(text.tokenizer.model_bytes)


def frozen(lm: pldr_jax.LanguageModel, **arguments: Any) -> pldr_jax.LanguageModel:
    """A model with the G_LM of one text for all."""
    g_lm = lm([[5, 6, 7]]).deductive.G_LM
    config = dataclasses.replace(lm.config, g_source="external")
    params = jax.tree.map(lambda x: x, lm.params)
    del params["layers"]["attention"]["plga"]
    return pldr_jax.LanguageModel(config, params, g_lm, lm.tokenizer, **arguments)


def train_here(config: ExperimentConfig, run_dir: Path, **arguments: Any) -> dict[str, float]:
    """`train` in this process, on one of its devices."""
    with pytest.MonkeyPatch.context() as patch, compiled_programs_kept():
        patch.setattr(loop, "build_mesh", one_device_mesh)
        return loop.train(config, run_dir, **arguments)


def one_device_mesh(config: Any) -> jax.sharding.Mesh:
    return build_mesh(config, jax.devices()[:1])


def record_batches(patch: pytest.MonkeyPatch, on_batch: Any = lambda n: None) -> list[np.ndarray]:
    """Keeps each batch that training takes; `on_batch` is called with their number."""
    batches: list[np.ndarray] = []
    take = TrainIterator.__next__

    def record(self: TrainIterator) -> np.ndarray:
        batches.append(np.array(take(self)))
        on_batch(len(batches))
        return batches[-1]

    patch.setattr(TrainIterator, "__next__", record)
    return batches


def stored(run_dir: Path, step: int | None = None) -> tuple[TrainState, dict[str, Any], int]:
    """State, data position and step of a checkpoint."""
    with Checkpointer(run_dir, tiny_config(run_dir).checkpoint) as checkpointer:
        config = config_from_dict(checkpointer.read_config() or {})
        g_lm = predefined_g_lm(config.model)
        target = abstract_state(config, one_device_mesh(MeshConfig()), g_lm)
        restored = checkpointer.restore(target, step)
    return jax.device_get(restored.state), restored.data_state, restored.step


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit for bit: parameters, optimiser, data position, metrics, samples, config."""
    assert rows_of(one) == rows_of(other)
    for name in ("samples.txt", "config.gin", "tokenizer.model"):
        if (other / name).exists() or (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    (state, data, step), (other_state, *rest) = stored(one), stored(other)
    assert [data, step] == rest
    assert_same_bits(state, other_state)


def assert_same_bits(one: Any, other: Any) -> None:
    leaves, others = jax.tree.leaves_with_path(one), jax.tree.leaves_with_path(other)
    assert [path for path, _ in leaves] == [path for path, _ in others]
    for (path, x), (_, y) in zip(leaves, others, strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def config_error(files: Sequence[str] = (), overrides: Sequence[str] = ()) -> str:
    """The one line that `load_config` answers with."""
    with pytest.raises(ConfigError) as caught:
        load_config(files, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A new folder on a disk of its own; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
