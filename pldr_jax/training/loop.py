"""The training run: from a config and a run folder to checkpoints, metrics, samples and curves.

What a run folder holds:

    config.gin       the operative config, which can be fed back as a gin file
    tokenizer.model  the tokenizer of the text
    checkpoints/     weights, optimiser state, data position and config of some steps
    metrics.jsonl    one JSON object a line: training metrics and evaluations, each with its step
    samples.txt      the text generated at each evaluation
    tensorboard/     the metrics for TensorBoard
    curves.png       loss, causal gap and order parameter against steps
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from pldr_jax.config import ExperimentConfig, ModelConfig, SamplingConfig
from pldr_jax.config.load import config_from_dict, config_to_dict
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import locked
from pldr_jax.hosts import agree, any_process, code_facts, ending_with_the_others
from pldr_jax.inference.engine import Engine
from pldr_jax.inference.request import DecodeOptions, Request
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import count_adapter_params
from pldr_jax.partition import batch_sharding, build_mesh
from pldr_jax.runs.checkpoint import BEST_METRIC, Checkpointer
from pldr_jax.runs.folder import check_same_run, write_run_files
from pldr_jax.runs.remote.place import RunPlace, open_run
from pldr_jax.terminal import print_line
from pldr_jax.training.evaluate import Evaluator
from pldr_jax.training.optimizer import Averaged
from pldr_jax.training.profile import Profiler
from pldr_jax.training.record import Record
from pldr_jax.training.signals import StopRequest, stop_on_signals
from pldr_jax.training.start import (
    RunData,
    check_batch_size,
    check_enough_text,
    check_resume,
    config_facts,
    first_state,
    open_data,
    restore,
)
from pldr_jax.training.step import (
    InitialWeights,
    Metrics,
    TrainState,
    jit_train_step,
    model_params,
)
from pldr_jax.training.task.evaluate import TaskEvaluator


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line, and what was saved before stays."""


COMPILING = "compiling the training step, usually 10 to 60 s, longer for large models"
TaskMetrics = Callable[[ModelConfig, Params, jax.Array | None, Tokenizer, Mesh], dict[str, float]]
"""Measures a model (config, parameters, predefined G_LM, tokenizer, mesh) on tasks."""


@ending_with_the_others()
def train(
    config: ExperimentConfig,
    run_dir: str | Path | RunPlace,
    resume: str = "auto",
    profile: str | None = None,
    initial: InitialWeights | None = None,
    task_metrics: TaskMetrics | None = None,
) -> dict[str, float]:
    """Trains to `Training.steps`, and returns the metrics of the last evaluation.

    Args:
      config: everything that defines the run.
      run_dir: made if it does not exist; a folder, or that of a bucket.
      resume: "auto" continues a run that is there, "never" refuses to touch one, "required"
        refuses to start anew.
      profile: "STEP:COUNT" writes a trace of those steps.
      initial: weights that a new run begins with, or the base of a continued run's adapters.
      task_metrics: more metrics for each evaluation.

    Raises:
      ConfigError: a config that cannot be used here, or another model than the run folder's.
      CheckpointError, MetricsError: the run folder cannot be read or written.
      TrainingError: a loss that is not finite.
    """
    agree(code_facts())
    with open_run(run_dir) as place:
        return _train(config, place, resume, profile, initial, task_metrics)


def _train(
    config: ExperimentConfig,
    place: RunPlace,
    resume: str,
    profile: str | None,
    initial: InitialWeights | None,
    task_metrics: TaskMetrics | None,
) -> dict[str, float]:
    run_dir, is_main = place.folder, jax.process_index() == 0
    profiler = Profiler(run_dir, profile)
    with Checkpointer(run_dir, config.checkpoint, mirror=place.mirror) as checkpointer:
        latest = checkpointer.latest_step()
        agree(config_facts(config) | {"the newest checkpoint in --run_dir": latest})
        goes_on = check_resume(place.name, resume, latest)
        mesh = build_mesh(config.mesh)
        check_batch_size(config, mesh)
        stored = checkpointer.read_config() if goes_on else None
        saved = None if stored is None else config_from_dict(stored, str(run_dir))
        data = open_data(config, saved, mesh, print_line if is_main else _ignore)
        config = data.config
        agree({"the text": data.batches.state, "Data.max_segments": config.data.max_segments})
        # From here on there is something to save; a signal before this ends the program at once.
        with (
            data.batches,
            locked(run_dir, enabled=is_main),
            jax.set_mesh(mesh),
            stop_on_signals() as stop,
        ):
            if goes_on:
                check_same_run(run_dir, saved, config, data.tokenizer.model_bytes)
                restored = restore(checkpointer, config, mesh, initial)
                state, start, position = restored.state, restored.step, restored.data_state
                data.batches.state = position
            else:
                state, start, position = first_state(config, mesh, initial), 0, {}
            check_enough_text(config, start, data.batches.batches_left)
            if is_main:
                files = {**({} if initial is None or start else initial.files), **data.files}
                write_run_files(run_dir, config, data.tokenizer.model_bytes, start, files)
            with profiler, Record(config, run_dir, start, data.tokens_per_step) as record:
                trainer = Trainer(data, mesh, checkpointer, record, stop, task_metrics)
                trainer.continue_from(position)
                return trainer.run(state, start, profiler)


def _ignore(line: str) -> None:
    """In processes other than the first."""


class Trainer:
    """Makes the updates of a run, evaluates and saves.

    Args:
      data: the text, and the config of the run.
      mesh: of the state and the batches.
      checkpointer: of the run folder.
      record: where metrics go.
      stop: set by a signal.
      task_metrics: more metrics for each evaluation.

    Attributes:
      best: lowest held-out loss so far.
    """

    def __init__(
        self,
        data: RunData,
        mesh: Mesh,
        checkpointer: Checkpointer,
        record: Record,
        stop: StopRequest,
        task_metrics: TaskMetrics | None = None,
    ) -> None:
        self._config, self._batches, self._tokenizer = data.config, data.batches, data.tokenizer
        self._mesh, self._checkpointer, self._record = mesh, checkpointer, record
        self._stop, self._task_metrics = stop, task_metrics
        evaluator: Any = Evaluator if data.config.task.kind is None else TaskEvaluator
        self._evaluator = evaluator(data.config, mesh, data.held_out, data.bytes_per_token)
        self.best = math.inf

    def continue_from(self, position: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint keeps beside the state; {} is the start of a run."""
        self._record.health.state = position.get("health", {})
        self.best = position.get("best") or math.inf

    def run(self, state: TrainState, start: int, profiler: Profiler) -> dict[str, float]:
        """Trains from step `start` on, and returns the metrics of the last evaluation."""
        training, total = self._config.training, self._config.training.steps
        self._record.print(self._heading(start))
        step_fn = jit_train_step(self._config, self._mesh, state)
        unread: tuple[int, Metrics, int] | None = None
        evaluation: dict[str, float] = {}
        for step in range(start + 1, total + 1):
            profiler.before(step)
            first = step == start + 1
            with self._record.waiting(COMPILING, at_once=True) if first else nullcontext():
                state, metrics = step_fn(state, self._next_batch())
            if profiler.after(step, metrics):
                self._record.print(f"trace: {profiler.folder}")
            # Reading the metrics of the step before leaves the device one step of work: it never
            # waits for the host.
            if unread is not None:
                self._read(*unread)
            unread = (step, metrics, self._batches.n_batches - 1)
            stopping = step < total and self._stops(step)
            evaluates = step == total or step % training.eval_every == 0
            saves = stopping or step == total or step % self._config.checkpoint.save_every == 0
            if evaluates or saves:
                # Also before a save: a state that is not finite must not become a checkpoint.
                self._read(*unread)
                unread = None
            if evaluates:
                evaluation = self._evaluate(state, step)
                saves |= self._is_best(evaluation)
            if saves:
                measured = evaluation if evaluates else {}
                self._save(step, state, measured, wait=stopping or step == total)
            if stopping:
                return self._stopped(step, evaluation)
        if start >= total:
            self._record.print(f"step {start} of {total}: nothing left to train")
            evaluation = self._evaluator(model_params(self._config, state), state.g_lm)
        self._record.summary(evaluation)
        return evaluation

    def _heading(self, start: int) -> str:
        config = self._config
        verb = f"continuing at step {start}" if start else "training"
        count = f"{count_params(config.model):,} parameters"
        if config.lora.rank:
            head = " and a head" if config.model.task is not None else ""
            adapters = count_adapter_params(config.model, config.lora)
            count = f"{adapters:,} in adapters{head} of {count}"
        return (
            f"{verb}: {count}, {config.training.steps:,} steps "
            f"of {config.data.batch_size} x {config.model.context_length} tokens, on "
            f"{self._mesh.size} x {jax.devices()[0].device_kind}; "
            f"run folder {self._checkpointer.name}"
        )

    def _next_batch(self) -> jax.Array:
        rows = next(self._batches)
        shape = (self._config.data.batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(
            batch_sharding(self._mesh, shape), rows, shape
        )

    def _stops(self, step: int) -> bool:
        """Whether a signal reached any process: all of them leave at the same step."""
        asked = self._stop.signal_name is not None
        if jax.process_count() == 1:
            return asked
        if step % self._config.training.log_every:
            return False  # asking the others costs time
        return any_process(asked)

    def _stopped(self, step: int, evaluation: dict[str, float]) -> dict[str, float]:
        cause = self._stop.signal_name or "a signal to another process"
        self._record.print(
            f"{cause}: saved step {step} of {self._config.training.steps} in "
            f"{self._checkpointer.name}; the same command continues from here"
        )
        return evaluation

    def _read(self, step: int, metrics: Metrics, batch: int) -> None:
        """Records the metrics of a step.

        Raises:
          TrainingError: they end the run.
        """
        cause = self._record.step(step, metrics, batch)
        if cause is None:
            return
        self._checkpointer.wait()
        last = self._checkpointer.latest_step()
        kept = (
            f"step {last} in {self._checkpointer.name} is the last good checkpoint"
            if last
            else "no checkpoint was saved yet"
        )
        raise TrainingError(
            f"step {step}: {cause}; {kept}. "
            "Lower Optimizer.learning_rate or raise Optimizer.warmup_steps"
        )

    def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
        with self._record.waiting("evaluating (compiled the first time)"):
            evaluation, sample = self._evaluated(state)
        self._record.evaluation(step, evaluation, sample)
        return evaluation

    def _evaluated(self, state: TrainState) -> tuple[dict[str, float], str]:
        """Metrics of the parameters, of their moving average and of tasks; and a sample."""
        params = model_params(self._config, state)
        evaluation = self._evaluator(params, state.g_lm)
        if isinstance(state.opt_state, Averaged):
            average = state.replace(params=state.opt_state.average)
            averaged = self._evaluator(model_params(self._config, average), state.g_lm)
            evaluation |= {
                name.replace("eval/", "eval/average/", 1): value for name, value in averaged.items()
            }
        if self._task_metrics is not None:
            evaluation |= self._task_metrics(
                self._config.model, params, state.g_lm, self._tokenizer, self._mesh
            )
        return evaluation, self._sample(params, state.g_lm)

    def _is_best(self, evaluation: Mapping[str, float]) -> bool:
        """Whether it is to be saved as the best one so far."""
        if not self._config.checkpoint.keep_best or not evaluation[BEST_METRIC] < self.best:
            return False
        self.best = evaluation[BEST_METRIC]
        return True

    def _sample(self, params: Params, g_lm: jax.Array | None) -> str:
        """The text that the model makes of the prompt; "" without one, and of a task. Every process
        takes part.
        """
        training, tokenizer = self._config.training, self._tokenizer
        if self._config.model.task is not None:
            return ""
        prompt = tokenizer.encode(training.sample_prompt)[: self._config.model.context_length - 1]
        if not prompt:
            return ""
        engine = Engine(self._config.model, params, g_lm)
        stop_ids = (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()
        sampling = SamplingConfig(training.sample_tokens, stop_ids=stop_ids)
        request = Request(tuple(prompt), sampling)
        (completion,) = engine.generate([request], DecodeOptions(1))
        return training.sample_prompt + tokenizer.decode_continuation(prompt, completion.tokens)

    def _save(self, step: int, state: TrainState, evaluation: dict[str, float], wait: bool) -> None:
        # Besides the state: what makes a run that goes on the same run.
        best = self.best if math.isfinite(self.best) else None
        position = {**self._batches.state, "health": self._record.health.state, "best": best}
        config = config_to_dict(self._config)
        kept = state.replace(base=None)
        self._checkpointer.save(step, kept, position, config, evaluation, wait=wait)
