"""What `/metrics` counts."""

from typing import Any

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pldr_jax.inference.prefix import PrefixCache

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one server, in a registry of its own.

    Args:
      prefixes: what its engine keeps of prompts.
    """

    def __init__(self, prefixes: PrefixCache) -> None:
        registry = self._registry = CollectorRegistry()
        self._prefixes, self._counted = prefixes, (prefixes.hits, prefixes.tokens_saved)
        self.answers = Counter(
            "pldr_requests",
            "HTTP requests, by path and status",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("pldr_prompt_tokens", "tokens of prompts", registry=registry)
        self.prefix_hits = Counter(
            "pldr_prefix_hits", "prompts of which a beginning was kept", registry=registry
        )
        self.prefix_tokens = Counter(
            "pldr_prefix_tokens",
            "tokens of these beginnings, which were not run",
            registry=registry,
        )
        self.new_tokens = Counter("pldr_new_tokens", "tokens generated", registry=registry)
        self.cancelled = Counter(
            "pldr_cancelled", "texts ended by a disconnect or a timeout", registry=registry
        )
        self.waiting = Gauge("pldr_waiting", "texts that wait for a slot", registry=registry)
        self.running = Gauge("pldr_slots_in_use", "texts being decoded", registry=registry)
        self.slots = Gauge("pldr_slots", "slots in all", registry=registry)
        self.compilations = Counter("pldr_compilations", "programs compiled", registry=registry)
        self.first_token = Histogram(
            "pldr_time_to_first_token_seconds",
            "from the request to its first tokens",
            buckets=_SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "pldr_request_seconds",
            "from the request to its end",
            buckets=_SECONDS,
            registry=registry,
        )
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.compilations.inc()

    def count_prefixes(self) -> None:
        """Counts what has been saved since the last time."""
        now = self._prefixes.hits, self._prefixes.tokens_saved
        for counter, new, old in zip(
            (self.prefix_hits, self.prefix_tokens), now, self._counted, strict=True
        ):
            counter.inc(new - old)
        self._counted = now

    def text(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self._registry)

    def close(self) -> None:
        """Stops counting compilations."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
