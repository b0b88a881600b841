"""Measuring enclaves: manifest, tree digests, and the registers that evidence carries and contracts
name.
"""

from __future__ import annotations

from fedark.measurement.manifest import EnclaveManifest, enclave_dir
from fedark.measurement.measure import (
    Measurement,
    differences,
    measure_enclave,
    run_config_register,
)
from fedark.measurement.policies import reference_policies

__all__ = [
    "EnclaveManifest",
    "Measurement",
    "differences",
    "enclave_dir",
    "measure_enclave",
    "reference_policies",
    "run_config_register",
]
