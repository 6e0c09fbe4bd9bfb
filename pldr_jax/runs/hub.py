"""Checkpoints by their names on the Hugging Face hub. The only file that knows huggingface_hub.

Weights, config and tokenizer are taken, never code, and their content is compared with the hashes
that the hub states.
"""

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pldr_jax.bucket import bucket_url
from pldr_jax.config import ConfigError
from pldr_jax.config.annotations import shorten
from pldr_jax.copies import fetch_folder
from pldr_jax.files import one_line, user_path
from pldr_jax.terminal import print_line

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w.][\w./-]*))?")
_TAKEN = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
          "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "chat_template.jinja")  # fmt: skip
_BLOCK = 1 << 20

StepChoice = int | Literal["all"] | None
"""Of the checkpoints of a run: that of a step, all, or the newest complete one."""


class Source(NamedTuple):
    """Where a checkpoint is read.

    Attributes:
      folder: on this machine.
      origin: of one of the hub its `repository`, the `revision` that was asked for and the `commit`
        that this is; else empty.
    """

    folder: Path
    origin: dict[str, str] = {}


def find_checkpoint(
    path: str | Path, flag: str = "", revision: str | None = None, step: StepChoice = None
) -> Source:
    """The folder or file of a checkpoint that a user names: a folder of a bucket, which is copied
    into the cache; a path that exists; else OWNER/NAME of the hub, or OWNER/NAME@REVISION, which is
    fetched into the hub's cache.

    Args:
      flag: that named it, for errors.
      revision: branch, tag or commit of the repository; None is the newest.
      step: what of a run in a bucket is copied.

    Raises:
      ConfigError: one line, where it is one of a bucket or the hub and cannot be fetched.
    """
    if url := bucket_url(path):
        return Source(fetch_folder(url, flag or "path", functools.partial(_files_of, step)))
    here = user_path(path, flag or "path")
    named = None if here.exists() else _NAME.fullmatch(str(path))
    if named is None:
        if revision is not None:
            raise ConfigError(f"revision = {revision!r}: {path} is not a name of the hub")
        return Source(here)
    stated = named["revision"]
    if None not in (revision, stated):
        raise ConfigError(f"revision = {revision!r}: {path} names one already")
    asked = revision or stated
    shown = f"{flag}={path}" if flag else repr(str(path))
    folder = _fetch(shown, named["repository"], asked)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{shown}: this repository of the hub has no config.json")
    for file in sorted(folder.iterdir()):
        _check_hash(shown, file)
    origin = {"repository": named["repository"], "revision": asked or "", "commit": folder.name}
    return Source(folder, {key: value for key, value in origin.items() if value})


def _files_of(step: StepChoice, names: Iterable[str]) -> list[str]:
    """The files that a checkpoint needs: of a run folder, those of one step, by default the newest
    whose manifest was written when it was complete, and nothing that training goes on writing.
    """
    names = list(names)
    manifests = (re.fullmatch(r"checkpoints/manifests/(\d+)\.json", name) for name in names)
    complete = [int(found[1]) for found in manifests if found]
    newest = max(complete, default=0)
    chosen = complete if step == "all" else [newest if step is None else step]
    kept = [f"checkpoints/{one}/" for one in chosen]
    kept += [f"checkpoints/manifests/{one}.json" for one in chosen]
    others = ("checkpoints/", "profile/", "tensorboard/", "analysis/", "samples.txt", "curves", ".")
    return [n for n in names if n.startswith(tuple(kept)) or not n.startswith(others)]


def _hub(shown: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ConfigError(
            f"{shown}: no such folder; if it is a name of the hub, pip install 'pldr_jax[hub]'"
        ) from None
    return huggingface_hub


def _places() -> dict[str, Any]:
    """Endpoint and cache as the environment says now, not when the library was imported."""
    cache, home = os.environ.get("HF_HUB_CACHE"), os.environ.get("HF_HOME")
    return {
        "endpoint": os.environ.get("HF_ENDPOINT") or None,
        "cache_dir": cache or (str(Path(home) / "hub") if home else None),
    }


def _fetch(shown: str, repository: str, revision: str | None) -> Path:
    hub = _hub(shown)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        return Path(
            hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(_TAKEN),
                local_files_only=offline,
                **_places(),
            )
        )
    except Exception as error:
        raise ConfigError(
            f"{shown}: no such folder{_beside(repository)}, and "
            f"{_reason(hub.errors, error, revision)}"
        ) from None


def _beside(name: str) -> str:
    """What there is in the folder that a path would lie in, where it is one."""
    here = Path(name).parent
    folders = sorted(path.name for path in here.iterdir() if path.is_dir()) if here.is_dir() else []
    return f" ({here} holds {shorten(', '.join(folders))})" if folders else ""


def _reason(errors: Any, error: Exception, revision: str | None) -> str:
    """What went wrong on the hub, and what helps."""
    if isinstance(error, errors.GatedRepoError):
        return (
            "the hub's repository is gated: accept its terms there, and log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private: see the name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's repository has no revision {revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return "it is not in the hub's cache, and the hub cannot be reached: is there a network?"
    return f"it could not be taken from the hub ({one_line(error)})"


def _check_hash(shown: str, file: Path) -> None:
    """Compares a file with the hash that its blob is called by: SHA-256 of large files, git's of
    small ones. One that differs is removed from the cache.
    """
    blob = file.resolve()
    if not file.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links does not say
    digests = [hashlib.sha256()]
    if len(blob.name) == 40:
        digests = [hashlib.sha1(b"blob %d\0" % blob.stat().st_size), hashlib.sha1()]
    with blob.open("rb") as content:
        while block := content.read(_BLOCK):
            for digest in digests:
                digest.update(block)
    if blob.name not in [digest.hexdigest() for digest in digests]:
        blob.unlink()
        file.unlink()
        raise ConfigError(
            f"{shown}: {file.name} does not have the hash that the hub states, so it was removed "
            "from the hub's cache; load it again"
        )


def push(
    write: Callable[[Path], Any],
    repository: str,
    private: bool = False,
    log: Callable[[str], None] = print_line,
) -> str:
    """Uploads a folder to a repository of the hub, which is made where there is none.

    Args:
      write: writes the folder, with its model card `README.md`; called before anything is sent.
      repository: OWNER/NAME.
      private: of a new repository.
      log: takes each line.

    Returns:
      The address of the commit.

    Raises:
      ConfigError: one line, where the name or the card cannot be used, or the hub does not take it.
    """
    shown = f"REPO={repository}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repository):
        raise ConfigError(f"{shown}: must be OWNER/NAME")
    hub = _hub(shown)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        write(folder)
        api = hub.HfApi(endpoint=_places()["endpoint"])
        try:
            card = hub.ModelCard.load(folder / "README.md")
            api.create_repo(repository, private=private or None, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"Upload with pldr_jax ({card.data.license})",
            )
        except Exception as error:
            reason = shorten(one_line(error), 200)
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                reason = "no right to write there; log in with `hf auth login`"
            raise ConfigError(f"{shown}: could not be uploaded ({reason})") from None
    log(f"uploaded: {commit.commit_url}")
    return str(commit.commit_url)
