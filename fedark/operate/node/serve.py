"""What a node's daemon serves: the party's node, observed, and what answers its operator."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from fedark.foundation.metrics import GaugeByLabel
from fedark.operate.daemon import Served, enclaves, teller
from fedark.operate.node.observed import ObservedNode
from fedark.operate.node.queries import NodeQueries
from fedark.operate.party import PartyConfig, load_node

__all__ = ["make_node"]


def make_node(settings: dict[str, Any]) -> Served:
    """The node of the party folder `settings["folder"]`, with enclaves in sandboxed processes."""
    folder = Path(settings["folder"])
    start = None if PartyConfig.read(folder).role == "provider" else enclaves(folder)
    node = load_node(folder, start, teller(folder))
    # Its requests wait for it; the daemon serves meanwhile.
    threading.Thread(target=node.wake, name="wake", daemon=True).start()
    queries, metrics = NodeQueries(folder), CollectorRegistry()
    what = "Contracts by the operator's decision."
    metrics.register(GaugeByLabel("fedark_contracts", what, "decision", queries.decisions))
    if node.role == "customer":
        what = "Of the privacy budget, at its delta."
        metrics.register(GaugeByLabel("fedark_privacy_epsilon", what, "of", queries.budget))
    return Served(ObservedNode(node, metrics), queries, metrics)
