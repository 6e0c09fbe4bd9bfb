"""lm-evaluation-harness: this package as a model of it, and one function that runs tasks.

This is the only file that knows the harness. Importing it registers the model `pldr_jax`:

    python -c "import pldr_jax.evaluation.harness; from lm_eval.__main__ import cli_evaluate;
    cli_evaluate()" run --model pldr_jax --model_args path=RUN,mode=causal --tasks piqa
"""

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager

from pldr_jax.api import load
from pldr_jax.config import ConfigError
from pldr_jax.evaluation.scorer import TextScorer
from pldr_jax.evaluation.task_files import Task, task_folder

_SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}
"""Those of the harness's own program."""

# Local tasks ask no network for anything; `datasets` would count each loading of a file somewhere.
_NO_NETWORK = mock.patch.multiple(
    "datasets.config", HF_UPDATE_DOWNLOAD_COUNTS=False, HF_DATASETS_OFFLINE=True
)


@register_model("pldr_jax")
class HarnessModel(LM):
    """The harness's view of a `TextScorer`.

    Args:
      path: a checkpoint that `pldr_jax.load` opens.
      scorer: in place of `path`.
      mode: "full", "causal" or "frozen".
      batch_size: texts side by side, or "auto"; no result depends on it.
      overlap: tokens of context of the later windows of rolling requests.
      max_batch_size, device: of the harness's own program; of no use here.

    Raises:
      ConfigError: an argument that cannot be used, or that does not exist.
    """

    def __init__(
        self,
        path: str = "",
        scorer: TextScorer | None = None,
        mode: Any = "causal",
        batch_size: int | str = 8,
        overlap: int = 1,
        max_batch_size: Any = None,
        device: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name, value in unknown.items():
            raise ConfigError(
                f"model argument {name} = {value!r}: there is none of this name; there are path, "
                "mode, batch_size and overlap"
            )
        rows = 8 if str(batch_size).startswith("auto") else _whole("batch_size", batch_size)
        if scorer is None and not path:
            raise ConfigError("model argument path: is missing; name a checkpoint")
        overlap = _whole("overlap", overlap)
        self.scorer = scorer or TextScorer(load(path), mode, rows, overlap=overlap)

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """See `TextScorer.loglikelihood`."""
        return self.scorer.loglikelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """See `TextScorer.loglikelihood_rolling`."""
        return self.scorer.loglikelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """See `TextScorer.generate_until`."""
        return self.scorer.generate_until([request.args for request in requests])


class TaskSet:
    """Tasks of the harness, found and checked before a model is read.

    Args:
      tasks: those of `evaluation/task_files.py`.
      limit: examples of each task; None takes all.
      num_fewshot: examples in the context; None is what each task says.

    Raises:
      ConfigError: a name that the harness does not have.
    """

    def __init__(
        self, tasks: Sequence[Task], limit: int | None = None, num_fewshot: int | None = None
    ) -> None:
        self._tasks, self._limit, self._fewshot = tasks, limit, num_fewshot
        # The harness's own tasks take seconds to list: local ones do without.
        everything = any(not task.local for task in tasks)
        self._manager = TaskManager(include_path=str(task_folder()), include_defaults=everything)
        known = set(self._manager.all_tasks)
        for task in tasks:
            if task.config is None and task.name not in known:
                raise ConfigError(
                    f"--tasks: {task.name!r}: no task of the harness and no YAML file has that name"
                )

    def evaluate(self, scorer: TextScorer) -> dict[str, dict[str, float]]:
        """`{task: {metric: value}}`, standard errors as `metric_stderr` where the harness has
        them; a task with several filters has `metric,filter`.

        Raises:
          ConfigError: a task cannot be loaded, as where its data have to be fetched and there is
            no network; or a text that cannot be scored.
        """
        local = all(task.local for task in self._tasks)
        try:
            with _quiet(), _NO_NETWORK if local else contextlib.nullcontext():
                # Not simple_evaluate, which starts child processes to describe the machine.
                found = evaluate(
                    lm=HarnessModel(scorer=scorer),
                    task_dict=self._loaded(),
                    limit=self._limit,
                    log_samples=False,
                    bootstrap_iters=1000,
                )
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"--tasks={','.join(task.name for task in self._tasks)}: the harness fails "
                f"({type(error).__name__}: {reason})"
            ) from error
        assert found is not None
        return {name: _metrics(row) for name, row in found["results"].items() if _metrics(row)}

    def _loaded(self) -> dict[str, Any]:
        """The tasks with their data, examples and seeds, as the harness's own program sets them."""
        random.seed(_SEEDS["random"])
        np.random.seed(_SEEDS["numpy"])
        loaded = self._manager.load([task.config or task.name for task in self._tasks])
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")  # a task that says 0 keeps it
            if own is None or (self._fewshot is not None and own != 0):
                task.set_config("num_fewshot", self._fewshot or 0)
            task.set_fewshot_seed(_SEEDS["fewshot"])
        return loaded


def _whole(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"model argument {name} = {value!r}: must be a number from 1 on")
    return int(value)


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and "," in name
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps logs and progress bars of the harness from the output; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
