"""AMD SEV-SNP: verify a guest's attestation report offline, and ask the kernel for one.

A token is the report, followed by the certificates that the host's table holds: VCEK, ASK, ARK, in
DER and in this order; those at the end may be missing where the verifier has them. In this order it
checks: the form of the report (`sev_snp_report`), the path VCEK - ASK - ARK to a pinned ARK, that
the VCEK is of this chip and of the reported TCB ("VCEK Certificate and KDS Interface
Specification", 57230, table 8), the signature, and then what a relying party asks for: a minimum
TCB, a VMPL, no migration, and what the report says of the machine (`PLATFORM_FACTS`). Reports
signed by a VLEK (a cloud's key and not a chip's) are refused.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedark.attestation import _x509
from fedark.attestation.claims import Claims
from fedark.attestation.platforms._tsm import REPORT_FOLDER, TsmFiles, tsm_report
from fedark.attestation.platforms.roots import AMD_ARK_SHA256
from fedark.attestation.platforms.sev_snp_report import (
    PLATFORM_FACTS,
    REPORT_BYTES,
    SUBJECT,
    SnpReport,
    SnpTcb,
    parse_report,
)
from fedark.foundation.errors import EnclaveFailed, EvidenceRefused, printable

__all__ = ["SevSnpAttester", "SevSnpVerifier", "SnpTcb", "certificates_of_table"]

PLATFORM = "sev-snp"
_MAX_TOKEN = REPORT_BYTES + 3 * 8192
_ROLES = ("VCEK", "ASK", "ARK")
# Object identifiers of a VCEK's extensions (57230, table 8).
_HWID = "1.3.6.1.4.1.3704.1.4"
_PRODUCT_NAME = "1.3.6.1.4.1.3704.1.2"
_TCB_PART = "1.3.6.1.4.1.3704.1.3."
_TCB_PARTS = {1: "bootloader", 2: "tee", 3: "snp", 8: "microcode"}
_TCB_RESERVED = (4, 5, 6, 7)
# Of the host's certificate table (Guest-Hypervisor Communication Block, 56421, section 4.1.8.1).
_TABLE_GUIDS = {
    uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd"): "VCEK",
    uuid.UUID("4ab7b379-bbac-4fe4-a02f-05aef327c782"): "ASK",
    uuid.UUID("c0b406a4-a803-4952-9743-3fb6014cd0ae"): "ARK",
}


class SevSnpVerifier:
    """Verifies reports of Milan and Genoa chips under pinned AMD root keys.

    Args:
        minimum_tcb: product name -> TCB of which no part may be older in any of the report's four;
            versions of one product say nothing about another, so a product that is not named is
            refused. AMD's security bulletins name the values.
        certificates: DER; VCEKs, ASKs and ARKs for tokens that come without.
        crls: DER; AMD's lists of revoked ASKs. Where the issuer of an ASK has one here, it must be
            current.
        require_crl: refuse where it has none: lists come through hosts that would otherwise hide a
            revocation.
        vmpls: privilege levels that may ask; 0 unless a paravisor below the guest is part of what
            is trusted.
        requires: facts of the machine (keys of `PLATFORM_FACTS`) that must hold.
        roots: product name -> SHA-256 of the DER form of its ARK certificate.

    Raises:
        EvidenceRefused: a certificate or list is malformed.
    """

    platform = PLATFORM

    def __init__(
        self,
        *,
        minimum_tcb: Mapping[str, SnpTcb],
        certificates: Iterable[bytes] = (),
        crls: Iterable[bytes] = (),
        require_crl: bool = False,
        vmpls: frozenset[int] = frozenset({0}),
        requires: frozenset[str] = frozenset(),
        roots: Mapping[str, bytes] = AMD_ARK_SHA256,
    ) -> None:
        self._minimum_tcb = dict(minimum_tcb)
        self._known = [
            _x509.load_certificate(der, "A known certificate", SUBJECT) for der in certificates
        ]
        self._crls = [_x509.RevocationList(der, "The AMD revocation list", SUBJECT) for der in crls]
        self._require_crl = require_crl
        self._vmpls = vmpls
        self._requires = requires
        self._roots = dict(roots)

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """The claims of a report whose whole path and signature hold at `now` (aware).

        A report of a guest with a debug policy verifies and says `debug`; to refuse it is the
        policy's part.

        Raises:
            EvidenceRefused: with every reason found.
        """
        report, given = _split(token)
        vcek, ask, ark = self._path(report, given)
        product = next(
            (name for name, pin in self._roots.items() if pin == _x509.fingerprint(ark)), None
        )

        problems: list[str] = []
        if product is None:
            problems.append("The certificate path does not end at a pinned AMD root key.")
        elif _x509.common_name(ask.subject) != f"SEV-{product}":
            problems.append(
                f"The VCEK was issued by {printable(_x509.common_name(ask.subject), 64)}, not by"
                f" SEV-{product}."
            )
        problems += _x509.path_problems([vcek, ask, ark], now=admitted or now)
        crls = [crl for crl in self._crls if crl.issuer == ark.subject]
        if self._require_crl and not crls:
            problems.append(
                "There is no revocation list of the issuer of the ASK certificate, and one is"
                " required."
            )
        for crl in crls:
            problems += crl.signature_problems(ark) + crl.problems(ask, now=now, admitted=admitted)
        problems += _vcek_problems(vcek, report, product)
        point = _x509.ec_point(vcek, ec.SECP384R1)
        if point is None:
            problems.append("The VCEK is not a P-384 key.")
        elif not _x509.verifies(
            point, ec.SECP384R1(), hashes.SHA384(), report.signed, report.r, report.s
        ):
            problems.append("The signature of the report does not verify.")
        problems += self._policy_problems(report, product)
        if problems:
            raise EvidenceRefused(SUBJECT, problems)

        return Claims(
            platform=PLATFORM,
            hwmodel=f"amd-sev-snp-{product}".lower(),
            ueid=report.chip_id,
            report_data=report.report_data,
            measurements=MappingProxyType(
                {
                    "measurement": report.measurement,
                    "host_data": report.host_data,
                    "id_key_digest": report.id_key_digest,
                    "author_key_digest": report.author_key_digest,
                }
            ),
            debug=report.debug,
            svn=report.guest_svn,
            sandbox="",
            seccomp_digest=b"",
            landlock_digest=b"",
            issued_at=None,
            nonce=None,
        )

    def _path(self, report: SnpReport, given: list[x509.Certificate]) -> list[x509.Certificate]:
        """VCEK, ASK, ARK: the token's as they stand, others from what this verifier knows."""
        path = list(given)
        if not path:
            path += [known for known in self._known if not _vcek_problems(known, report, None)][:1]
        while 1 <= len(path) < len(_ROLES):
            issuers = [known for known in self._known if known.subject == path[-1].issuer]
            if not issuers:
                break
            path.append(issuers[0])
        if len(path) < len(_ROLES):
            raise EvidenceRefused(
                SUBJECT,
                [f"The {_ROLES[len(path)]} certificate came with neither token nor verifier."],
            )
        return path

    def _policy_problems(self, report: SnpReport, product: str | None) -> list[str]:
        problems = []
        minimum = self._minimum_tcb.get(product or "")
        if minimum is None:
            problems.append(
                f"There is no minimum TCB for the product {product or 'of an unknown root'}, so it"
                " is not accepted."
            )
        else:
            for name in ("reported", "committed", "launch", "current"):
                older = getattr(report, name).below(minimum)
                if older:
                    problems.append(
                        f"The {name} TCB is older than the minimum: {', '.join(older)}."
                    )
        if report.vmpl not in self._vmpls:
            problems.append(
                f"The report was asked for at VMPL {report.vmpl}, which is not allowed."
            )
        problems += [
            f"{name} is asked for: {PLATFORM_FACTS[name]}."
            for name in sorted(self._requires - report.platform)
        ]
        if report.migratable:
            problems.append("A migration agent may move the guest to another machine.")
        return problems


def _split(token: bytes) -> tuple[SnpReport, list[x509.Certificate]]:
    """The report of a token and the certificates behind it, leaf first."""
    if len(token) > _MAX_TOKEN:
        raise EvidenceRefused(
            SUBJECT, [f"The token has {len(token)} bytes, over the limit of {_MAX_TOKEN}."]
        )
    report = parse_report(token[:REPORT_BYTES])
    try:
        items = _x509.der_items(token[REPORT_BYTES:])
    except ValueError:
        raise EvidenceRefused(SUBJECT, ["What follows the report is not certificates."]) from None
    if len(items) > len(_ROLES):
        raise EvidenceRefused(
            SUBJECT, [f"{len(items)} certificates follow the report, more than {len(_ROLES)}."]
        )
    certificates = []
    at = REPORT_BYTES
    for role, (_, _, size) in zip(_ROLES, items, strict=False):
        certificates.append(
            _x509.load_certificate(token[at : at + size], f"The {role} certificate", SUBJECT)
        )
        at += size
    return report, certificates


def _vcek_problems(vcek: x509.Certificate, report: SnpReport, product: str | None) -> list[str]:
    """Whether the key is that of this chip at the reported TCB."""
    problems = []
    if _x509.extension_bytes(vcek, _HWID) != report.chip_id:
        problems.append("The VCEK is of another chip than the report (or the host masks the chip).")
    for number, part in _TCB_PARTS.items():
        version = _der_integer(_x509.extension_bytes(vcek, f"{_TCB_PART}{number}"))
        if version != getattr(report.reported, part):
            problems.append(
                f"The VCEK is of {part} version {version}, the report of"
                f" {getattr(report.reported, part)}."
            )
    if any(
        _der_integer(_x509.extension_bytes(vcek, f"{_TCB_PART}{number}")) != 0
        for number in _TCB_RESERVED
    ):
        problems.append("The VCEK has reserved TCB parts.")
    if product is not None:
        name = _der_string(_x509.extension_bytes(vcek, _PRODUCT_NAME))
        if name.split("-")[0] != product:
            problems.append(f"The VCEK is of the product {name!r:.20}, not {product}.")
    return problems


def _der_integer(data: bytes | None) -> int | None:
    """A DER INTEGER from 0 to 255, or None."""
    if data is None or len(data) not in (3, 4) or data[:2] != bytes((2, len(data) - 2)):
        return None
    value = int.from_bytes(data[2:], signed=True)
    return value if 0 <= value <= 255 and (len(data) == 3) == (value < 128) else None


def _der_string(data: bytes | None) -> str:
    """A short DER IA5String, or ""."""
    if data is None or len(data) < 2 or data[0] != 0x16 or data[1] != len(data) - 2:
        return ""
    return data[2:].decode("ascii", "replace")


class SevSnpAttester:
    """Asks the kernel of this guest for a report, by configfs-tsm.

    Args:
        vmpl: privilege level to report from; None for the kernel's own.
        folder, files: where and how configfs-tsm is reached.
    """

    platform = PLATFORM

    def __init__(
        self,
        *,
        vmpl: int | None = None,
        folder: Path = REPORT_FOLDER,
        files: TsmFiles | None = None,
    ) -> None:
        self._vmpl = vmpl
        self._folder = folder
        self._files = files

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """A report over `report_data` (64 bytes), which already binds `nonce`, with the host's
        certificates behind it.

        Raises:
            EnclaveFailed: this is not an SNP guest, or the kernel's answer is not over
                `report_data`.
        """
        answer = tsm_report(
            report_data,
            provider="sev_guest",
            privilege=self._vmpl,
            folder=self._folder,
            files=self._files,
        )
        if answer.outblob[0x50:0x90] != report_data or len(answer.outblob) != REPORT_BYTES:
            raise EnclaveFailed(
                "The kernel's report is not over our report data.",
                safe="No evidence left the enclave.",
            )
        return answer.outblob + b"".join(certificates_of_table(answer.auxblob))


def certificates_of_table(table: bytes) -> list[bytes]:
    """VCEK, ASK and ARK, as far as they stand without a gap, in a host's certificate table; empty
    if it is none.

    A host that garbles its table loses its own evidence and harms no one else, so whatever is not
    understood is left out.
    """
    found: dict[str, bytes] = {}
    for at in range(0, len(table) - 23, 24):
        guid, offset, size = (
            table[at : at + 16],
            *(int.from_bytes(table[at + 16 + i : at + 20 + i], "little") for i in (0, 4)),
        )
        if guid == bytes(16):
            break
        # Hosts write the identifiers in either byte order.
        role = _TABLE_GUIDS.get(uuid.UUID(bytes=guid)) or _TABLE_GUIDS.get(uuid.UUID(bytes_le=guid))
        if role is not None and offset + size <= len(table):
            found[role] = table[offset : offset + size]
    certificates = []
    for role in _ROLES:
        if role not in found:
            break
        certificates.append(found[role])
    return certificates
