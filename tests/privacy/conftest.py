"""Google's accountant, as an independent oracle: install dp-accounting (Apache-2.0) with absl-py,
attrs, dm-tree and mpmath.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def dp_accounting():
    return pytest.importorskip(
        "dp_accounting", reason="dp-accounting, the oracle of this test, is not installed"
    )


@pytest.fixture(scope="session")
def pld(dp_accounting):
    """The module of privacy loss distributions."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution
