"""The parties of a job, with every message that passes them written to a file: for the search of
what must never cross. Run as a host (`host FOLDER`) or a node (`node FOLDER`).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedark.foundation.logs import teller
from fedark.operate.daemon import Served
from fedark.operate.host import work
from fedark.operate.host.supervisor import run_host
from fedark.operate.node import serve
from fedark.operate.node.supervisor import run_node

CAPTURE = "capture"


class _Captured:
    def __init__(self, inner: Any, folder: Path) -> None:
        self.party, self.role = inner.party, inner.role
        self._inner = inner
        self._folder = folder / CAPTURE
        self._folder.mkdir(exist_ok=True)
        self._number = itertools.count()

    def handle(self, request: bytes) -> bytes:
        reply: bytes = self._inner.handle(request)
        number = next(self._number)
        (self._folder / f"{number:04}.request").write_bytes(request)
        (self._folder / f"{number:04}.reply").write_bytes(reply)
        return reply

    def close(self) -> None:
        self._inner.close()


def _captured(make: Callable[[dict[str, Any]], Served]) -> Callable[[dict[str, Any]], Served]:
    def captured(settings: dict[str, Any]) -> Served:
        served = make(settings)
        return replace(served, node=_Captured(served.node, Path(settings["folder"])))

    return captured


make_node = _captured(serve.make_node)
make_aggregator = _captured(work.make_aggregator)

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "host":
        run_host(folder, teller("host"), work.Work(aggregator="captured:make_aggregator"))
    else:
        run_node(folder, teller("node"), factory="captured:make_node")
