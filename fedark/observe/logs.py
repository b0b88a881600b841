from __future__ import annotations

import sys
from collections.abc import Callable


def teller(name: str) -> Callable[[str], None]:
    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return tell
