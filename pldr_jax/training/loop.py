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

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pldr_jax.config import ConfigError, ExperimentConfig, ModelConfig
from pldr_jax.config.load import config_from_dict, config_to_dict
from pldr_jax.data.mixture import TrainingText, open_training_text
from pldr_jax.data.segment_count import with_segment_count
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import locked
from pldr_jax.hosts import any_process
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.request import Request
from pldr_jax.model.decoder import Params
from pldr_jax.model.deductive import g_lm_shape, predefined_g_lm
from pldr_jax.model.flops import row_flops
from pldr_jax.model.shapes import count_params
from pldr_jax.partition import batch_sharding, build_mesh, process_part
from pldr_jax.runs.checkpoint import Checkpointer
from pldr_jax.runs.curves import write_curves
from pldr_jax.runs.files import (
    append_sample,
    check_same_model,
    check_same_tokenizer,
    with_its_segments,
    write_run_files,
)
from pldr_jax.runs.metrics import MetricWriter
from pldr_jax.terminal import Display, print_line
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.health import NONFINITE, Health
from pldr_jax.training.initial import InitialWeights, state_from
from pldr_jax.training.profile import Profiler
from pldr_jax.training.progress import Progress
from pldr_jax.training.report import report, summary
from pldr_jax.training.signals import StopRequest, stop_on_signals
from pldr_jax.training.step import TrainState, abstract_state, create_state, jit_train_step


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line, and what was saved before stays."""


TaskMetrics = Callable[[ModelConfig, Params, jax.Array | None, Tokenizer, Mesh], dict[str, float]]
"""Measures a model (config, parameters, predefined G_LM, tokenizer, mesh) on tasks."""


def train(
    config: ExperimentConfig,
    run_dir: str | Path,
    resume: str = "auto",
    profile: str | None = None,
    initial: InitialWeights | None = None,
    task_metrics: TaskMetrics | None = None,
) -> dict[str, float]:
    """Trains to `Training.steps`, from the start or from where the run folder stands.

    The order of a start: what can be refused at once, then text, state, checkpoint, loop.

    Args:
      config: everything that defines the run.
      run_dir: made if it does not exist.
      resume: "auto" continues a run that is there, "never" refuses to touch one, "required"
        refuses to start anew.
      profile: "STEP:COUNT" writes a trace of those steps.
      initial: weights that a new run begins with; a run that is continued does not use them.
      task_metrics: more metrics for each evaluation.

    Returns:
      The metrics of the last evaluation.

    Raises:
      ConfigError: a config that cannot be used here, or another model than the run folder's.
      TrainingError: a loss that is not finite.
    """
    run_dir = Path(run_dir)
    profiler = Profiler(run_dir, profile)
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
        shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], config.training.grad_accumulation
        if config.data.batch_size % (shards * parts):
            also = f" times the {parts} parts of Training.grad_accumulation" if parts > 1 else ""
            config.data.fail(
                "batch_size",
                f"must be a multiple of the {shards} devices of Mesh.data x Mesh.fsdp{also}",
            )
        text = open_training_text(config.data, config.model.vocab_size)
        stored = checkpointer.read_config() if latest is not None else None
        if stored is not None:
            config = with_its_segments(config, config_from_dict(stored, str(run_dir)))
        log = print_line if jax.process_index() == 0 else _silent
        config = with_segment_count(config, text, row_flops(config.model), log)
        # From here on there is something to save; a signal before this ends the program at once.
        with (
            locked(run_dir, enabled=jax.process_index() == 0),
            jax.set_mesh(mesh),
            stop_on_signals() as stop,
        ):
            run = _Run(
                config, run_dir, text, mesh, checkpointer, stop, profiler, initial, task_metrics
            )
            return run.go(latest is not None)


def _silent(line: str) -> None:
    """Says nothing: the first process speaks for all."""


class _Run:
    """One process's part of a run, from the restored state to the last step."""

    def __init__(
        self,
        config: ExperimentConfig,
        run_dir: Path,
        text: TrainingText,
        mesh: Mesh,
        checkpointer: Checkpointer,
        stop: StopRequest,
        profiler: Profiler,
        initial: InitialWeights | None,
        task_metrics: TaskMetrics | None,
    ) -> None:
        self._config, self._run_dir, self._text, self._mesh = config, run_dir, text, mesh
        self._checkpointer, self._stop, self._profiler = checkpointer, stop, profiler
        self._initial, self._task_metrics = initial, task_metrics
        self._is_main = jax.process_index() == 0
        self._health = Health(run_dir, config.training, self._is_main)
        self._data = text.train_batches(config, *process_part(mesh, config.data.batch_size))
        held_out = text.held_out_rows(config)
        self._evaluator = Evaluator(
            config.model,
            mesh,
            held_out.rows_BC,
            held_out.calibration_BC,
            config.data.batch_size,
            text.bytes_per_token,
            config.data.segments_per_row,
            config.training.eval_prefix_g,
        )

    def _check_epochs(self, start: int) -> None:
        steps, most = self._config.training.steps, start + self._data.batches_left
        if steps > most:
            self._data.close()
            self._config.training.fail(
                "steps",
                f"the text is used up after {most} steps, with Data.epochs = "
                f"{self._config.data.epochs}; lower it, or raise Data.epochs",
            )

    def go(self, restore: bool) -> dict[str, float]:
        config = self._config
        state, start = self._restored() if restore else (self._fresh(), 0)
        self._check_epochs(start)
        if self._is_main:
            tokenizer = self._text.tokenizer.model_bytes
            write_run_files(self._run_dir, self._config, tokenizer, start)
        writer = MetricWriter(
            self._run_dir,
            config.training.tensorboard,
            start,
            enabled=self._is_main,
            wandb_project=config.training.wandb_project,
        )
        step_tokens = round(
            config.data.batch_size * config.model.context_length * self._data.filled_share
        )
        progress = Progress(
            config.training.steps, start, step_tokens, Display(enabled=self._is_main)
        )
        try:
            with progress, writer:
                progress.print(self._heading(start))
                return self._loop(state, start, writer, progress)
        finally:
            self._profiler.close()
            self._data.close()

    def _fresh(self) -> TrainState:
        if self._initial is not None:
            return state_from(self._config, self._mesh, self._initial)
        return create_state(self._config, self._mesh, predefined_g_lm(self._config.model))

    def _restored(self) -> tuple[TrainState, int]:
        stored = self._checkpointer.read_config()
        if stored is not None:
            saved = config_from_dict(stored, str(self._run_dir))
            check_same_model(self._run_dir, saved, self._config)
        check_same_tokenizer(self._run_dir, self._text.tokenizer.model_bytes)
        model = self._config.model
        # Its shape is enough: the checkpoint holds the tensor, and Model.g_file may be gone.
        has_g_lm = model.g_source in ("random", "external")
        g_lm: Any = jax.ShapeDtypeStruct(g_lm_shape(model), np.float32) if has_g_lm else None
        target = abstract_state(self._config, self._mesh, g_lm)
        restored = self._checkpointer.restore(target)
        self._data.state = restored.data_state
        self._health.state = restored.data_state.get("health", {})
        return restored.state, restored.step

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
        pending: tuple[int, dict[str, jax.Array], int] | None = None
        evaluation: dict[str, float] = {}
        for step in range(start + 1, total + 1):
            self._profiler.before(step)
            state, metrics = step_fn(state, self._next_batch())
            if self._profiler.after(step, metrics):
                progress.print(f"trace: {self._profiler.folder}")
            # Reading the metrics of the step before leaves the device one step of work: it never
            # waits for the host.
            if pending is not None:
                self._read(*pending, writer, progress)
            pending = (step, metrics, self._data.n_batches - 1)
            stopping = self._stops(step) and step < total
            evaluates = step % training.eval_every == 0 or step == total
            saves = step % self._config.checkpoint.save_every == 0 or step == total or stopping
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
                cause = self._stop.signal_name or "a signal to another process"
                progress.print(
                    f"{cause}: saved step {step} of {total} in {self._run_dir}; the same command "
                    "continues from here"
                )
                return evaluation
        if start >= total:
            progress.print(f"{self._run_dir} is at step {start} of {total}: nothing left to train")
            evaluation = self._evaluator(state.params, state.g_lm)
        if self._is_main:
            curves = write_curves(self._run_dir)
            progress.print(summary(evaluation) + (f"\ncurves: {curves}" if curves else ""))
        return evaluation

    def _stops(self, step: int) -> bool:
        """Whether a signal reached any process: all of them leave at the same step."""
        asked = self._stop.signal_name is not None
        if jax.process_count() == 1:
            return asked
        if step % self._config.training.log_every:
            return False  # asking the others costs time
        return any_process(asked)

    def _next_batch(self) -> jax.Array:
        rows = next(self._data)
        shape = (self._config.data.batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(
            batch_sharding(self._mesh, shape), rows, shape
        )

    def _read(
        self,
        step: int,
        metrics: dict[str, jax.Array],
        batch: int,
        writer: MetricWriter,
        progress: Progress,
    ) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        broken = self._health.look(step, values, batch)
        training = self._config.training
        if step % training.log_every == 0 or step == training.steps or broken:
            writer.write(step, values | self._health.metrics())
        progress.update(step, values["train/loss"], values["train/learning_rate"])
        if broken and not self._health.stops:
            progress.print(
                f"step {step}: {broken[0]} = {values[broken[0]]}; the update of batch {batch} is "
                f"left out (noted in {self._run_dir / NONFINITE})"
            )
        elif broken:
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
        if self._task_metrics is not None:
            model, tokenizer = self._config.model, self._text.tokenizer
            evaluation |= self._task_metrics(model, state.params, state.g_lm, tokenizer, self._mesh)
        writer.write(step, evaluation)
        progress.print(report(step, evaluation, self._config.training.gap_threshold))
        sample = self._sample(state)
        if sample and self._is_main:
            progress.print(sample)
            append_sample(self._run_dir, step, sample)
        return evaluation

    def _sample(self, state: TrainState) -> str:
        """The text that the model makes of the prompt; "" without one. Every process takes part."""
        training, tokenizer = self._config.training, self._text.tokenizer
        prompt = tokenizer.encode(training.sample_prompt)[: self._config.model.context_length - 1]
        if not prompt:
            return ""
        engine = Engine(self._config.model, state.params, state.g_lm)
        request = Request(tuple(prompt), training.sample_tokens, stop_ids=(tokenizer.eos_id,))
        (completion,) = engine.generate([request], rows=1)
        return training.sample_prompt + tokenizer.decode_continuation(prompt, completion.tokens)

    def _save(self, step: int, state: TrainState, evaluation: dict[str, float], wait: bool) -> None:
        self._checkpointer.save(
            step,
            state,
            {**self._data.state, "health": self._health.state},
            config_to_dict(self._config),
            evaluation,
            wait=wait,
        )
