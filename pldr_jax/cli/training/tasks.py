"""Tasks of the harness, for `pldr-eval` and for the evaluations of `train.py --eval_tasks`."""

from typing import TYPE_CHECKING, Any

from pldr_jax.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from pldr_jax.data.text.tokenizer import Tokenizer
    from pldr_jax.evaluation.harness import TaskSet
    from pldr_jax.training.loop import TaskMetrics


def open_tasks(
    names: str, limit: int | None = None, num_fewshot: int | None = None, flag: str = "tasks"
) -> "TaskSet":
    """Tasks by their names.

    Raises:
      ConfigError: the harness is not installed, or a task that it does not have.
    """
    for name, value, low in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < low:
            raise ConfigError(f"--{name}={value}: must be at least {low}")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--{flag}: need lm-evaluation-harness, which is not installed; "
            "pip install 'pldr_jax[eval]'"
        ) from None
    from pldr_jax.evaluation.harness import TaskSet
    from pldr_jax.evaluation.task_files import find_tasks

    return TaskSet(find_tasks(names), limit, num_fewshot)


def task_metrics(names: str, limit: int | None, rows: int) -> "TaskMetrics":
    """What a training run calls at its evaluations: `eval/tasks/<task>/<metric>`, with G_LM of the
    context alone where it is learned.

    Raises:
      ConfigError: as `open_tasks`, or the run has several processes.
    """
    import jax

    tasks = open_tasks(names, limit, flag="eval_tasks")
    if jax.process_count() > 1:
        raise ConfigError("--eval_tasks: runs in one process; use pldr-eval on the checkpoints")
    from pldr_jax.api import LanguageModel
    from pldr_jax.evaluation.report import as_metrics
    from pldr_jax.evaluation.scorer import TextScorer

    def measure(
        config: ModelConfig, params: Any, g_lm: Any, tokenizer: "Tokenizer", mesh: "Mesh"
    ) -> dict[str, float]:
        lm = LanguageModel(config, params, g_lm, tokenizer, mesh=mesh if mesh.size > 1 else None)
        mode: Any = "causal" if config.g_source == "learned" else "frozen"
        return as_metrics(tasks.evaluate(TextScorer(lm, mode, rows)))

    return measure
