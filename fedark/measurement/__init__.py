"""Measuring enclaves: manifest, tree digests, and the registers that evidence carries and contracts name."""

from __future__ import annotations

from fedark.measurement.manifest import Manifest, enclave_dir
from fedark.measurement.measure import Measurement, differences, measure_enclave, run_config_register

__all__ = ["Manifest", "Measurement", "differences", "enclave_dir", "measure_enclave", "run_config_register"]
