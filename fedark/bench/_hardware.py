"""Real evidence of hardware, verified again and again: for `fedark bench gate`.

Samples are no part of fedark. `FEDARK_VECTORS` names a folder with some of these, as their makers
publish them:

    nitro.cose                                    AWS Nitro attestation document
    sev_snp_report_milan.hex, _vcek_milan.der, _chain_milan.pem    AMD SEV-SNP report, VCEK, ASK
                                                                   and ARK
    tdx_quote_v4.hex, tdx_collateral.json         Intel TDX quote and its collateral
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedark.attestation.platforms.nitro import NitroVerifier
from fedark.attestation.platforms.sev_snp import SevSnpVerifier, SnpTcb
from fedark.attestation.platforms.tdx import TdxVerifier
from fedark.attestation.platforms.tdx_quote import exact_quote
from fedark.foundation.errors import EvidenceRefused

__all__ = ["rates"]

_SECONDS = 2.0


def rates() -> Iterator[tuple[str, float]]:
    """Platform, verifications a second of processor time, for each sample in the folder that
    `FEDARK_VECTORS` names.
    """
    given = os.environ.get("FEDARK_VECTORS")
    for name, files, make in _SAMPLES if given else ():
        paths = [Path(str(given)) / file for file in files]
        if all(path.is_file() for path in paths):
            yield name, _rate(make(*(path.read_bytes() for path in paths)))


def _rate(verify: Callable[[], object]) -> float:
    verify()
    done, begun = 0, time.process_time()
    while (spent := time.process_time() - begun) < _SECONDS:
        verify()
        done += 1
    return done / spent


def _nitro(document: bytes) -> Callable[[], object]:
    verifier = NitroVerifier()
    return lambda: verifier.verify(document, now=datetime(2025, 1, 6, 16, 10, tzinfo=UTC))


def _snp(report: bytes, vcek: bytes, chain: bytes) -> Callable[[], object]:
    ask, ark = (one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(chain))
    verifier = SevSnpVerifier(
        minimum_tcb={"Milan": SnpTcb(bootloader=3, tee=0, snp=8, microcode=115)}
    )
    token = bytes.fromhex(report.decode()) + vcek + ask + ark
    return lambda: verifier.verify(token, now=datetime(2025, 6, 1, tzinfo=UTC))


def _tdx(quote: bytes, collateral: bytes) -> Callable[[], object]:
    verifier, token = (
        TdxVerifier([collateral]),
        exact_quote(bytes.fromhex(quote.decode().strip().removeprefix("0x"))),
    )

    def verify() -> None:
        # Everything is checked, and then its TCB is refused: no newer collateral of this platform
        # is published.
        with suppress(EvidenceRefused):
            verifier.verify(token, now=datetime(2025, 6, 20, 12, tzinfo=UTC))

    return verify


_SAMPLES: tuple[tuple[str, tuple[str, ...], Callable[..., Callable[[], object]]], ...] = (
    ("Nitro document", ("nitro.cose",), _nitro),
    (
        "SEV-SNP report",
        ("sev_snp_report_milan.hex", "sev_snp_vcek_milan.der", "sev_snp_chain_milan.pem"),
        _snp,
    ),
    ("TDX quote, to its refusal", ("tdx_quote_v4.hex", "tdx_collateral.json"), _tdx),
)
