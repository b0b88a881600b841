"""A run's page as a file: `python -m fedark.report.writing DOSSIER PAGE`, and the function behind
it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedark.foundation.errors import FedarkError
from fedark.foundation.files import disk_errors, write_atomic
from fedark.report.outcome import local_reports
from fedark.report.page import page
from fedark.report.verify import read_dossier, verify_dossier

__all__ = ["write_page"]


def write_page(dossier: Path, out: Path, work: Path | None = None) -> Path:
    """Write the page of a dossier that holds; of a customer's own with its own figures.

    Args:
        work: the folder of a simulation, whose customers' own figures one person may see.

    Raises:
        DossierRefused: it does not hold; nothing was written.
        InputError, StorageError: a file cannot be read or written.
    """
    verified = verify_dossier(read_dossier(dossier))
    local: Mapping[str, Any] = verified.own
    if work is not None:
        local = local_reports(verified.contract, work, verified.report["run_id"])
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(verified, local).encode(), mode=0o600 if local else 0o644)
    return out


if __name__ == "__main__":
    try:
        write_page(Path(sys.argv[1]), Path(sys.argv[2]))
    except FedarkError as error:
        sys.exit(str(error))
