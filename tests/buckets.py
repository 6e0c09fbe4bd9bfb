"""A real S3 server on loopback, for tests, where moto and s3fs are installed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def s3_server(cache: Path) -> Iterator[Any]:
    """Its file system with the bucket `models`; the environment is that of programs that use it,
    with a cache folder of their own.
    """
    reason = "needs pip install 'pldr_jax[buckets-test]'"
    server = pytest.importorskip("moto.server", reason=reason)
    s3fs = pytest.importorskip("s3fs", reason=reason)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("PLDR_CACHE", str(cache))
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("models")
        try:
            yield files
        finally:
            files.rm("models", recursive=True)  # the next server of this process has them too
            running.stop()
