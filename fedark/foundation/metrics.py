"""Counters and gauges for Prometheus, on loopback: GET /metrics in the text exposition format,
version 0.0.4.

    fedark_stage_seconds_sum|_count{stage=}   how long stages took here
    fedark_stage_bytes_total{stage=,direction=}   bytes of requests and replies
    fedark_refusals_total{code=}              faults that this node answered with, by class
    fedark_round                              the last round that was worked on
    fedark_contracts{decision=}               contracts by the operator's decision
    fedark_privacy_epsilon{of=}               spent by a record, or the customer, that was in every job; and the limit

Names and values only: no label ever comes from another party's bytes but a stage's or an error's
name, both from closed lists.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from fedark.foundation.errors import FederationError

__all__ = ["Metrics", "MetricsServer"]

Labels = tuple[tuple[str, str], ...]
Collector = Callable[[], Mapping[str, float]]


@dataclass
class _Family:
    kind: Literal["counter", "gauge", "summary"]
    help: str
    values: dict[tuple[str, Labels], float] = field(default_factory=dict)


class Metrics:
    """A set of metrics. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}
        self._collectors: list[tuple[str, str, str, Collector]] = []

    def count(self, name: str, help_text: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter; its name ends in _total."""
        self._add(name, "counter", help_text, name, amount, labels)

    def observe(self, name: str, help_text: str, value: float, /, **labels: str) -> None:
        """Add one observation to a summary without quantiles."""
        self._add(name, "summary", help_text, f"{name}_sum", value, labels)
        self._add(name, "summary", help_text, f"{name}_count", 1, labels)

    def set(self, name: str, help_text: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            family = self._families.setdefault(name, _Family("gauge", help_text))
            family.values[name, tuple(sorted(labels.items()))] = value

    def collect(self, name: str, help_text: str, label: str, collector: Collector) -> None:
        """Ask `collector` for a gauge's values, by the value of `label`, whenever metrics are read."""
        self._collectors.append((name, help_text, label, collector))

    def text(self) -> str:
        """The exposition."""
        lines: list[str] = []
        for name, help_text, label, collector in self._collectors:
            with self._lock:  # what is gone is not told any more
                self._families.pop(name, None)
            for value, number in collector().items():
                self.set(name, help_text, number, **{label: value})
        with self._lock:
            for name, family in sorted(self._families.items()):
                lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}"]
                for (full, labels), number in sorted(family.values.items()):
                    inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
                    lines.append(
                        f"{full}{{{inner}}} {number:.17g}" if inner else f"{full} {number:.17g}"
                    )
        return "\n".join(lines) + "\n"

    def _add(
        self,
        name: str,
        kind: Literal["counter", "summary"],
        help_text: str,
        full: str,
        amount: float,
        labels: Mapping[str, str],
    ) -> None:
        key = (full, tuple(sorted(labels.items())))
        with self._lock:
            family = self._families.setdefault(name, _Family(kind, help_text))
            family.values[key] = family.values.get(key, 0.0) + amount


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class MetricsServer:
    """Serves metrics on 127.0.0.1 and nowhere else.

    Args:
        port: 0 takes a free one.

    Raises:
        FederationError: the port is taken.
    """

    def __init__(self, metrics: Metrics, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/metrics"
                body = metrics.text().encode() if known else b""
                self.send_response(200 if known else 404)
                self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise FederationError(
                f"Metrics cannot be served on 127.0.0.1, port {port}: {error.strerror}.",
                fix="Choose another port.",
            ) from None
        self._server.daemon_threads = True
        self._server.timeout = 5
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
