"""All groups of the configuration together, and what they demand of each other.

A dataclass `XxxConfig` is the group `Xxx` of a config file or flag: `Model.num_layers = 5` in a
gin file, `--gin.Model.num_layers=5` on the command line (`pldr_jax/config/load.py`). Every field
carries its meaning, which `--help` prints, and its bounds, which `__post_init__` checks.
"""

import dataclasses
from typing import Any

from pldr_jax.config.annotations import show
from pldr_jax.config.data import DataConfig
from pldr_jax.config.fields import ConfigError, group_name
from pldr_jax.config.lora import LoraConfig
from pldr_jax.config.model import ModelConfig
from pldr_jax.config.optimizer import OptimizerConfig
from pldr_jax.config.sampling import GenerationConfig
from pldr_jax.config.task import TaskConfig
from pldr_jax.config.training import (
    CheckpointConfig,
    LossConfig,
    MeshConfig,
    TrainingConfig,
)

_GENERATOR = ("generator", "metric_learner", "couplings")
_RULES_OF_GENERATOR = ("generator_learning_rate", "metric_learner_weight_decay")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything that defines a run; each field is one group."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    training: TrainingConfig = TrainingConfig()
    generation: GenerationConfig = GenerationConfig()
    task: TaskConfig = TaskConfig()

    def __post_init__(self) -> None:
        for group in dataclasses.fields(self):
            value, config_class = getattr(self, group.name), type(group.default)
            if not isinstance(value, config_class):
                name = group_name(config_class)
                raise ConfigError(f"{name} = {show(value)}: must be a {config_class.__name__}")
        self._fit_task()
        self._check_schedule()
        if self.data.packing == "packed" and self.model.attention_kernel in ("cudnn", "flash"):
            self.model.fail("attention_kernel", "fused kernels know no segments; take 'auto'")
        dag_terms = (self.loss.dag_a_lm, self.loss.dag_a_p, self.loss.dag_g_lm)
        if self.model.g_source != "learned" and any(dag_terms):
            self.model.fail(
                "g_source",
                "a predefined G_LM cannot be regularised: set the Loss.dag_* coefficients to 0",
            )
        self._check_g_from()
        if self.loss.targets != "all" and self.data.keeps_segments:
            self.loss.fail("targets", "rows with segments know 'all' alone; take another packing")
        if self.model.g_source != "learned":
            self._check_no_generator()

    def _check_schedule(self) -> None:
        """Refuses steps of the schedule that are not in their order."""
        optimizer = self.optimizer
        if optimizer.schedule == "constant":
            return
        decay_steps = optimizer.decay_steps or self.training.steps
        if optimizer.warmup_steps >= decay_steps:
            optimizer.fail("warmup_steps", f"must be below the {decay_steps} steps of the schedule")
        last = optimizer.last_peak_step(decay_steps)
        if optimizer.schedule in ("hold", "wsd") and not (
            optimizer.warmup_steps <= last < decay_steps
        ):
            optimizer.fail(
                "hold_until",
                f"the peak lasts to step {last}: it must lie from warmup_steps, "
                f"{optimizer.warmup_steps}, to below the {decay_steps} steps of the schedule",
            )

    def _check_no_generator(self) -> None:
        """Refuses what only a model with a PLGA network has."""
        for name in _RULES_OF_GENERATOR:
            if getattr(self.optimizer, name) is not None:
                self.optimizer.fail(name, "a predefined G_LM has no generator")
        if any(group in _GENERATOR for group, _ in self.training.freeze):
            self.training.fail("freeze", f"a predefined G_LM has none of {', '.join(_GENERATOR)}")

    def without_generator(self) -> "ExperimentConfig":
        """The same config without the rate, the decay and the frozen groups of a PLGA network."""
        rules: dict[str, Any] = dict.fromkeys(_RULES_OF_GENERATOR)
        optimizer = dataclasses.replace(self.optimizer, **rules)
        kept = tuple(entry for entry in self.training.freeze if entry[0] not in _GENERATOR)
        training = dataclasses.replace(self.training, freeze=kept)
        return dataclasses.replace(self, optimizer=optimizer, training=training)

    def _fit_task(self) -> None:
        """Gives the model the head of `Task.kind`, as soon as its labels are known, and the data
        its rows: a text each.
        """
        if self.task.kind is None:
            if self.model.task is not None:
                task = dataclasses.replace(self.task, kind=self.model.task)
                object.__setattr__(self, "task", task)
            else:
                return
        kind, model = self.task.kind, self.model
        count = 2 if kind == "question" else len(self.task.labels) or model.num_labels
        if model.task not in (None, kind):
            self.task.fail("kind", f"the model has a {model.task} head; take another --init_from")
        if model.task is not None and model.num_labels != count:
            self.task.fail("labels", f"the model's head has {model.num_labels}; name as many")
        if count:
            model = dataclasses.replace(model, task=kind, num_labels=count)
            object.__setattr__(self, "model", model)
        if self.data.packing == "packed" or self.data.mixture:
            name = "mixture" if self.data.mixture else "packing"
            self.data.fail(name, "a task has a text a row, of Data.source; leave it out")
        data = dataclasses.replace(self.data, packing="document")
        object.__setattr__(self, "data", data)
        if self.loss.g_from != "row":
            self.loss.fail("g_from", "a task's labels are not in the text; take 'row'")
        if self.loss.targets != "all":
            self.loss.fail("targets", "a task's labels are not in the text; take 'all'")
        if self.training.eval_prefix_g:
            self.training.fail("eval_prefix_g", "a task predicts no text; take False")

    def _check_g_from(self) -> None:
        """Refuses a `Loss.g_from` that model, rows or batch do not allow."""
        loss, longest = self.loss, self.model.context_length - 1
        if loss.g_from != "row":
            if self.model.g_source != "learned":
                loss.fail("g_from", "a predefined G_LM is computed from no tokens; take 'row'")
            if self.data.keeps_segments and loss.g_from != "prompt":
                remedy = "take another packing, or 'prompt' for conversations"
                loss.fail("g_from", f"rows with segments know 'row' alone; {remedy}")
            if self.data.packing == "concat" and loss.g_from == "prompt":
                loss.fail("g_from", "a cut text has no prompt; take Data.packing = 'document'")
        if (loss.g_prefix_length or 1) > longest:
            loss.fail("g_prefix_length", f"a row has {longest} inputs; take at most that many")
        if (
            loss.g_from == "neighbour"
            and self.data.batch_size // self.training.grad_accumulation < 2
        ):
            loss.fail("g_from", "needs 2 rows a step, or part of one; raise Data.batch_size")
        if self.training.eval_prefix_g and self.data.keeps_segments:
            self.training.fail("eval_prefix_g", "rows with segments have no prefix; take False")


GROUPS: dict[str, type] = {
    group_name(type(f.default)): type(f.default) for f in dataclasses.fields(ExperimentConfig)
}
"""Group name -> dataclass, in the order in which `--help` lists them."""
