"""What a server counts, for Prometheus, and its log: a line a request, without a text of it.

Labels are names of routes and of models that are served, never what a client wrote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from fedark.foundation.metrics import GaugeByLabel
from fedark.serving.models import Models

__all__ = ["Observed"]

_log = logging.getLogger("fedark.serving")
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Observed:
    """Metrics of one server.

    Attributes:
        registry: what a metrics server serves.
    """

    def __init__(self, models: Callable[[], Models]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "fedark_serve_requests",
            "Requests answered or refused.",
            ["route", "model", "status"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "fedark_serve_tokens",
            "Tokens read and written.",
            ["model", "kind"],
            registry=self.registry,
        )
        self._first = Histogram(
            "fedark_serve_first_answer_seconds",
            "Until the first token of a text, or all answers of a classifier.",
            ["route"],
            buckets=_FIRST,
            registry=self.registry,
        )
        for name, help_text, value in (
            ("waiting", "Prompts and texts in the queue.", lambda one: one.waiting),
            ("running", "Texts that are being written.", lambda one: one.running),
        ):
            self._gauge(name, help_text, "base", models, value)
        self.registry.register(
            GaugeByLabel(
                "fedark_serve_lease",
                "What the enclave's last receipt says.",
                "figure",
                lambda: {k: v for one in models().workers for k, v in one.engine.told().items()},
            )
        )

    def _gauge(
        self,
        name: str,
        help_text: str,
        label: str,
        models: Callable[[], Models],
        value: Callable[..., float],
    ) -> None:
        def values() -> dict[str, float]:
            found: dict[str, float] = {}
            for one in models().workers:
                base = one.engine.terms.name
                found[base] = found.get(base, 0) + value(one)
            return found

        self.registry.register(GaugeByLabel(f"fedark_serve_{name}", help_text, label, values))

    def first(self, route: str, seconds: float) -> None:
        """The first of an answer is there."""
        self._first.labels(route).observe(seconds)

    def ended(
        self,
        *,
        route: str,
        model: str,
        key: str,
        status: int,
        seconds: float,
        tokens: Iterable[int] = (0, 0),
    ) -> None:
        """A request has ended."""
        read, written = tokens
        self._requests.labels(route, model, str(status)).inc()
        if read or written:
            self._tokens.labels(model, "read").inc(read)
            self._tokens.labels(model, "written").inc(written)
        _log.info(
            "%s %d, model %s, key %s, %d tokens read, %d written, %.3f s",
            route, status, model or "-", key or "-", read, written, seconds,
        )  # fmt: skip
