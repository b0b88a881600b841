"""The parties of a deployment, with every message that passes them written to a file: for the
search of what must never cross.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedark.operate import daemons

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


def _captured(make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], _Captured]:
    return lambda settings: _Captured(make(settings), Path(settings["folder"]))


make_node = _captured(daemons.make_node)
make_aggregator = _captured(daemons.make_aggregator)
