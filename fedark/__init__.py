"""fedark: fine-tune a provider's model on data that nobody else may see.

    Job               a job file, read and checked
    plan              terms for a private job, and what to expect of them
    simulate          run a job in this process; gives a Result
    compare           judge them all, tune the best, and say which is the one
    taste             judge a job's base models before anything is tuned
    seal              encrypt a base model for attested enclaves
    audit             attack a privacy claim
    verify_dossier    what a run's dossier proves
    verify_evidence   what an enclave's evidence proves

Everything is in `fedark.api` and imported when it is first used: an enclave imports this package
too, and must not load what it does not need.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedark.api import (
        Job,
        Result,
        audit,
        compare,
        plan,
        seal,
        simulate,
        taste,
        verify_dossier,
        verify_evidence,
    )

__all__ = [
    "Job",
    "Result",
    "__version__",
    "audit",
    "compare",
    "plan",
    "seal",
    "simulate",
    "taste",
    "verify_dossier",
    "verify_evidence",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedark' has no attribute {name!r}")
    return getattr(importlib.import_module("fedark.api"), name)


def __dir__() -> list[str]:
    return __all__
