"""Object stores: `gs://BUCKET/...` and `s3://BUCKET/...` through fsspec, with errors of one line.

Nothing can be appended to an object or renamed: an object is there whole, or not at all.
"""

import base64
import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pldr_jax.config import ConfigError, UnavailableError

EXTRAS = {"gs": "gcs", "s3": "s3"}
VERSION = ("size", "ETag", "md5Hash", "mtime")
"""What stores say of an object, of which some changes with its content."""


def bucket_url(path: str | Path) -> str | None:
    """`gs://...` or `s3://...`, also of a path that has lost a slash; None of any other path."""
    found = re.fullmatch(r"(gs|s3):/{1,2}([^/].*?)/*", str(path))
    return f"{found[1]}://{found[2]}" if found else None


class Bucket:
    """A folder of a bucket; objects are named relative to it.

    Args:
      url: as `bucket_url` gives it.
      flag: that named it, for errors.

    Raises:
      ConfigError: here and in every method, one line: an extra is missing, or the store refuses; an
        UnavailableError where it does not answer.
    """

    def __init__(self, url: str, flag: str) -> None:
        self.url, self._shown = url, f"{flag}={url}"
        with self._reporting("opened"):
            import fsspec

            # S3's client compares what was stored by itself.
            checked = {"consistency": "md5"} if url.startswith("gs:") else {}
            self._files, root = fsspec.url_to_fs(url, use_listings_cache=False, **checked)
            self._root: str = root.rstrip("/")

    def objects(self) -> dict[str, dict[str, Any]]:
        """The objects below it, each with what the store says of it; "" is the object at the URL
        itself.
        """
        with self._reporting("read"):
            self._files.invalidate_cache()
            found = self._files.find(self._root, detail=True)
            names = {name[len(self._root) + 1 :]: info for name, info in found.items()}
            if any(".." in name.split("/") or name.startswith("/") for name in names):
                raise OSError("it has a file whose name leads elsewhere")
            return names

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        with self._reporting("read"):
            try:
                content: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return content

    def get(self, name: str, path: Path) -> None:
        """Copies an object to a file, all of it or nothing."""
        with self._reporting("read"):
            info, remote = self._files.info(self._path(name)), self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            try:
                self._files.get_file(remote, str(partial))
                if problem := _difference(partial, info):
                    raise OSError(f"{name} {problem}")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Copies a file, which must not change meanwhile, to an object."""
        with self._reporting("written"):
            self._files.put_file(str(path), self._path(name))

    def write(self, name: str, content: bytes, new: bool = False) -> bool:
        """Writes an object; False, where it has to be `new` and is there already."""
        with self._reporting("written"):
            try:
                self._files.pipe_file(
                    self._path(name), content, mode="create" if new else "overwrite"
                )
            except FileExistsError:
                return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""
        with self._reporting("written"):
            paths = [self._path(name) for name in names]
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _reporting(self, verb: str) -> Iterator[None]:
        try:
            yield
        except ImportError:
            extra = EXTRAS[self.url[:2]]
            raise ConfigError(f"{self._shown}: needs pip install 'pldr_jax[{extra}]'") from None
        except ConfigError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            refused = isinstance(error, FileNotFoundError | PermissionError | ValueError)
            kind = ConfigError if refused else UnavailableError
            raise kind(f"{self._shown}: cannot be {verb} ({line[:200]})") from None


def _difference(path: Path, info: dict[str, Any]) -> str | None:
    """What a copy lacks of what the store says of the object, if anything. S3's client compares
    checksums by itself.
    """
    if (size := path.stat().st_size) != info.get("size", size):
        return f"came with {size} bytes instead of {info['size']}"
    if "md5Hash" in info:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "md5").digest()
        if base64.b64encode(digest).decode() != info["md5Hash"]:
            return "came with another MD5 than that of the object"
    return None
