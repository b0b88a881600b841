"""Metrics for Prometheus, on loopback: GET /metrics of a host or a node that was given a port.

Counters, summaries and gauges are prometheus_client's; here are the two parts that it leaves to us.
What a host and a node count stands in `operate/host/observed.py` and `operate/node/observed.py`.
No label ever comes from another party's bytes but a stage's or an error's name, both from closed
lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedark.foundation.errors import FederationError

__all__ = ["GaugeByLabel", "MetricsServer"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter


class GaugeByLabel(Collector):
    """A gauge whose values are asked for whenever metrics are read: what is gone is not reported.

    Args:
        label: the one label's name.
        values: gives the label's values and the numbers.
    """

    def __init__(
        self, name: str, help_text: str, label: str, values: Callable[[], Mapping[str, float]]
    ) -> None:
        self._name, self._help, self._label, self._values = name, help_text, label, values

    def describe(self) -> Iterable[Metric]:
        """The gauge without values: registering it asks for none."""
        return [GaugeMetricFamily(self._name, self._help, labels=[self._label])]

    def collect(self) -> Iterable[Metric]:
        """The gauge as it is now."""
        family = GaugeMetricFamily(self._name, self._help, labels=[self._label])
        for value, number in self._values().items():
            family.add_metric([value], number)
        return [family]


class MetricsServer:
    """Serves a registry's metrics on 127.0.0.1 and nowhere else.

    Args:
        port: 0 takes a free one.

    Raises:
        FederationError: the port is taken.
    """

    def __init__(self, registry: CollectorRegistry, port: int) -> None:
        try:
            self._server, _ = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise FederationError(
                f"Metrics cannot be served on 127.0.0.1, port {port}: {error.strerror}.",
                fix="Choose another port.",
            ) from None
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
