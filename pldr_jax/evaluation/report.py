"""Results of tasks as JSON, as a table, and as metrics."""

import json
import math
from collections.abc import Mapping
from typing import Any

Results = Mapping[str, Mapping[str, float]]
"""{task: {metric: value}}."""

STDERR = "_stderr"


def results_json(head: Mapping[str, Any], modes: Mapping[str, Results]) -> str:
    """The results of each G mode under `modes`, behind the fields of `head`; and under
    `differences` the largest difference of each metric between two modes, where there are several.
    What is not finite is null.
    """
    content: dict[str, Any] = {**head, "modes": modes}
    if len(modes) > 1:
        content["differences"] = differences(modes)
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def results_table(modes: Mapping[str, Results]) -> str:
    """A Markdown table: a metric a row, a G mode a column, standard errors behind the values; and
    the largest difference between two modes where there are several.
    """
    columns = [*modes, "difference"] if len(modes) > 1 else list(modes)
    lines = ["| task | metric | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    apart = differences(modes)
    for task, metrics in next(iter(modes.values())).items():
        for metric in metrics:
            if STDERR in metric:
                continue
            cells = [_cell(results[task], metric) for results in modes.values()]
            cells += [f"{apart[task][metric]:.1e}"] if len(modes) > 1 else []
            lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def differences(modes: Mapping[str, Results]) -> dict[str, dict[str, float]]:
    """The largest difference of each metric between two modes; standard errors are left out."""
    first, *_ = modes.values()
    return {
        task: {
            metric: max(values) - min(values)
            for metric in metrics
            if STDERR not in metric
            and (values := [results[task][metric] for results in modes.values()])
        }
        for task, metrics in first.items()
    }


def as_metrics(results: Results) -> dict[str, float]:
    """`eval/tasks/<task>/<metric>` of each value that is no standard error."""
    return {
        f"eval/tasks/{task}/{metric}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if STDERR not in metric
    }


def _cell(metrics: Mapping[str, float], metric: str) -> str:
    name, comma, filter_name = metric.partition(",")
    error = metrics.get(name + STDERR + comma + filter_name)
    value = metrics[metric]
    shown = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
