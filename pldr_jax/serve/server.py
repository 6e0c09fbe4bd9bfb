"""The server: binds, warms up, answers, drains."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from pldr_jax.api import LanguageModel
from pldr_jax.config import ConfigError, GenerationConfig
from pldr_jax.files import read_regular_file
from pldr_jax.serve.app import build_app
from pldr_jax.serve.protocol import Protocol
from pldr_jax.serve.served import Served
from pldr_jax.serve.settings import ServeConfig
from pldr_jax.terminal import print_line

HEADER_BYTES = 64 * 1024


def read_keys(path: str | None) -> list[bytes]:
    """The keys of a file, one a line.

    Raises:
      ConfigError: it cannot be read, or holds none.
    """
    if path is None:
        return []
    try:
        lines = read_regular_file(Path(path)).split(b"\n")
    except OSError as error:
        raise ConfigError(f"--api_key_file={path}: {error.strerror or error}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"--api_key_file={path}: holds no key")
    return keys


def bind(settings: ServeConfig) -> socket.socket:
    """The listening socket.

    Raises:
      ConfigError: the address cannot be bound to.
    """
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"--port={settings.port}: cannot listen on {settings.host} ({reason})"
        ) from None
    return listener


class Server:
    """One model on one port.

    Args:
      lm: the model.
      name: of the model in requests.
      settings, generation: how it is served, and where G_LM comes from.
      listener: of `bind`; None binds now.
    """

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        settings: ServeConfig,
        generation: GenerationConfig | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._lm, self._name, self._settings = lm, name, settings
        self._generation = generation or GenerationConfig()
        self._keys = read_keys(settings.api_key_file)
        self._listener = listener or bind(settings)
        self.port: int = self._listener.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self.served: Served | None = None
        self.error: BaseException | None = None

    def run(self, say: Callable[[str], None] = print_line) -> None:
        """Serves until SIGTERM, SIGINT or `stop`; then lets running requests end.

        Raises:
          ConfigError: settings that cannot be served.
          RuntimeError: the engine has failed.
        """
        asyncio.run(self._run(say))
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Ends `run`, from any thread."""
        if self._server is not None:
            self._server.should_exit = True

    async def _run(self, say: Callable[[str], None]) -> None:
        served = self.served = Served(self._lm, self._name, self._settings, self._generation)
        config = uvicorn.Config(
            build_app(served, self._keys),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=self._settings.max_connections,
            timeout_graceful_shutdown=self._settings.drain_seconds,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        server = self._server = uvicorn.Server(config)
        served.worker.start()
        tasks = [asyncio.create_task(self._warm_up(served, say))]
        tasks += [asyncio.create_task(self._watch(served))]
        previous = None
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signal anew once it has drained, and the status must be 0.
            previous = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            await server.serve(sockets=[self._listener])
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            for task in tasks:
                task.cancel()
            served.worker.stop()
            served.metrics.close()

    async def _warm_up(self, served: Served, say: Callable[[str], None]) -> None:
        address = f"http://{self._settings.host}:{self.port}"
        say(f"compiling; {address}/health says when it is ready")
        try:
            await served.warm_up()
        except Exception as error:
            self.error = self.error or error
            self.stop()
            return
        say(f"serving {served.name} on {address}")

    async def _watch(self, served: Served) -> None:
        await served.failed.wait()
        self.error = served.worker.error
        self.stop()
