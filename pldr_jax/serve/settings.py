"""The flags of `pldr-serve`; imported before JAX is."""

import dataclasses

from pldr_jax.config.fields import FlagGroup, field


@dataclasses.dataclass(frozen=True)
class ServeConfig(FlagGroup):
    """How a model is served."""

    host: str = field("127.0.0.1", "address to bind to; 0.0.0.0 is every one", metavar="ADDRESS")
    port: int = field(
        8000, "port to bind to; 0 takes a free one", low=0, high=65535, metavar="PORT"
    )
    model_name: str | None = field(
        None, "name of the model in requests; default: that of its folder", metavar="NAME"
    )
    batch_size: int = field(
        8, "requests decoded side by side; no answer depends on it", low=1, high=2**16, metavar="N"
    )
    capacity: int | None = field(
        None,
        "tokens of prompt and answer together; default: the model's context",
        low=2,
        metavar="N",
    )
    steps: int = field(
        4,
        "decode steps between two looks at the queue: fewer for the delay of a token, more for "
        "tokens a second; no answer depends on it",
        low=1,
        high=256,
        metavar="N",
    )
    max_waiting: int = field(
        1024, "requests that may wait; further ones are answered with 429", low=1, metavar="N"
    )
    max_body: int = field(2**20, "bytes of a request's body", low=1024, high=2**30, metavar="BYTES")
    max_connections: int = field(1000, "connections at once; others get 503", low=1, metavar="N")
    timeout: float = field(
        600.0,
        "seconds that a request may take, then its slot is freed",
        above=0,
        high=1e6,
        metavar="S",
    )
    drain_seconds: int = field(
        30, "seconds that running requests get after SIGTERM", low=0, high=86_400, metavar="S"
    )
    api_key_file: str | None = field(
        None, "file of keys, one a line, of which requests must bear one", path=True, metavar="PATH"
    )
    allow_origin: tuple[str, ...] = field(
        (),
        "origin whose web pages may use the API (CORS), such as http://localhost:3000",
        metavar="URL",
    )
