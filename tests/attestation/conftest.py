"""A small attestation lab: one manufacturer, one device, one contract's terms, one gate; every part
can be replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from fedark.attestation.binding import HOST_LABEL, KeyBinding
from fedark.attestation.claims import SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import AttestedPeer, Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.simulated import (
    SimulatedAttester,
    SimulatedDevice,
    SimulatedRoot,
    SimulatedVerifier,
)
from fedark.attestation.terms import AttestationTerms, SandboxPolicies
from fedark.foundation.keys import HpkeKey, SigningKey

POLICIES = SandboxPolicies(seccomp=((b"s" * 48).hex(),), landlock=((b"l" * 48).hex(),))
NOW = datetime(2027, 3, 1, 12, 0, tzinfo=UTC)


@dataclass
class Lab:
    """Everything that one admission needs."""

    root: SimulatedRoot
    device: SimulatedDevice
    measurements: dict[str, bytes]
    nonces: NonceBook = field(default_factory=NonceBook)
    contract: bytes = b"c" * 48
    run: str = "run-1"
    now: datetime = NOW
    hpke: bytes = field(default_factory=lambda: HpkeKey().public)
    signing: bytes = field(default_factory=lambda: SigningKey().public)
    host: SigningKey = field(default_factory=SigningKey)

    def terms(self, **changes: Any) -> AttestationTerms:
        reference = {
            name: value.hex() for name, value in self.measurements.items() if name != "runconfig"
        }
        values: dict[str, Any] = {
            "platforms": ("simulated",),
            "simulated_root": self.root.sha256,
            "policies": dict.fromkeys(("namespaces", "landlock"), POLICIES),
            "trainer": reference,
            "aggregator": reference,
        }
        return AttestationTerms(**values | changes)

    def verifier(self) -> SimulatedVerifier:
        return SimulatedVerifier(self.root.certificate, self.root.crl(now=self.now))

    def gate(self, **changes: Any) -> Gate:
        values: dict[str, Any] = {
            "terms": self.terms(),
            "contract_digest": self.contract,
            "run_id": self.run,
            "verifiers": {"simulated": self.verifier()},
            "nonces": self.nonces,
            "hosts": {"north": self.host.public},
        }
        return Gate(**values | changes)

    def attester(self, **changes: Any) -> SimulatedAttester:
        values: dict[str, Any] = {
            "measurements": self.measurements,
            "sandbox": SandboxFacts("namespaces", b"s" * 48, b"l" * 48),
            "clock": lambda: self.now,
        }
        return SimulatedAttester(changes.pop("device", self.device), **values | changes)

    def binding(self, nonce: bytes, **changes: Any) -> KeyBinding:
        whole = KeyBinding(
            nonce, self.hpke, self.signing, self.contract, self.run, "trainer", "north"
        )
        return replace(whole, **changes)

    def evidence(
        self,
        gate: Gate,
        *,
        attester: SimulatedAttester | None = None,
        nonce: bytes | None = None,
        **changes: Any,
    ) -> bytes:
        """Honest evidence of north's trainer; `changes` alter the binding before it is quoted."""
        nonce = gate.challenge("trainer", "north", now=self.now) if nonce is None else nonce
        binding = self.binding(nonce, **changes)
        token = (attester or self.attester()).quote(binding.report_data(), binding.nonce)
        return Evidence(
            "simulated", token, binding, self.host.sign(HOST_LABEL, binding.host_statement())
        ).encode()

    def admit(self, gate: Gate, evidence: bytes, **changes: Any) -> AttestedPeer:
        values: Mapping[str, Any] = {
            "role": "trainer",
            "party": "north",
            "run_config_digest": self.measurements["runconfig"],
            "now": self.now,
        }
        return gate.admit(evidence, **{**values, **changes})


@pytest.fixture
def lab() -> Lab:
    root = SimulatedRoot(now=NOW)
    registers = {
        name: os.urandom(48) for name in ("launcher", "runtime", "application", "runconfig")
    }
    return Lab(root, root.issue(now=NOW), registers)
