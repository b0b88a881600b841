"""What the chaos tests share: the small job, prepared with the strongest sandbox that this machine
has.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    str(Path(__file__).resolve().parents[1] / "stages"),
]
