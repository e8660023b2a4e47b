"""Prometheus metrics of a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server."""

    def __init__(self, *, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tuning_serve_requests",
            "Requests answered, by route and status",
            ("route", "status"),
            registry=registry,
        )
        self.tokens = Counter(
            "tuning_serve_tokens",
            "Tokens read (prompt) and generated (completion), by model",
            ("model", "kind"),
            registry=registry,
        )
        self.cancelled = Counter(
            "tuning_serve_cancelled", "Answers whose client went away", registry=registry
        )
        self.first = Histogram(
            "tuning_serve_first_token_seconds",
            "Seconds from a request to its first token",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "tuning_serve_answer_seconds",
            "Seconds from a request to the end of its answer",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.refused = Gauge(
            "tuning_serve_adapters_refused", "Adapters that are not served", registry=registry
        )
        for name, about, value in (
            ("tuning_serve_running", "Answers being generated", running),
            ("tuning_serve_waiting", "Answers waiting for room", waiting),
        ):
            Gauge(name, about, registry=registry).set_function(value)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
