"""Tasks by the names a user gives: YAML files of the harness, here or the user's, or its own."""

import dataclasses
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError
from pldr_jax.copies import readable_path
from pldr_jax.files import read_regular_file


@dataclasses.dataclass(frozen=True)
class Task:
    """A task or a group of them.

    Attributes:
      name: as the harness and the results have it.
      config: of a task whose data are local files; None where the harness has the task.
    """

    name: str
    config: dict[str, Any] | None = None

    @property
    def local(self) -> bool:
        """Whether nothing is fetched for it."""
        return self.config is not None


def task_folder() -> Path:
    """The tasks that come with the package."""
    return Path(__file__).parent / "tasks"


def find_tasks(names: str) -> list[Task]:
    """The tasks of a comma-separated list: YAML files, tasks that come with the package, and what
    else may be a name of the harness.

    Raises:
      ConfigError: the list is empty or names a task twice; a file that cannot be used.
    """
    tasks = [_find(name.strip()) for name in names.split(",") if name.strip()]
    if not tasks:
        raise ConfigError(f"--tasks={names!r}: names no task")
    for i, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:i]]:
            raise ConfigError(f"--tasks={names}: {task.name!r} is there twice")
    return tasks


def _find(name: str) -> Task:
    path = readable_path(name, "--tasks")
    if path.suffix not in (".yaml", ".yml"):
        path = task_folder() / f"{name}.yaml"
        if not path.is_file():
            return Task(name)
    config = _read(path)
    if "group" in config:
        if path.parent != task_folder():
            raise ConfigError(f"--tasks: {path}: is a group; name its tasks instead")
        return Task(str(config["group"]))
    return Task(str(config["task"]), {**config, **_located(path, config)})


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(read_regular_file(path).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"--tasks: {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--tasks: {path}: is no YAML of plain values ({reason})") from None
    if not isinstance(config, dict) or not ("task" in config or "group" in config):
        raise ConfigError(f"--tasks: {path}: names no task; see docs/evaluation.md")
    return config


def _located(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`dataset_kwargs` with the paths of the data files, which lie beside the YAML file or below.

    Raises:
      ConfigError: no data files, or one that is not there.
    """
    kwargs = config.get("dataset_kwargs")
    kwargs = dict(kwargs) if isinstance(kwargs, dict) else {}
    files = kwargs.get("data_files")
    if not isinstance(files, dict) or not files:
        raise ConfigError(
            f"--tasks: {path}: dataset_kwargs.data_files names no files, as in {{test: my.jsonl}}"
        )
    located = {}
    for split, names in files.items():
        where = f"--tasks: {path}: data_files.{split}"
        names = names if isinstance(names, list) else [names]
        located[split] = [file for name in names for file in _data_files(path, name, where)]
    return {"dataset_kwargs": {**kwargs, "data_files": located}}


def _data_files(path: Path, name: Any, where: str) -> list[str]:
    """The files of a name or glob in the folder of a YAML file, or below it."""
    folder = path.resolve().parent
    if not isinstance(name, str) or Path(name).is_absolute() or {"..", "~"} & set(Path(name).parts):
        raise ConfigError(f"{where} = {name!r}: must be in the folder of the YAML file")
    pattern = folder / name
    files = sorted(file for file in pattern.parent.glob(pattern.name) if file.is_file())
    if not files:
        raise ConfigError(f"{where} = {name!r}: no such file")
    for file in files:
        if not file.resolve().is_relative_to(folder):
            raise ConfigError(f"{where}: {file} is a link to elsewhere; put the file itself there")
    return list(map(str, files))
