"""HTTP/1.1 with time limits for clients that are slow to write or to read."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 30.0
"""The head of a request must arrive within this time: a connection's first one from its beginning,
a later one from its first byte."""

READ_SECONDS = 30.0
"""A client that takes nothing of an answer that waits for it for this time has gone."""


class Protocol(H11Protocol):
    """uvicorn's protocol, which waits without end for the rest of a head, and for a client that
    does not read.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time of the first head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Ends the time once the head is there; a byte of the next one starts it again."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all times."""
        self._unwatch_head()
        self._unwatch_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Starts the time to read; asyncio calls this where too much waits for the client."""
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends it."""
        self._unwatch_reading()
        super().resume_writing()

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_SECONDS, self._refuse_head)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _unwatch_reading(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _refuse_head(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # something was sent, and somebody may read the answer
            headers = [("connection", "close"), ("content-length", "0")]
            answer = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
            self.transport.write(self.conn.send(answer) or b"")
        self.transport.close()
