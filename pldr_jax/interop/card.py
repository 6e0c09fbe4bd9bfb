"""The model card of an export: `README.md`, with licence fields in its front matter."""

import dataclasses
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_jax.config import ExperimentConfig
from pldr_jax.config.load import dump_config
from pldr_jax.files import TOKENIZER
from pldr_jax.interop.weights import Checkpoint
from pldr_jax.model.counts.shapes import count_params
from pldr_jax.runs.metrics import FILE_NAME, read_metrics
from pldr_jax.terminal import visible

UNKNOWN = "unknown"

_MEASURED = {
    "eval/loss": "held-out loss, nats a token",
    "eval/bits_per_byte": "held-out bits a byte",
    "eval/loss_frozen_g": "held-out loss with G_LM of another text",
    "eval/causal_gap": "causal gap, nats a token",
    "eval/order_parameter/G_LM": "order parameter of G_LM",
}
_LARGE_GAP = 0.01


@dataclasses.dataclass(frozen=True)
class Licences:
    """What the card says of licences.

    Attributes:
      weights: an SPDX identifier in small letters, as model hubs take it.
      data: of the training text, in words.
    """

    weights: str = UNKNOWN
    data: str = UNKNOWN


def model_card(run: Checkpoint, licences: Licences, source: str | None) -> str:
    """The card of a checkpoint.

    Args:
      run: of a run folder; figures are those of its last evaluation up to the checkpoint's step.
      source: name of the checkpoint that was imported; None for one trained here.
    """
    config, step = run.config, run.step or 0
    measured = _evaluation(run.folder, step)
    sections = [
        _front_matter(licences, config.model.task),
        f"# PLDR-LLM, {count_params(config.model):,} parameters",
        _origin(step, source),
        "## Model\n\n" + _fields(config, "Model"),
        "## Measured\n\n" + _figures(measured),
    ]
    if source is None:
        sections += [
            "## Training\n\n" + _fields(config, "Training", "Optimizer", "Loss"),
            "## Data\n\n" + _fields(config, "Data") + "\n\n" + _data(run),
        ]
    sections += [
        "## Licences\n\n" + _table({"weights": licences.weights, "training text": licences.data}),
        "## Use\n\n```python\nimport pldr_jax\n\n"
        f'lm = pldr_jax.load("this/folder")\nlm.{"classify" if config.model.task else "generate"}'
        '("...")\n```\n\n'
        "The folder has the transformers layout of PLDR-LLM (`model_type` `pldrllm`), which is the "
        "layout that the authors' transformers code reads.",
    ]
    return "\n\n".join(sections) + "\n"


_PIPELINES = {
    None: "text-generation",
    "sequence": "text-classification",
    "token": "token-classification",
    "question": "question-answering",
}


def _front_matter(licences: Licences, task: str | None) -> str:
    lines = [
        "---",
        f"license: {_quoted(licences.weights)}",
        f"data_license: {_quoted(licences.data)}",
        "library_name: transformers",
        f"pipeline_tag: {_PIPELINES[task]}",
        "tags:",
        "- pldr-llm",
        "- pldr_jax",
        "---",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """A YAML scalar that is text, whatever it holds: every JSON string is one."""
    return json.dumps(text)


def _origin(step: int, source: str | None) -> str:
    made = f"imported from `{_line(source)}` with" if source else f"trained to step {step:,} with"
    return (
        f"A language model with power law graph attention, {made} pldr_jax. Papers: "
        "[2502.13502](https://arxiv.org/abs/2502.13502), "
        "[2410.16703](https://arxiv.org/abs/2410.16703)."
    )


def _evaluation(run_dir: Path, step: int) -> dict[str, Any]:
    """The newest evaluation up to `step`; empty where there is none."""
    if not (run_dir / FILE_NAME).is_file():
        return {}
    rows = [row for row in read_metrics(run_dir) if row["step"] <= step and "eval/loss" in row]
    return rows[-1] if rows else {}


def _figures(measured: Mapping[str, Any]) -> str:
    if not measured:
        return "Nothing was measured in the run folder that this was exported from."
    rows = {doc: measured[name] for name, doc in _MEASURED.items() if name in measured}
    text = f"At step {measured['step']:,}, on held-out text:\n\n" + _table(rows)
    gap = measured.get("eval/causal_gap")
    if gap is not None and abs(gap) > _LARGE_GAP:
        text += (
            "\n\nThe causal gap is large: the model uses its future through G_LM, and will not "
            "generate as well as its held-out loss says."
        )
    tasks = {n.removeprefix("eval/tasks/"): v for n, v in measured.items() if "eval/tasks/" in n}
    return text + ("\n\nTasks:\n\n" + _table(tasks) if tasks else "")


def _data(run: Checkpoint) -> str:
    config, tokenizer = run.config, run.tokenizer
    tokens = (run.step or 0) * config.data.batch_size * config.model.context_length
    rows = {"tokens in the batches read": f"{tokens:,}"}
    if tokenizer is not None:
        rows[TOKENIZER] = f"{tokenizer.vocab_size:,} pieces, SHA-256 {tokenizer.digest}"
    return _table(rows)


def _fields(config: ExperimentConfig, *groups: str) -> str:
    """The fields of some groups, as gin text without the comments."""
    lines = [
        line.partition("  # ")[0].rstrip()
        for line in dump_config(config).splitlines()
        if line.startswith(tuple(f"{group}." for group in groups))
        and not line.startswith("Data.cache_dir")
    ]
    return "\n".join(["```", *lines, "```"])


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
        return "not finite" if value is None else _line(str(value)).replace("|", "\\|")

    lines = (f"| {cell(name)} | {cell(value)} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _line(text: str) -> str:
    """Text in one line, without what Markdown or a terminal takes for more than text."""
    return html.escape(visible(" ".join(text.split())), quote=False).replace("`", "'")
