"""Vendors of our own: a small certificate authority, an Intel, an AMD and an AWS, whose evidence a
test can bend as it likes.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from fedark.attestation.platforms.nitro import NitroVerifier
from fedark.attestation.platforms.sev_snp import SevSnpVerifier, SnpTcb
from fedark.attestation.platforms.sev_snp_report import REPORT_BYTES
from fedark.attestation.platforms.tdx import TdxVerifier

NOW = dt.datetime(2030, 6, 1, 12, 0, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


@dataclass
class Holder:
    """A certificate and its private key."""

    cert: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def der(self) -> bytes:
        return self.cert.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.cert.public_bytes(Encoding.PEM)

    @property
    def point(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)

    @property
    def sha256(self) -> bytes:
        return self.cert.fingerprint(hashes.SHA256())


def issue(
    name: str,
    issuer: Holder | None = None,
    *,
    ca: bool | None = True,
    path_length: int | None = None,
    may_sign: bool = True,
    curve: ec.EllipticCurve | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
    start: dt.datetime = NOW - 30 * DAY,
    end: dt.datetime = NOW + 30 * DAY,
    extensions: Sequence[tuple[str, bytes, bool]] = (),
) -> Holder:
    """A certificate by `issuer` (by itself if None); `ca=None` leaves out basic constraints and key
    usage.
    """
    key = key or ec.generate_private_key(curve or ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.cert.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if ca is not None:
        builder = builder.add_extension(
            x509.BasicConstraints(ca, path_length if ca else None), True
        )
        usage = dict.fromkeys(
            (
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(
            x509.KeyUsage(
                digital_signature=not ca and may_sign,
                key_cert_sign=ca and may_sign,
                crl_sign=ca and may_sign,
                **usage,
            ),
            True,
        )
    for oid, value, critical in extensions:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical
        )
    signer = issuer.key if issuer else key
    digest = hashes.SHA384() if signer.curve.key_size == 384 else hashes.SHA256()
    return Holder(builder.sign(signer, digest), key)


def revoke(
    issuer: Holder,
    revoked: Iterable[x509.Certificate] = (),
    *,
    start: dt.datetime = NOW - DAY,
    end: dt.datetime = NOW + DAY,
    critical: bool = False,
) -> bytes:
    """A CRL by `issuer`, in DER."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.cert.subject)
        .last_update(start)
        .next_update(end)
    )
    builder = builder.add_extension(x509.CRLNumber(1), critical)
    for cert in revoked:
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(cert.serial_number)
            .revocation_date(start)
            .build()
        )
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


class Authority:
    """`issue` and `revoke` with dates around `now`."""

    day = DAY

    def __init__(self, now: dt.datetime = NOW) -> None:
        self.now = now

    def issue(self, *args: Any, **options: Any) -> Holder:
        return issue(*args, **{"start": self.now - 30 * DAY, "end": self.now + 30 * DAY, **options})

    def revoke(self, *args: Any, **options: Any) -> bytes:
        return revoke(*args, **{"start": self.now - DAY, "end": self.now + DAY, **options})


# Intel TDX: an Intel of our own
FMSPC = bytes.fromhex("00a06d080000")
SEPT_VE_DISABLE = 1 << 28
INTEL_QE = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
QE_SIGNER = b"\xdc" * 32


def tlv(tag, content):
    size = len(content)
    return (
        bytes((tag, size)) + content
        if size < 128
        else bytes((tag, 0x82)) + size.to_bytes(2) + content
    )


def sgx_extension(
    *, fmspc=FMSPC, pceid=bytes(2), components=(3,) * 16, pcesvn=11, ppid=bytes(range(16))
):
    oid = bytes.fromhex("2a864886f84d010d01")

    def pair(suffix, tag, content):
        return tlv(0x30, tlv(0x06, oid + suffix) + tlv(tag, content))

    tcb = b"".join(
        pair(bytes((2, number)), 0x02, bytes((svn,)))
        for number, svn in enumerate((*components, pcesvn), 1)
    )
    tcb += pair(b"\x02\x12", 0x04, bytes(components))
    fields = pair(b"\x01", 0x04, ppid) + pair(b"\x02", 0x30, tcb) + pair(b"\x03", 0x04, pceid)
    return tlv(0x30, fields + pair(b"\x04", 0x04, fmspc) + pair(b"\x05", 0x0A, b"\x01"))


class TdxMaker:
    """An Intel of our own: its hierarchy, and quotes and collateral whose every part a test can
    change.
    """

    fmspc, sept_ve_disable, intel_qe = FMSPC, SEPT_VE_DISABLE, INTEL_QE
    sgx_extension, tlv = staticmethod(sgx_extension), staticmethod(tlv)

    def __init__(self, authority):
        p256 = {"curve": ec.SECP256R1()}
        self.authority, self.now = authority, authority.now
        self.root = authority.issue("Intel SGX Root CA", path_length=1, **p256)
        self.pck_ca = authority.issue("Intel SGX PCK Platform CA", self.root, path_length=0, **p256)
        self.signer = authority.issue("Intel SGX TCB Signing", self.root, ca=False, **p256)
        self.pck = self.make_pck()
        self.attestation_key = ec.generate_private_key(ec.SECP256R1())

    def make_pck(self, issuer=None, *, name="Intel SGX PCK Certificate", extension=None, **options):
        extensions = [
            ("1.2.840.113741.1.13.1", sgx_extension() if extension is None else extension, False)
        ]
        options = {"ca": False, "curve": ec.SECP256R1(), "extensions": extensions, **options}
        return self.authority.issue(name, issuer or self.pck_ca, **options)

    def quote(
        self, *, tee_tcb_svn=bytes((5, 1, 3)) + bytes(13), attributes=SEPT_VE_DISABLE, isvsvn=4,
        pck=None, pck_ca=None, root=None,
        header=None, mrsignerseam=bytes(48), seamattributes=bytes(8), qe=None, qe_key=None,
        quote_key=None, auth=b"\x07" * 32,
        report_data=bytes(range(64)), vouched=None, kinds=(6, 5), pem=None,
    ):  # fmt: skip
        pck, pck_ca, root = pck or self.pck, pck_ca or self.pck_ca, root or self.root
        header = header or struct.pack("<HHII", 4, 2, 0x81, 0) + INTEL_QE + bytes(20)
        body = (
            tee_tcb_svn
            + b"\x5e" * 48
            + mrsignerseam
            + seamattributes
            + struct.pack("<QQ", attributes, 0x602E7)
        )
        body += b"".join(bytes((index,)) * 48 for index in range(1, 9)) + report_data
        key = self.attestation_key.public_key().public_numbers()
        point = key.x.to_bytes(32) + key.y.to_bytes(32)
        report = bytearray(384)
        report[48:64] = bytes((0x11,)) + bytes(15)
        report[128:160] = QE_SIGNER
        report[256:260] = struct.pack("<HH", 2, isvsvn)
        report[320:352] = vouched or hashlib.sha256(point + auth).digest()
        for at, value in qe or ():
            report[at : at + len(value)] = value
        pem = pem if pem is not None else pck.pem + pck_ca.pem + root.pem + b"\x00"
        certification = bytes(report) + self._raw(qe_key or pck.key, bytes(report))
        certification += (
            struct.pack("<H", len(auth)) + auth + struct.pack("<HI", kinds[1], len(pem)) + pem
        )
        signed = header + body
        tail = self._raw(quote_key or self.attestation_key, signed) + point
        tail += struct.pack("<HI", kinds[0], len(certification)) + certification
        return signed + struct.pack("<I", len(tail)) + tail

    @staticmethod
    def _raw(key, message):
        digest = hashes.SHA256() if key.curve.key_size == 256 else hashes.SHA384()
        return b"".join(
            (number % (1 << 256)).to_bytes(32)
            for number in decode_dss_signature(key.sign(message, ec.ECDSA(digest)))
        )

    def tcb_info(self):
        def level(svn, pcesvn, status, date, tdx):
            parts = {
                "sgxtcbcomponents": [{"svn": svn}] * 16,
                "pcesvn": pcesvn,
                "tdxtcbcomponents": [{"svn": part} for part in tdx],
            }
            return {
                "tcb": parts,
                "tcbDate": f"{date}T00:00:00Z",
                "tcbStatus": status,
                "advisoryIDs": [f"INTEL-SA-{svn:05}"],
            }

        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        levels = [
            (4, "2024-11-13", "UpToDate"),
            (2, "2023-08-09", "OutOfDate"),
            (1, "2022-08-09", "Revoked"),
        ]
        return {
            "id": "TDX",
            "version": 3,
            "issueDate": f"{self.now - dt.timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}",
            "nextUpdate": f"{self.now + dt.timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}",
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": 17,
            "tdxModule": module,
            "tdxModuleIdentities": [
                {**module, "id": "TDX_01", "tcbLevels": [_svn_level(*item) for item in levels]},
                {**module, "id": "TDX_03", "tcbLevels": [_svn_level(3, "2024-11-13", "UpToDate")]},
            ],
            "tcbLevels": [
                level(3, 11, "UpToDate", "2024-03-13", (5, 0, 3, *(0,) * 13)),
                level(2, 11, "SWHardeningNeeded", "2023-03-13", (5, 0, 2, *(0,) * 13)),
                level(2, 10, "ConfigurationNeeded", "2022-03-13", (4, 0, 2, *(0,) * 13)),
                level(1, 5, "OutOfDate", "2018-01-04", (3, 0, 1, *(0,) * 13)),
                level(0, 5, "Revoked", "2017-01-04", (0,) * 16),
            ],
        }

    def qe_identity(self):
        info = self.tcb_info()
        levels = [
            (4, "2024-03-13", "UpToDate"),
            (3, "2023-03-13", "OutOfDate"),
            (2, "2022-03-13", "Revoked"),
        ]
        return {
            "id": "TD_QE", "version": 2, "issueDate": info["issueDate"],
            "nextUpdate": info["nextUpdate"],
            "tcbEvaluationDataNumber": 17, "miscselect": "00000000", "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15, "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER.hex().upper(),
            "isvprodid": 2, "tcbLevels": [_svn_level(*item) for item in levels],
        }  # fmt: skip

    def collateral(self, *, info=None, identity=None, signer=None, **changed):
        signer = signer or self.signer
        texts = {
            "tcb_info": json.dumps(info or self.tcb_info()),
            "qe_identity": json.dumps(identity or self.qe_identity()),
        }
        fields = dict(texts)
        for name, text in texts.items():
            fields[f"{name}_signature"] = self._raw(signer.key, text.encode()).hex()
            fields[f"{name}_issuer_chain"] = (signer.pem + self.root.pem).decode()
        fields["pck_crl_issuer_chain"] = (self.pck_ca.pem + self.root.pem).decode()
        fields["root_ca_crl"] = self.authority.revoke(self.root).hex()
        fields["pck_crl"] = self.authority.revoke(self.pck_ca).hex()
        fields.update(changed)
        return json.dumps(
            {key: value for key, value in fields.items() if value is not None}
        ).encode()

    def verifier(self, collateral=None, **options):
        return TdxVerifier(
            [self.collateral() if collateral is None else collateral],
            **{"root_key": self.root.point, **options},
        )


def _svn_level(svn, date, status):
    return {"tcb": {"isvsvn": svn}, "tcbDate": f"{date}T00:00:00Z", "tcbStatus": status}


# AMD SEV-SNP: an AMD of our own
CHIP = bytes(range(64))
SNP_TCB = SnpTcb(bootloader=4, tee=0, snp=22, microcode=213)


def der_integer(value):
    return bytes((2, 1, value)) if value < 128 else bytes((2, 2, 0, value))


def vcek_extensions(*, chip=CHIP, tcb=SNP_TCB, product="Milan-B0", reserved=0):
    values = {
        1: tcb.bootloader,
        2: tcb.tee,
        3: tcb.snp,
        8: tcb.microcode,
        **dict.fromkeys((4, 5, 6, 7), reserved),
    }
    return [
        ("1.3.6.1.4.1.3704.1.1", der_integer(0), False),
        ("1.3.6.1.4.1.3704.1.2", bytes((0x16, len(product))) + product.encode(), False),
        *(
            (f"1.3.6.1.4.1.3704.1.3.{number}", der_integer(value), False)
            for number, value in values.items()
        ),
        ("1.3.6.1.4.1.3704.1.4", chip, False),
    ]


def tcb_bytes(tcb):
    return bytes((tcb.bootloader, tcb.tee, 0, 0, 0, 0, tcb.snp, tcb.microcode))


def snp_report(
    key, *, version=2, policy=1 << 17 | 1 << 16, vmpl=0, chip=CHIP, algorithm=1, signer=0,
    guest_svn=5,
    report_data=bytes(range(100, 164)), changes=(), **tcbs,
):  # fmt: skip
    data = bytearray(REPORT_BYTES)
    struct.pack_into("<IIQ", data, 0, version, guest_svn, policy)
    struct.pack_into("<II", data, 0x30, vmpl, algorithm)
    struct.pack_into("<I", data, 0x48, signer)
    data[0x50:0x90] = report_data
    data[0x90:0xC0] = b"\x11" * 48
    data[0xC0:0xE0] = b"\x22" * 32
    data[0x1A0:0x1E0] = chip
    for name, at in (
        ("current", 0x38),
        ("reported", 0x180),
        ("committed", 0x1E0),
        ("launch", 0x1F0),
    ):
        data[at : at + 8] = tcb_bytes(tcbs.get(name, SNP_TCB))
    for at, value in changes:
        data[at : at + len(value)] = value
    r, s = decode_dss_signature(key.sign(bytes(data[:0x2A0]), ec.ECDSA(hashes.SHA384())))
    data[0x2A0:0x2E8] = r.to_bytes(72, "little")
    data[0x2E8:0x330] = s.to_bytes(72, "little")
    return bytes(data)


class SnpMaker:
    """An AMD of our own: its hierarchy, and reports with the certificates behind them."""

    def __init__(self, authority):
        self.authority, self.now = authority, authority.now
        self.ark = authority.issue("ARK-Milan")
        self.ask = authority.issue("SEV-Milan", self.ark, path_length=0)
        self.vcek = authority.issue("SEV-VCEK", self.ask, ca=None, extensions=vcek_extensions())
        self.roots = {"Milan": self.ark.sha256}

    def quote(self, **changed):
        return snp_report(self.vcek.key, **changed) + self.vcek.der + self.ask.der + self.ark.der

    def crl(self, *revoked):
        return self.authority.revoke(self.ark, revoked)

    def verifier(self, **options):
        return SevSnpVerifier(**{"minimum_tcb": {"Milan": SNP_TCB}, "roots": self.roots, **options})


# AWS Nitro: an AWS of our own
class NitroMaker:
    """An AWS of our own: its hierarchy, and attestation documents."""

    def __init__(self, authority):
        self.now = authority.now
        self.root = authority.issue("test.nitro-enclaves")
        self.zone = authority.issue("zone.test", self.root, path_length=0)
        self.leaf = authority.issue("enclave.test", self.zone, ca=False)

    def quote(self, *, report_data, nonce, **changed):
        fields = {
            "module_id": "i-1-enc2",
            "digest": "SHA384",
            "timestamp": int(self.now.timestamp() * 1000),
            "pcrs": {index: hashlib.sha384(b"%d" % index).digest() for index in range(4)},
            "certificate": self.leaf.der,
            "cabundle": [self.root.der, self.zone.der],
            "public_key": None,
            "user_data": report_data,
            "nonce": nonce,
        }
        # As current firmware writes it: a map of indefinite length.
        members = {**fields, **changed}.items()
        body = b"".join(cbor2.dumps(key) + cbor2.dumps(value) for key, value in members)
        protected, payload = bytes.fromhex("a1013822"), b"\xbf" + body + b"\xff"
        message = cbor2.dumps(["Signature1", protected, b"", payload])
        der = self.leaf.key.sign(message, ec.ECDSA(hashes.SHA384()))
        signature = b"".join(number.to_bytes(48) for number in decode_dss_signature(der))
        return cbor2.dumps([protected, {}, payload, signature])

    def verifier(self):
        return NitroVerifier(root_sha256=self.root.sha256)
