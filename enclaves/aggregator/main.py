"""Entry point of the aggregator enclave: numpy and cryptography, no torch."""

from __future__ import annotations

import json
import sys

SPECIFICATION = json.loads(sys.stdin.buffer.read())
sys.path[:] = SPECIFICATION["path"]

from fedark.enclave.main import Create, run  # noqa: E402


def load() -> Create:
    import numpy as np

    from fedark.enclave import aggregator  # noqa: F401
    from fedark.enclave.roles import create

    # Starts the threads of numpy's linear algebra before the final filter.
    np.ones((256, 256), dtype=np.float32) @ np.ones((256, 256), dtype=np.float32)
    return create


run(SPECIFICATION, load)
