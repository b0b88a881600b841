"""What evidence is about: an enclave's fresh keys, for one nonce, one contract, one run, one role,
one party.

A platform signs 64 bytes of report data and knows nothing of keys or contracts.
`KeyBinding.report_data` is SHA-512 over the canonical form of everything that the evidence shall
stand for; it fits the report data of SEV-SNP and TDX. Whoever changes one field of a binding
changes the report data, and with it what the platform would have had to sign.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from fedark.foundation import canonical
from fedark.foundation.errors import ProtocolError
from fedark.foundation.keys import Kem, kem_of

__all__ = ["HOST_LABEL", "NONCE_BYTES", "REPORT_DATA_BYTES", "ROLES", "KeyBinding"]

NONCE_BYTES = 32
REPORT_DATA_BYTES = 64
ROLES = ("trainer", "aggregator", "inference")
_LABEL = "fedark/report-data/1"
HOST_LABEL = "fedark/enclave-host/1"
_SIGNING_BYTES = 32
_CONTRACT_BYTES = 48
_PARTY = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class KeyBinding:
    """The statement that report data stands for.

    Attributes:
        nonce: 32 bytes, the verifier's challenge.
        hpke_public: the enclave alone opens what is sealed to it; its length says of which KEM it
            is (`kem`).
        signing_public: 32 bytes, Ed25519.
        contract_digest: 48 bytes, SHA-384 of the job contract.
        run_id: of the run: 1 to 64 characters of `A-Z a-z 0-9 _ -`; it also names a folder.
        role: "trainer" or "aggregator".
        party: the party that hosts the enclave, by its name in the contract.

    Raises:
        ProtocolError: a field has another length or form.
    """

    nonce: bytes
    hpke_public: bytes
    signing_public: bytes
    contract_digest: bytes
    run_id: str
    role: str
    party: str

    def __post_init__(self) -> None:
        problems = [
            f"{name} is not {length} bytes"
            for name, length in (
                ("nonce", NONCE_BYTES),
                ("signing_public", _SIGNING_BYTES),
                ("contract_digest", _CONTRACT_BYTES),
            )
            if type(getattr(self, name)) is not bytes or len(getattr(self, name)) != length
        ]
        try:
            kem_of(self.hpke_public if type(self.hpke_public) is bytes else b"")
        except ProtocolError:
            problems.append("hpke_public is a key of no KEM")
        if type(self.run_id) is not str or not _RUN.fullmatch(self.run_id):
            problems.append("run_id is malformed")
        if self.role not in ROLES:
            problems.append("role is neither trainer nor aggregator")
        if type(self.party) is not str or not _PARTY.fullmatch(self.party):
            problems.append("party is malformed")
        if problems:
            raise ProtocolError(
                f"A key binding is malformed: {'; '.join(problems)}.", safe="It was not used."
            )

    @property
    def kem(self) -> Kem:
        """The KEM that the enclave offers: whoever swaps it swaps the key, and with it the report
        data.
        """
        return kem_of(self.hpke_public)

    def report_data(self) -> bytes:
        """SHA-512 over the labelled canonical list of all fields, 64 bytes."""
        fields = [
            self.nonce,
            self.hpke_public,
            self.signing_public,
            self.contract_digest,
            self.run_id,
            self.role,
            self.party,
        ]
        return hashlib.sha512(canonical.encode([_LABEL, *fields])).digest()

    def host_statement(self) -> bytes:
        """What the party signs (`HOST_LABEL`) to say that this enclave is one that it has started
        itself: all but the nonce.
        """
        fields = [
            self.contract_digest,
            self.run_id,
            self.role,
            self.party,
            self.signing_public,
            self.hpke_public,
        ]
        return canonical.encode(fields)

    def to_map(self) -> dict[str, Any]:
        return {
            "nonce": self.nonce,
            "hpke_public": self.hpke_public,
            "signing_public": self.signing_public,
            "contract_digest": self.contract_digest,
            "run_id": self.run_id,
            "role": self.role,
            "party": self.party,
        }

    @classmethod
    def from_map(cls, value: Any) -> KeyBinding:
        """Read what `to_map` gives.

        Raises:
            ProtocolError: a field is missing, unknown or malformed.
        """
        if type(value) is not dict or set(value) != set(cls.__dataclass_fields__):
            raise ProtocolError(
                "A key binding is not a map of exactly its fields.", safe="It was not used."
            )
        return cls(**value)
