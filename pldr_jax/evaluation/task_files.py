"""Tasks by the names a user gives: YAML files of the harness, here or the user's, or its own."""

import dataclasses
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError


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
    path = Path(name).expanduser()
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
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--tasks: {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"--tasks: {path}: is no YAML of plain values ({reason})") from None
    if not isinstance(config, dict) or not ("task" in config or "group" in config):
        raise ConfigError(f"--tasks: {path}: names no task; see docs/evaluation.md")
    return config


def _located(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """`dataset_kwargs` with the paths of the data files, which are relative to the YAML file.

    Raises:
      ConfigError: no data files, or one that is not there.
    """
    kwargs = dict(config.get("dataset_kwargs") or {})
    files = kwargs.get("data_files")
    if not isinstance(files, dict) or not files:
        raise ConfigError(
            f"--tasks: {path}: dataset_kwargs.data_files names no files, as in {{test: my.jsonl}}"
        )
    located = {}
    for split, names in files.items():
        found = []
        for name in [names] if isinstance(names, str) else names:
            where = Path(path.resolve().parent / Path(name).expanduser())
            matches = sorted(str(match) for match in where.parent.glob(where.name))
            if not matches:
                raise ConfigError(f"--tasks: {path}: data_files.{split} = {name!r}: no such file")
            found += matches
        located[split] = found
    return {"dataset_kwargs": {**kwargs, "data_files": located}}
