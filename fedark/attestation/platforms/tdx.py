"""Intel TDX: verify a DCAP quote, version 4, offline, and ask the kernel for one.

In the order of Intel's quote verification (QVL, QuoteVerifier.cpp): form, PCK path to the pinned
root key, collateral (current, of this platform, nothing revoked), the quoting enclave's report
under the PCK key, its binding of the attestation key, its identity, the quote under the attestation
key, TDX module, TCB level. Then the attributes of the guest itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedark.attestation import _x509
from fedark.attestation.claims import Claims
from fedark.attestation.platforms._tsm import REPORT_FOLDER, TsmFiles, tsm_report
from fedark.attestation.platforms.roots import INTEL_SGX_ROOT_PUBLIC_KEY
from fedark.attestation.platforms.tdx_collateral import (
    PLATFORM_STATUSES,
    Appraisal,
    Collateral,
    root_problems,
)
from fedark.attestation.platforms.tdx_quote import (
    SUBJECT,
    PckIdentity,
    TdxQuote,
    exact_quote,
    parse_quote,
    pck_identity,
)
from fedark.foundation.errors import EnclaveFailed, EvidenceRefused, InputError

__all__ = ["TdxAttester", "TdxVerifier"]

PLATFORM = "tdx"
# TD attributes ("Intel TDX Module Base Architecture Specification", ATTRIBUTES). Known and
# harmless: PKS and PERFMON.
_DEBUG = 1 << 0
_SEPT_VE_DISABLE = 1 << 28
_MIGRATABLE = 1 << 29
_KNOWN = _DEBUG | _SEPT_VE_DISABLE | _MIGRATABLE | 1 << 30 | 1 << 63


class TdxVerifier:
    """Verifies quotes of the platforms that its collateral speaks of.

    Args:
        collateral: JSON texts, one for each kind of platform and PCK CA
            (`tdx_collateral.Collateral`).
        accepted: TCB states that are good enough. "Revoked" never is.
        minimum_evaluation: oldest `tcbEvaluationDataNumber` of TCB info and QE identity.
        root_key: the pinned root's uncompressed public point.

    Raises:
        EvidenceRefused: collateral is malformed or not signed under `root_key`.
        InputError: `accepted` names a state that does not exist or must not be accepted.
    """

    platform = PLATFORM

    def __init__(
        self,
        collateral: Iterable[bytes],
        *,
        accepted: frozenset[str] = frozenset({"UpToDate"}),
        minimum_evaluation: int = 0,
        root_key: bytes = INTEL_SGX_ROOT_PUBLIC_KEY,
    ) -> None:
        wrong = accepted - (PLATFORM_STATUSES - {"Revoked"})
        if wrong:
            raise InputError(
                f"TCB states that no policy can accept: {', '.join(sorted(wrong))}.",
                fix=f"Choose among {', '.join(sorted(PLATFORM_STATUSES - {'Revoked'}))}.",
            )
        self._collateral = [Collateral(data, root_key=root_key) for data in collateral]
        self._accepted = accepted
        self._minimum_evaluation = minimum_evaluation
        self._root_key = root_key

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """The claims of a quote whose whole path, collateral and signatures hold at `now` (aware).

        A quote of a debug guest verifies and says `debug`; to refuse it is the policy's part. `svn`
        is the date of the oldest TCB level that matched (platform, module, quoting enclave) as a
        number, YYYYMMDD: Intel's own ordering of levels.

        Raises:
            EvidenceRefused: with every reason found.
        """
        quote = parse_quote(token)
        pck, _, root = quote.pck_path
        identity = pck_identity(pck)
        collateral = self._collateral_for(identity, pck)

        problems = _x509.path_problems(quote.pck_path, now=admitted or now) + root_problems(
            root, self._root_key
        )
        if "Intel SGX PCK Certificate" not in _x509.common_name(pck.subject):
            problems.append("The leaf of the certificate path is not a PCK certificate.")
        problems += collateral.problems(quote.pck_path, now=now, admitted=admitted)
        if collateral.evaluation < self._minimum_evaluation:
            problems.append(
                f"The collateral is of Intel's evaluation {collateral.evaluation}, older than"
                f" {self._minimum_evaluation}."
            )
        problems += _signature_problems(quote, pck)
        appraisal = collateral.appraise(quote, identity)
        problems += appraisal.problems + self._status_problems(appraisal) + _guest_problems(quote)
        if problems:
            raise EvidenceRefused(SUBJECT, problems)

        return Claims(
            platform=PLATFORM,
            hwmodel="intel-tdx",
            ueid=identity.ppid,
            report_data=quote.report_data,
            measurements=MappingProxyType(
                {
                    "mrtd": quote.mrtd,
                    **{f"rtmr{index}": value for index, value in enumerate(quote.rtmrs)},
                    "mrconfigid": quote.mrconfigid,
                    "mrowner": quote.mrowner,
                    "mrownerconfig": quote.mrownerconfig,
                    "mrseam": quote.mrseam,
                }
            ),
            debug=bool(quote.td_attributes & _DEBUG),
            svn=int(f"{appraisal.date:%Y%m%d}"),
            sandbox="",
            seccomp_digest=b"",
            landlock_digest=b"",
            issued_at=None,
            nonce=None,
        )

    def _collateral_for(self, identity: PckIdentity, pck: x509.Certificate) -> Collateral:
        fitting = [
            one
            for one in self._collateral
            if (one.fmspc, one.pck_issuer) == (identity.fmspc, pck.issuer)
        ]
        if fitting:
            return max(
                fitting, key=lambda one: one.issued
            )  # an older statement never counts beside a newer one
        raise EvidenceRefused(
            SUBJECT,
            [
                f"No collateral is at hand for its kind of platform (FMSPC {identity.fmspc.hex()})"
                " and its PCK CA."
            ],
        )

    def _status_problems(self, appraisal: Appraisal) -> list[str]:
        if (
            appraisal.status is None or appraisal.status in self._accepted
        ):  # None: its problems say why
            return []
        advisories = (
            f" (Intel's advisories: {', '.join(appraisal.advisories[:20])})"
            if appraisal.advisories
            else ""
        )
        return [f"The platform's TCB is {appraisal.status}{advisories}, which is not accepted."]


def _signature_problems(quote: TdxQuote, pck: x509.Certificate) -> list[str]:
    """PCK key -> quoting enclave's report -> attestation key -> quote."""
    problems = []
    pck_point = _x509.ec_point(pck, ec.SECP256R1)
    if pck_point is None or not _verifies(pck_point, quote.qe_report.raw, quote.qe_signature):
        problems.append(
            "The signature of the quoting enclave's report does not verify under the PCK."
        )
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth).digest() + bytes(32)
    if quote.qe_report.report_data != bound:
        problems.append("The quoting enclave did not vouch for the key that signed the quote.")
    if not _verifies(b"\x04" + quote.attestation_key, quote.signed, quote.signature):
        problems.append("The signature of the quote does not verify.")
    return problems


def _verifies(point: bytes, message: bytes, signature: bytes) -> bool:
    return _x509.verifies(
        point, ec.SECP256R1(), hashes.SHA256(), message, signature[:32], signature[32:]
    )


def _guest_problems(quote: TdxQuote) -> list[str]:
    problems = []
    if quote.td_attributes & ~_KNOWN:
        problems.append("The guest has attributes that this verifier does not know.")
    if quote.td_attributes & _MIGRATABLE:
        problems.append("The guest may be moved to another machine.")
    if not quote.td_attributes & _SEPT_VE_DISABLE:
        problems.append(
            "The host may inject page faults into the guest (SEPT_VE_DISABLE is not set)."
        )
    return problems


class TdxAttester:
    """Asks the kernel of this guest for a quote, by configfs-tsm.

    Args:
        folder, files: where and how configfs-tsm is reached.
    """

    platform = PLATFORM

    def __init__(self, *, folder: Path = REPORT_FOLDER, files: TsmFiles | None = None) -> None:
        self._folder = folder
        self._files = files

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """A quote over `report_data` (64 bytes), which already binds `nonce`.

        Raises:
            EnclaveFailed: this is not a TDX guest, or the kernel's answer is not over
                `report_data`.
            EvidenceRefused: the kernel's quote is malformed.
        """
        answer = tsm_report(
            report_data, provider="tdx_guest", folder=self._folder, files=self._files
        )
        quote = exact_quote(answer.outblob)
        if parse_quote(quote).report_data != report_data:
            raise EnclaveFailed(
                "The kernel's quote is not over our report data.",
                safe="No evidence left the enclave.",
            )
        return quote
