"""The application: routes, keys, errors and counts around the handlers."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pldr_jax.serve.bodies import ask
from pldr_jax.serve.chat import ChatAnswer, ask_chat
from pldr_jax.serve.completions import Answer, respond
from pldr_jax.serve.deductive import deductive
from pldr_jax.serve.served import Served
from pldr_jax.serve.wire import ApiError, as_api_error, checked_text, read_json

PUBLIC = ("/", "/health")
"""Paths that need no key."""

PAGE = Path(__file__).parent / "page.html"
PAGE_MAY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: speak to its own server, and nothing else."""

Handler = Callable[[Served, Request], Awaitable[Response]]


async def page(served: Served, request: Request) -> Response:
    """`/`: the page."""
    return FileResponse(PAGE, media_type="text/html", headers={"Content-Security-Policy": PAGE_MAY})


async def health(served: Served, request: Request) -> Response:
    """`/health`: 200 once every program is compiled, 503 before and after a failure."""
    state = "failed" if served.worker.error else "ready" if served.ready else "compiling"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


async def metrics(served: Served, request: Request) -> Response:
    """`/metrics`, for Prometheus."""
    return Response(served.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(served: Served, request: Request) -> Response:
    """`/v1/models`, and one of them: the model that is served."""
    name = request.path_params.get("name", served.name)
    if name != served.name:
        raise ApiError(404, f"model = {name!r}: is not served", "model", "model_not_found")
    config = served.lm.config
    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "pldr_jax",
        "max_model_len": served.capacity,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "g_modes": served.g_modes,
        "shared_g_lm": served.shared,
    }
    one = "name" in request.path_params
    return JSONResponse(model if one else {"object": "list", "data": [model]})


async def complete(served: Served, request: Request) -> Response:
    """`/v1/completions`."""
    values = await read_json(request, served.settings.max_body)
    # A long prompt takes a while to become tokens, and others must not wait for it.
    asked = await asyncio.to_thread(ask, values, served)
    return await respond(request, asked, Answer(served, asked))


async def chat(served: Served, request: Request) -> Response:
    """`/v1/chat/completions`."""
    values = await read_json(request, served.settings.max_body)
    asked = await asyncio.to_thread(ask_chat, values, served)
    return await respond(request, asked, ChatAnswer(served, asked))


async def deductive_outputs(served: Served, request: Request) -> Response:
    """`/v1/deductive`."""
    values = await read_json(request, served.settings.max_body)
    return JSONResponse(await deductive(served, values))


async def tokenize(served: Served, request: Request) -> Response:
    """`/tokenize`: text to token ids."""
    values = await _fields(served, request, ("prompt",), ("add_special_tokens",))
    if not isinstance(values["prompt"], str):
        raise ApiError(400, "prompt: must be a string", "prompt")
    if values.get("add_special_tokens", False) is not False:
        raise ApiError(400, "add_special_tokens: can only be false", "add_special_tokens")
    text = checked_text(values["prompt"], "prompt")
    tokens = await asyncio.to_thread(served.lm.encode, text)
    count = {"count": len(tokens), "max_model_len": served.capacity}
    return JSONResponse({"tokens": tokens, **count})


async def detokenize(served: Served, request: Request) -> Response:
    """`/detokenize`: token ids to text."""
    values = await _fields(served, request, ("tokens",), ())
    tokens, tokenizer = values["tokens"], served.lm.tokenizer
    if tokenizer is None:
        raise ApiError(400, "tokens: this checkpoint has no tokenizer", "tokens")
    known = range(tokenizer.vocab_size)
    if not isinstance(tokens, list) or not all(type(x) is int and x in known for x in tokens):
        raise ApiError(400, f"tokens: must be a list of ids below {len(known)}", "tokens")
    return JSONResponse({"prompt": tokenizer.decode(tokens)})


async def tokenizer_info(served: Served, request: Request) -> Response:
    """`/tokenizer_info`, by which lm-evaluation-harness knows that it can tokenise here."""
    tokenizer = served.lm.tokenizer
    if tokenizer is None:
        raise ApiError(404, "this checkpoint has no tokenizer")
    special = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
    names = {f"{k}_token": tokenizer.piece(i) if i >= 0 else None for k, i in special.items()}
    return JSONResponse(
        {**names, "tokenizer_class": "sentencepiece", "chat_template": tokenizer.chat_template}
    )


async def _fields(
    served: Served, request: Request, needed: Sequence[str], others: Sequence[str]
) -> dict[str, Any]:
    """The body of a small request, whose fields are these and `model`."""
    values = await read_json(request, served.settings.max_body)
    for name in values:
        if name not in (*needed, *others, "model"):
            raise ApiError(400, f"{name}: no such field", name)
    for name in needed:
        if name not in values:
            raise ApiError(400, f"{name}: is missing", name)
    if values.get("model", served.name) != served.name:
        raise ApiError(404, f"model: there is {served.name!r} alone", "model", "model_not_found")
    return values


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("/", "GET", page),
    ("/health", "GET", health),
    ("/metrics", "GET", metrics),
    ("/v1/models", "GET", models),
    ("/v1/models/{name:path}", "GET", models),
    ("/v1/completions", "POST", complete),
    ("/v1/chat/completions", "POST", chat),
    ("/v1/deductive", "POST", deductive_outputs),
    ("/tokenize", "POST", tokenize),
    ("/detokenize", "POST", detokenize),
    ("/tokenizer_info", "GET", tokenizer_info),
)


class Guard:
    """Keys, counts, and errors as the API writes them, around everything else."""

    def __init__(self, app: ASGIApp, served: Served, keys: Sequence[bytes]) -> None:
        self._app, self._served, self._keys = app, served, keys
        self._known = {path for path, _, _ in ROUTES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                label = path if path in self._known else "other"
                self._served.metrics.answers.labels(label, str(message["status"])).inc()
            await send(message)

        try:
            if self._keys and path not in PUBLIC and scope["method"] != "OPTIONS":
                self._check_key(scope)
            await self._app(scope, receive, counted)
        except HTTPException as error:
            headers = dict(error.headers or {})
            api = ApiError(error.status_code, f"{path}: {error.detail}", headers=headers)
            await api.response()(scope, receive, counted)
        except Exception as error:
            response = as_api_error(error).response()
            if not begun:
                await response(scope, receive, counted)

    def _check_key(self, scope: Scope) -> None:
        header = dict(scope["headers"]).get(b"authorization", b"")
        key = header[7:].strip() if header[:7].lower() == b"bearer " else b""
        # All are compared, so that the time says nothing of which one is near.
        if not any([hmac.compare_digest(key, known) for known in self._keys]):
            headers = {"WWW-Authenticate": "Bearer"}
            message = "the header Authorization bears no valid key"
            raise ApiError(401, message, None, "invalid_api_key", headers)


def build_app(served: Served, keys: Sequence[bytes] = ()) -> ASGIApp:
    """The application around a model; `lifespan` is the caller's."""

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                return await handler(served, request)
            except HTTPException:
                raise
            except Exception as error:
                return as_api_error(error).response()

        return answer

    routes = [Route(path, endpoint(handler), methods=[method]) for path, method, handler in ROUTES]
    middleware = [Middleware(Guard, served=served, keys=keys)]
    if served.settings.allow_origin:
        origins = list(served.settings.allow_origin)
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        api = ApiError(error.status_code, f"{request.url.path}: {error.detail}")
        return JSONResponse(api.body(), error.status_code, error.headers)

    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: refuse}
    )
