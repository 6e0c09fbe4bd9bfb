"""Requests as bytes, errors as the clients of the API know them."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from pldr_jax.config import ConfigError
from pldr_jax.config.annotations import LONGEST_LINE, shorten
from pldr_jax.serve.worker import Full, Stopped
from pldr_jax.terminal import one_line, print_line

BODY_SECONDS = 30.0
"""A body must arrive within this time."""


class ApiError(Exception):
    """What a client is answered with: a status and one line.

    Args:
      status: of HTTP.
      message: made one line of bounded length.
      param: the field that it is about.
      code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(shorten(one_line(message), LONGEST_LINE))
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @classmethod
    def of(cls, error: ConfigError) -> "ApiError":
        """An error of a setting, whose message begins with the name of the field."""
        name = str(error).partition(":")[0].partition(" = ")[0]
        return cls(400, str(error), name if name.isidentifier() else None)

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error as one line for the client; one that nobody expects is a line of the log, too."""
    match error:
        case ApiError():
            return error
        case Full():
            again = {"Retry-After": "1"}
            return ApiError(429, "the queue is full; try again", None, "queue_full", again)
        case Stopped():
            return ApiError(503, "the server takes no more requests", None, "stopped")
        case ConfigError():
            return ApiError.of(error)
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" ({place.tb_frame.f_code.co_filename}:{place.tb_lineno})"
    print_line(f"error: {type(error).__name__}: {shorten(str(error))}{where}", to_stderr=True)
    return ApiError(500, "an error inside the server; see its log", None, "internal_error")


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The object in the body of a request.

    Raises:
      ApiError: no such object, more than `limit` bytes of it, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the header Content-Type must be application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ApiError(413, f"the body has more than {limit} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the body was not sent whole") from None
    return parse_object(bytes(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """The object that a JSON text holds, without its keys that are null.

    Raises:
      ApiError: it holds none, names a key twice, or has a number that JSON has not.
    """
    try:
        values = json.loads(
            body.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_without_twins
        )
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    return {name: value for name, value in values.items() if value is not None}


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twin = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the key {shorten(twin)!r} occurs twice")
    return values


def checked_text(text: str, name: str) -> str:
    """The text of a field.

    Raises:
      ApiError: half of a surrogate pair, which no UTF-8 has.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            400, f"{name}: character {error.start} is half a surrogate pair", name
        ) from None
    return text
