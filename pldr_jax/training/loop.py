"""The training run: from a config and a run folder to checkpoints, metrics, samples and curves.

What a run folder holds:

    config.gin       the operative config, which can be fed back as a gin file
    tokenizer.model  the tokenizer of the text
    checkpoints/     weights, optimiser state, data position and config of some steps
    metrics.jsonl    one JSON object a row: training metrics and evaluations, each with its step
    samples.txt      the text generated at each evaluation
    tensorboard/     the metrics for TensorBoard
    curves.png       loss, causal gap and order parameter against steps
"""

import math
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ExperimentConfig
from pldr_jax.data.corpus import Corpus, prepare
from pldr_jax.data.pipeline import TrainIterator, train_iterator, validation_rows
from pldr_jax.flags import config_from_dict, config_to_dict, describe_differences, dump_config
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.request import Request
from pldr_jax.model.deductive import g_lm_shape, predefined_g_lm
from pldr_jax.model.shapes import count_params
from pldr_jax.partition import batch_sharding, build_mesh
from pldr_jax.training.checkpoint import Checkpointer
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.metrics import MetricWriter
from pldr_jax.training.plots import summary_table, write_curves
from pldr_jax.training.progress import Progress
from pldr_jax.training.signals import StopRequest, stop_on_signals
from pldr_jax.training.step import TrainState, abstract_state, create_state, jit_train_step

SAMPLES = "samples.txt"


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line, and what was saved before stays."""


def train(config: ExperimentConfig, run_dir: str | Path, resume: str = "auto") -> dict[str, float]:
    """Trains to `Training.steps`, from the start or from where the run folder stands.

    The order of a start: what can be refused at once, then text, state, checkpoint, loop.

    Args:
      config: everything that defines the run.
      run_dir: made if it does not exist.
      resume: "auto" continues a run that is there, "never" refuses to touch one, "required"
        refuses to start anew.

    Returns:
      The metrics of the last evaluation.

    Raises:
      ConfigError: a config that cannot be used here, or another model than the run folder's.
      TrainingError: a loss that is not finite.
    """
    run_dir = Path(run_dir)
    with Checkpointer(run_dir, config.checkpoint) as checkpointer:
        latest = checkpointer.latest_step()
        if latest is None and resume == "required":
            raise ConfigError(
                f"--resume=required: {run_dir} holds no checkpoint; start it without the flag"
            )
        if latest is not None and resume == "never":
            raise ConfigError(
                f"--resume=never: {run_dir} already holds step {latest}; choose another --run_dir"
            )
        mesh = build_mesh(config.mesh)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.data.batch_size % shards:
            config.data.fail(
                "batch_size",
                f"must be a multiple of the {shards} devices of Mesh.data x Mesh.fsdp",
            )
        corpus = prepare(config.data, config.model.vocab_size)
        # From here on there is something to save; a signal before this ends the program at once.
        with jax.set_mesh(mesh), stop_on_signals() as stop:
            return _Run(config, run_dir, corpus, mesh, checkpointer, stop).go(latest is not None)


class _Run:
    """One process's part of a run, from the restored state to the last step."""

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        corpus: Corpus,
        mesh: Mesh,
        checkpointer: Checkpointer,
        stop: StopRequest,
    ) -> None:
        self._config, self._run_dir, self._corpus, self._mesh = config, run_dir, corpus, mesh
        self._checkpointer, self._stop = checkpointer, stop
        self._is_main = jax.process_index() == 0
        self._data: TrainIterator = train_iterator(
            corpus.train,
            config.model.context_length,
            config.data.batch_size,
            config.data.seed,
            jax.process_index(),
            jax.process_count(),
        )
        held_out = validation_rows(
            corpus.validation, config.model.context_length, config.training.eval_rows
        )
        self._evaluator = Evaluator(
            config.model,
            mesh,
            held_out.rows_RC,
            held_out.calibration_RC,
            config.data.batch_size,
            corpus.validation.bytes_per_token,
        )

    def go(self, restore: bool) -> dict[str, float]:
        config = self._config
        state, start = self._restored() if restore else (self._fresh(), 0)
        if self._is_main:
            self._write_run_files(start)
        writer = MetricWriter(
            self._run_dir, config.training.tensorboard, start, enabled=self._is_main
        )
        row_tokens = config.data.batch_size * config.model.context_length
        progress = Progress(config.training.steps, start, row_tokens, enabled=self._is_main)
        try:
            with progress, writer:
                progress.print(self._heading(start))
                return self._loop(state, start, writer, progress)
        finally:
            self._data.close()

    def _fresh(self) -> TrainState:
        return create_state(self._config, self._mesh, predefined_g_lm(self._config.model))

    def _restored(self) -> tuple[TrainState, int]:
        stored = self._checkpointer.read_config()
        if stored is not None:
            self._check_same_model(config_from_dict(stored, str(self._run_dir)))
        self._check_same_tokenizer()
        model = self._config.model
        # Its shape is enough: the checkpoint holds the tensor, and Model.g_file may be gone.
        has_g_lm = model.g_source in ("random", "external")
        g_lm: Any = jax.ShapeDtypeStruct(g_lm_shape(model), np.float32) if has_g_lm else None
        target = abstract_state(self._config, self._mesh, g_lm)
        restored = self._checkpointer.restore(target)
        self._data.state = restored.data_state
        return restored.state, restored.step

    def _check_same_model(self, saved: ExperimentConfig) -> None:
        how = {f"Model.{name}:" for name in ("dtype", "remat", "unroll", "attention_kernel")}
        changed = [
            difference
            for difference in describe_differences(saved, self._config, ["Model"])
            if difference.split(" ")[0] not in how  # these change how it is computed, not what
        ]
        if changed:
            raise ConfigError(
                f"{self._run_dir}: holds another model ({'; '.join(changed)}); "
                "take the old values or another --run_dir"
            )
        for difference in describe_differences(saved, self._config):
            print(f"note: continuing with {difference}")

    def _check_same_tokenizer(self) -> None:
        """The ids of another tokenizer, as of changed text, mean nothing to the weights."""
        path = self._run_dir / "tokenizer.model"
        if path.is_file() and path.read_bytes() != self._corpus.tokenizer.model_bytes:
            raise ConfigError(
                f"{self._run_dir}: has another tokenizer than the text of Data.source gives now; "
                f"set Data.tokenizer = {str(path)!r}, or take another --run_dir"
            )

    def _write_run_files(self, start: int) -> None:
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            _replace(self._run_dir / "config.gin", dump_config(self._config).encode())
            _replace(self._run_dir / "tokenizer.model", self._corpus.tokenizer.model_bytes)
            samples = self._run_dir / SAMPLES
            if samples.exists():
                _replace(samples, _samples_until(samples.read_bytes(), start))
        except OSError as error:
            raise ConfigError(
                f"--run_dir={self._run_dir}: cannot be written to ({error.strerror}); "
                "name another folder"
            ) from None

    def _heading(self, start: int) -> str:
        config = self._config
        devices = f"{self._mesh.size} x {jax.devices()[0].device_kind}"
        verb = f"continuing at step {start}" if start else "training"
        return (
            f"{verb}: {count_params(config.model):,} parameters, {config.training.steps:,} steps "
            f"of {config.data.batch_size} x {config.model.context_length} tokens, on {devices}; "
            f"run folder {self._run_dir}"
        )

    def _loop(
        self, state: TrainState, start: int, writer: MetricWriter, progress: Progress
    ) -> dict[str, float]:
        training, total = self._config.training, self._config.training.steps
        step_fn = jit_train_step(self._config, self._mesh, state)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        evaluation: dict[str, float] = {}
        for step in range(start + 1, total + 1):
            state, metrics = step_fn(state, self._next_batch())
            # Reading the metrics of the step before leaves the device one step of work: it never
            # waits for the host.
            if pending is not None:
                self._read(*pending, writer, progress)
            pending = (step, metrics)
            stopping = self._stop.signal_name is not None and step < total
            evaluates = step % training.eval_every == 0 or step == total
            saves = step % self._config.checkpoint.every_steps == 0 or step == total or stopping
            if evaluates or saves:
                # Also before a save: a state that is not finite must not become a checkpoint.
                self._read(*pending, writer, progress)
                pending = None
            if evaluates:
                evaluation = self._evaluate(state, step, writer, progress)
            if saves:
                self._save(
                    step, state, evaluation if evaluates else {}, wait=stopping or step == total
                )
            if stopping:
                progress.print(
                    f"{self._stop.signal_name}: saved step {step} of {total} in {self._run_dir}; "
                    "the same command continues from here"
                )
                return evaluation
        if start >= total:
            progress.print(f"{self._run_dir} is at step {start} of {total}: nothing left to train")
            evaluation = self._evaluator(state.params, state.g_lm)
        if self._is_main:
            curves = write_curves(self._run_dir)
            progress.print(_summary(evaluation) + (f"\ncurves: {curves}" if curves else ""))
        return evaluation

    def _next_batch(self) -> jax.Array:
        rows = next(self._data)
        shape = (self._config.data.batch_size, rows.shape[1])
        return jax.make_array_from_process_local_data(
            batch_sharding(self._mesh, shape), rows, shape
        )

    def _read(
        self, step: int, metrics: dict[str, jax.Array], writer: MetricWriter, progress: Progress
    ) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        training = self._config.training
        if step % training.log_every == 0 or step == training.steps or broken:
            writer.write(step, values)
        progress.update(step, values["train/loss"], values["train/learning_rate"])
        if broken:
            self._checkpointer.wait()
            last = self._checkpointer.latest_step()
            kept = (
                f"step {last} in {self._run_dir} is the last good checkpoint"
                if last
                else "no checkpoint was saved yet"
            )
            raise TrainingError(
                f"step {step}: {broken[0]} = {values[broken[0]]}; {kept}. "
                "Lower Optimizer.learning_rate or raise Optimizer.warmup_steps"
            )

    def _evaluate(
        self, state: TrainState, step: int, writer: MetricWriter, progress: Progress
    ) -> dict[str, float]:
        evaluation = self._evaluator(state.params, state.g_lm)
        writer.write(step, evaluation)
        progress.print(self._report(step, evaluation))
        sample = self._sample(state)
        if sample:
            progress.print(sample)
            with (self._run_dir / SAMPLES).open("ab") as file:
                file.write(f"--- step {step}\n{sample}\n".encode())
        return evaluation

    def _report(self, step: int, evaluation: dict[str, float]) -> str:
        report = (
            f"step {step}: held-out loss {evaluation['eval/loss']:.4f}, "
            f"{evaluation['eval/bits_per_byte']:.3f} bits a byte"
        )
        if "eval/causal_gap" not in evaluation:
            return report
        gap = evaluation["eval/causal_gap"]
        order = evaluation["eval/order_parameter/G_LM"]
        report += f", causal gap {gap:+.5f}, order parameter of G_LM {order:.1e}"
        if abs(gap) > self._config.training.gap_threshold:
            report += (
                f"\nwarning: with G_LM of another text the loss changes by {gap:+.3f}: the model "
                "is using its future through G_LM and will not generate as well as its loss says"
            )
        return report

    def _sample(self, state: TrainState) -> str:
        training, tokenizer = self._config.training, self._corpus.tokenizer
        prompt = tokenizer.encode(training.sample_prompt)[: self._config.model.context_length - 1]
        if not prompt or jax.process_count() > 1:
            return ""
        engine = Engine(self._config.model, state.params, state.g_lm)
        request = Request(tuple(prompt), training.sample_tokens, stop_ids=(tokenizer.eos_id,))
        (completion,) = engine.generate([request], rows=1)
        return training.sample_prompt + tokenizer.decode(completion.tokens)

    def _save(self, step: int, state: TrainState, evaluation: dict[str, float], wait: bool) -> None:
        self._checkpointer.save(
            step, state, self._data.state, config_to_dict(self._config), evaluation, wait=wait
        )


def _replace(path: Path, content: bytes) -> None:
    """Writes a file all at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _samples_until(samples: bytes, last_step: int) -> bytes:
    """The samples up to `last_step`: the steps after it are trained, and sampled, again."""
    for header in re.finditer(rb"^--- step (\d+)$", samples, re.MULTILINE):
        if int(header[1]) > last_step:
            return samples[: header.start()]
    return samples


def _summary(evaluation: dict[str, float]) -> str:
    """The last evaluation as a table, one metric a line."""

    def shown(value: float) -> str:
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"

    return summary_table({name: shown(value) for name, value in evaluation.items()})
