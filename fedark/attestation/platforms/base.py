"""The faces of a platform: who makes a token, what makes such a one, and who verifies tokens. All
else stays in its module.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol

from fedark.attestation.claims import Claims, SandboxFacts

__all__ = ["Attester", "EnclavePlatform", "Verifier"]


class Attester(Protocol):
    """Runs on the side of the enclave, in a process that holds the quoting key or reaches the
    hardware.
    """

    @property
    def platform(self) -> str:
        """The name under which a `Verifier` and a contract know it."""

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """A signed token over 64 bytes of report data; `nonce` (32 bytes) goes into the token where
        the platform has room.
        """


class EnclavePlatform(Protocol):
    """What enclaves run on: a simulated device, or a confidential guest."""

    def attester(self, *, measurements: Mapping[str, bytes], sandbox: SandboxFacts) -> Attester:
        """Who quotes for one enclave, of these four registers and so confined. It stays with the
        launcher.
        """

    def sealing_key(self, measurements: Mapping[str, bytes], sandbox: SandboxFacts) -> bytes:
        """32 bytes for the enclave of these registers, so confined, on this machine: what its
        checkpoints are sealed under.
        """


class Verifier(Protocol):
    """Checks tokens of one platform. Roots, CRLs and other collateral are given when it is made,
    never by the token.
    """

    @property
    def platform(self) -> str:
        """The name of the platform."""

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """The claims of `token`, if its signature and its whole chain hold at `now` (aware).

        Args:
            admitted: when this very token was verified before, for owners who were restarted. Then
                it is judged as of that time, but by revocation lists and statements that were
                current then or have been renewed since, up to `now`.

        Raises:
            EvidenceRefused: with every reason found.
        """
