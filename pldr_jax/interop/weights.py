"""Opens any checkpoint: a run folder, or a folder in the transformers layout."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from pldr_jax.bucket import bucket_url
from pldr_jax.config import ConfigError, ExperimentConfig, LoraConfig, TaskConfig
from pldr_jax.config.load import config_from_dict
from pldr_jax.data.mixture import TrainingText, open_training_text
from pldr_jax.data.text.chat import template_in
from pldr_jax.data.text.tokenizer import Tokenizer
from pldr_jax.files import TOKENIZER
from pldr_jax.interop.config_json import BACKBONE, end_ids
from pldr_jax.interop.folder import parse_json, read_json
from pldr_jax.interop.pth import refuse_distributed
from pldr_jax.interop.record import read_record
from pldr_jax.interop.transformers import CONFIG, open_transformers
from pldr_jax.model.decoder import Params
from pldr_jax.model.lora import digest_of, merge_adapters
from pldr_jax.runs.checkpoint import read_weights
from pldr_jax.runs.hub import find_checkpoint

BASE = "base"
"""In a run folder of adapters, the checkpoint that they belong to, or a link to it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of any layout, in memory.

    Attributes:
      folder: where it was read.
      step: of a run; None in the transformers layout.
      config: that it was trained by, without adapters; the transformers layout says its model
        alone.
      params: float32, stacked over layers; adapters are added to those of their base.
      g_lm: predefined G_LM [L,1,N,H,J]; None where it is learned or the identity.
      tokenizer: None where the folder has none.
      end_ids: tokens that end a text: the tokenizer's end piece, or what `config.json` says.
      origin: of one of the hub, `hub.Source.origin`.
      name: where it lies: a path, or the URL of a folder of a bucket.
    """

    folder: Path
    step: int | None
    config: ExperimentConfig
    params: Params
    g_lm: jax.Array | None
    tokenizer: Tokenizer | None
    end_ids: tuple[int, ...] = ()
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = ""


def open_checkpoint(
    path: str | Path,
    step: int | None = None,
    flag: str = "",
    tasks: bool = False,
    revision: str | None = None,
    mesh: Mesh | None = None,
) -> Checkpoint:
    """Reads a checkpoint for any use: inference, fine-tuning, freezing, analysis, export.

    Args:
      path: a run folder, a folder with `config.json` and safetensors, or a name of the hub.
      step: checkpoint of a run folder; None is the newest complete one.
      flag: that named the path, for errors, such as "--init_from".
      tasks: whether the head may be a task's; else it must be that of a language model.
      revision: of a name of the hub; None is the newest.
      mesh: that the weights come to, each in its parts.

    Raises:
      ConfigError, CheckpointError: one line, saying what the folder lacks.
    """
    source = find_checkpoint(path, flag, revision, step)
    name = bucket_url(path) or str(source.folder.resolve())
    opened = _read(source.folder, step, flag, mesh)
    opened = dataclasses.replace(opened, origin=source.origin, name=name)
    if not tasks and (task := opened.config.model.task) is not None:
        raise ConfigError(f"{path}: has a {task} head; this needs a language model")
    if not tasks and "head" not in opened.params:
        raise ConfigError(f"{path}: is a {BACKBONE}, without a head; this needs a language model")
    return opened


def _read(folder: Path, step: int | None, flag: str, mesh: Mesh | None) -> Checkpoint:
    if not folder.is_dir():
        name = f"{flag}={folder}" if flag else repr(str(folder))
        raise ConfigError(f"{name}: no such folder; give a run folder, or one with {CONFIG}")
    refuse_distributed(folder)
    has_tokenizer = (folder / TOKENIZER).is_file()
    tokenizer = None
    if has_tokenizer:
        tokenizer = Tokenizer.load(folder / TOKENIZER, template_in(folder))
    if (folder / CONFIG).is_file():
        opened = open_transformers(folder, mesh, keep_source=False)
        config = ExperimentConfig(model=opened.config, task=TaskConfig(labels=opened.labels))
        ends = _end_ids(folder, tokenizer, config.model.vocab_size)
        return Checkpoint(folder, None, config, opened.params, opened.g_lm, tokenizer, ends)
    weights = read_weights(folder, step, mesh=mesh)
    config = config_from_dict(weights.config_dict, str(folder))
    params = weights.params
    if config.lora.rank:
        base = open_base(config.lora, folder, mesh).params
        params = merge_adapters(config.lora, base, params)
        config = dataclasses.replace(config, lora=LoraConfig())
    ends = _end_ids(folder, tokenizer, config.model.vocab_size)
    return Checkpoint(folder, weights.step, config, params, weights.g_lm, tokenizer, ends)


def open_base(lora: LoraConfig, folder: Path, mesh: Mesh | None = None) -> Checkpoint:
    """The checkpoint that the adapters of a run folder belong to: `base` in it, a folder or a link,
    or else where it lay in training.

    Raises:
      ConfigError, CheckpointError: it is not there, or its weights are others.
    """
    path = folder / BASE if (folder / BASE).is_dir() else Path(lora.base or "")
    if lora.base is None or not (path.is_dir() or bucket_url(path)):
        raise ConfigError(
            f"{folder}: its adapters belong to {lora.base}, which is not there; put that, or a "
            f"link to it, at {folder / BASE}"
        )
    opened = open_checkpoint(path, lora.base_step, tasks=True, mesh=mesh)
    check_base(lora, opened, str(path), folder)
    return opened


def check_base(lora: LoraConfig, opened: Checkpoint, where: str, run_dir: Path) -> None:
    """ConfigError where a checkpoint is not the one that the adapters of a run belong to."""
    digest, needed = digest_of(opened.params, opened.g_lm), lora.base_digest
    if digest != needed:
        raise ConfigError(
            f"{where}: has not the weights that the adapters of {run_dir} belong to (SHA-256 "
            f"{digest[:12]}, and not {str(needed)[:12]}); name those of {lora.base}"
        )


def _end_ids(folder: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[int, ...]:
    if tokenizer is not None:
        return (tokenizer.eos_id,) if tokenizer.eos_id >= 0 else ()
    try:
        if (folder / CONFIG).is_file():
            raw = read_json(folder / CONFIG)
        else:
            record = read_record(folder)
            raw = parse_json(record.others[CONFIG], folder) if record else {}
    except (ConfigError, KeyError):  # said where it matters: a record is not needed to decode
        return ()
    return tuple(token for token in end_ids(raw) if token < vocab_size)


def held_out_text(
    folder: Path, config: ExperimentConfig, flag: str, log: Callable[[str], None]
) -> TrainingText:
    """The text that a checkpoint was trained on, whose "validation" rows it has not seen.

    Args:
      folder: of the checkpoint.
      config: whose `data` says which text.
      flag: the one that names another text.

    Raises:
      ConfigError: `folder` does not say what the text is, or it has another tokenizer now.
    """
    if (folder / CONFIG).is_file():
        raise ConfigError(f"{flag}: none was given, and {folder} does not say what is held out")
    text = open_training_text(config.data, config.model.vocab_size, log)
    path = folder / TOKENIZER
    if path.is_file() and path.read_bytes() != text.tokenizer.model_bytes:
        raise ConfigError(
            f"{folder}: has another tokenizer than Data.source gives now; give a {flag}"
        )
    return text
