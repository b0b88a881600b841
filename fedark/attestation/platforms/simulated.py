"""The simulated platform: everything that a hardware platform's evidence has, except the hardware.

A manufacturer's root signs device certificates and a revocation list; a device's quoting key signs
tokens (`cose`, `eat`). The quoting key is the launcher's: the enclave process asks for a quote and
never holds the key. The root user of the host can read that key and the enclave's memory. So a
simulated enclave protects nothing from its own host, its tokens say "fedark-sim", and a contract
must name this platform, and the fingerprint of one root, before such evidence counts at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

from fedark.attestation import cose
from fedark.attestation._x509 import read_crl
from fedark.attestation.certificates import chain_problems, load_certificate, p384_key
from fedark.attestation.claims import Claims, SandboxFacts
from fedark.attestation.eat import HWMODEL, OEMID_BYTES, UEID_BYTES, SimulatedClaims
from fedark.foundation import canonical
from fedark.foundation.errors import EvidenceRefused, InputError, ProtocolError, StorageError

__all__ = ["PLATFORM", "SimulatedAttester", "SimulatedDevice", "SimulatedRoot", "SimulatedVerifier"]

PLATFORM = "simulated"
_SUBJECT = "simulated evidence"
# A certificate is valid a little before it was made: the clocks of two hosts are never quite equal.
_BACKDATED = timedelta(minutes=5)
_MAX_PATH_LENGTH = 1
_SEALING_LABEL = "fedark/sealing/1"
_KEY_FILE, _CHAIN_FILE = "device.key", "device.pem"
_ROOT_KEY, _ROOT, _REVOKED = "root.key", "root.der", "revoked.json"


class SimulatedRoot:
    """A manufacturer: issues devices, revokes them.

    Attributes:
        certificate: DER, self-signed; hand it to verifiers.
        sha256: its fingerprint in hex, which a contract names as `simulated_root`.
    """

    def __init__(self, *, now: datetime, valid: timedelta = timedelta(days=365)) -> None:
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._revoked: dict[int, datetime] = {}
        self._until = now + valid
        self._name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedark simulated manufacturer"),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, os.urandom(8).hex()),
            ]
        )
        builder = _builder(self._name, self._name, self._key.public_key(), now, self._until)
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=_MAX_PATH_LENGTH), critical=True
        )
        builder = builder.add_extension(_usage(issuing=True), critical=True)
        self.certificate = builder.sign(self._key, hashes.SHA384()).public_bytes(
            serialization.Encoding.DER
        )
        self.sha256 = hashlib.sha256(self.certificate).hexdigest()

    def issue(self, *, now: datetime, valid: timedelta = timedelta(days=90)) -> SimulatedDevice:
        """A new device with its own quoting key; its certificate never outlives the root's."""
        key = ec.generate_private_key(ec.SECP384R1())
        return SimulatedDevice(
            key, self.certify(key.public_key(), now=now, valid=valid), self.certificate
        )

    def certify(
        self,
        public: ec.EllipticCurvePublicKey,
        *,
        now: datetime,
        valid: timedelta = timedelta(days=90),
    ) -> tuple[bytes, ...]:
        """Certificates (DER, the device's first) of a device that made its quoting key itself."""
        ueid = bytes([1]) + os.urandom(UEID_BYTES - 1)
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedark simulated device"),
                x509.NameAttribute(NameOID.SERIAL_NUMBER, ueid.hex()),
            ]
        )
        builder = _builder(subject, self._name, public, now, min(now + valid, self._until))
        builder = builder.add_extension(
            x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        builder = builder.add_extension(_usage(issuing=False), critical=True)
        return (builder.sign(self._key, hashes.SHA384()).public_bytes(serialization.Encoding.DER),)

    def revoke(self, device: SimulatedDevice | bytes, *, now: datetime) -> None:
        """Let every later `crl` name `device`, or the device that this certificate (DER) is of."""
        certificate = device if isinstance(device, bytes) else device.chain[0]
        self._revoked[load_certificate(certificate).serial_number] = now

    def crl(self, *, now: datetime, valid: timedelta = timedelta(days=30)) -> bytes:
        """The revocation list at `now`, DER; verifiers refuse it after `valid`."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - _BACKDATED).next_update(now + valid)
        for serial, when in self._revoked.items():
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self._key, hashes.SHA384()).public_bytes(serialization.Encoding.DER)

    def save(self, directory: Path) -> None:
        """Write key (mode 0600), certificate and what was revoked into `directory`, replacing an
        earlier state of this root.

        Raises:
            StorageError: it cannot be written.
        """
        from fedark.foundation.files import (
            write_atomic,  # not above: what launchers load and measure ends before `files`
        )

        key = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        revoked = {str(serial): when.isoformat() for serial, when in self._revoked.items()}
        write_atomic(directory / _ROOT_KEY, key, mode=0o600)
        write_atomic(directory / _ROOT, self.certificate)
        write_atomic(directory / _REVOKED, json.dumps(revoked, indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> SimulatedRoot:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or malformed.
        """
        try:
            key = serialization.load_pem_private_key(
                (directory / _ROOT_KEY).read_bytes(), password=None
            )
            certificate = (directory / _ROOT).read_bytes()
            parsed = load_certificate(certificate)
            revoked = json.loads((directory / _REVOKED).read_bytes())
            when = {int(serial): datetime.fromisoformat(text) for serial, text in revoked.items()}
        except OSError as error:
            raise InputError(
                f"The simulated root in {directory} cannot be read: {error.strerror}."
            ) from None
        except (ValueError, TypeError, AttributeError, ProtocolError):
            raise InputError(f"The simulated root in {directory} is malformed.") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != p384_key(parsed):
            raise InputError(
                f"The simulated root in {directory} is malformed: its certificate is not that of"
                " its key."
            )
        root = object.__new__(cls)
        root._key, root._name, root._until, root._revoked = (
            key,
            parsed.subject,
            parsed.not_valid_after_utc,
            when,
        )
        root.certificate, root.sha256 = certificate, hashlib.sha256(certificate).hexdigest()
        return root

    def __repr__(self) -> str:
        return f"SimulatedRoot({self.sha256[:16]}...)"


class SimulatedDevice:
    """A device: its quoting key, and the certificates up to, not including, its manufacturer's
    root.

    Attributes:
        chain: DER certificates, the device's first.
        root: the manufacturer's certificate, DER; tokens name it, verifiers bring their own.
        ueid: 17 bytes.
    """

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, chain: tuple[bytes, ...], root: bytes
    ) -> None:
        leaf = load_certificate(chain[0])
        public = p384_key(leaf)
        if public is None or public != key.public_key():
            raise InputError(
                "A device's certificate is not that of its key.", safe="Nothing was signed with it."
            )
        self._key = key
        self.chain = chain
        self.root = root
        self.ueid = _ueid_of(leaf)

    def attester(
        self, *, measurements: Mapping[str, bytes], sandbox: SandboxFacts
    ) -> SimulatedAttester:
        """See `fedark.attestation.platforms.base.EnclavePlatform`."""
        return SimulatedAttester(self, measurements=measurements, sandbox=sandbox)

    def sign(self, payload: bytes) -> bytes:
        """The COSE_Sign1 token over `payload`."""
        return cose.sign(payload, self.chain, self._key)

    def sealing_key(self, measurements: Mapping[str, bytes], sandbox: SandboxFacts) -> bytes:
        """32 bytes for the enclave with these registers, confined like this, on this device, and no
        other (HKDF-SHA384, RFC 5869).

        As a processor derives it from a fused secret and an enclave's measurement. The run
        configuration is a register, so no two runs or parties share one.
        """
        facts = [sandbox.mode, sandbox.seccomp_digest, sandbox.landlock_digest]
        info = canonical.encode([_SEALING_LABEL, self.ueid, dict(measurements), facts])
        secret = self._key.private_numbers().private_value.to_bytes(48, "big")
        return HKDF(hashes.SHA384(), 32, None, info).derive(secret)

    def save(self, directory: Path) -> None:
        """Write key (mode 0600) and certificates into `directory`, which is made (mode 0700) if it
        is missing.

        Raises:
            InputError: there is a device already; a key is never overwritten.
            StorageError: it cannot be written.
        """
        key = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        pem = [
            load_certificate(der).public_bytes(serialization.Encoding.PEM)
            for der in (*self.chain, self.root)
        ]
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, data in ((_KEY_FILE, key), (_CHAIN_FILE, b"".join(pem))):
                descriptor = os.open(
                    directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600
                )
                with os.fdopen(descriptor, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        except FileExistsError:
            raise InputError(
                f"{directory} holds a device already.", safe="Its key was left as it is."
            ) from None
        except OSError as error:
            raise StorageError(f"{directory} cannot be written: {error.strerror}.") from None

    @classmethod
    def load(cls, directory: Path) -> SimulatedDevice:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or malformed, or the key is open to other users.
        """
        try:
            descriptor = os.open(directory / _KEY_FILE, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                if (
                    not stat.S_ISREG(status.st_mode)
                    or status.st_mode & 0o077
                    or status.st_uid != os.geteuid()
                ):
                    raise InputError(
                        f"{directory / _KEY_FILE} is open to other users.",
                        fix="Own it, and set its mode to 0600.",
                    )
                key = serialization.load_pem_private_key(file.read(), password=None)
            certificates = x509.load_pem_x509_certificates((directory / _CHAIN_FILE).read_bytes())
        except OSError as error:
            raise InputError(
                f"The device in {directory} cannot be read: {error.strerror}."
            ) from None
        except ValueError:
            raise InputError(f"The device in {directory} is malformed.") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or len(certificates) < 2:
            raise InputError(f"The device in {directory} is malformed.")
        ders = [
            certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates
        ]
        return cls(key, tuple(ders[:-1]), ders[-1])

    def __repr__(self) -> str:
        return f"SimulatedDevice({self.ueid.hex()})"


class SimulatedAttester:
    """Quotes for one enclave on `device`. It lives in the launcher, which measured the enclave and
    confines it.

    Args:
        measurements: the four registers, 48 bytes each.
        sandbox: how the enclave process is confined.
        svn: security version number; a policy sets the minimum.
        debug: whether the enclave's memory can be read from outside; every policy refuses it.
        clock: the time that goes into tokens.
    """

    platform = PLATFORM

    def __init__(
        self,
        device: SimulatedDevice,
        *,
        measurements: Mapping[str, bytes],
        sandbox: SandboxFacts,
        svn: int = 1,
        debug: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._device = device
        self._measurements = dict(measurements)
        self._sandbox = sandbox
        self._svn = svn
        self._debug = debug
        self._clock = clock

    def quote(self, report_data: bytes, nonce: bytes) -> bytes:
        """A token over `report_data` (64 bytes) and `nonce` (32 bytes).

        Raises:
            ProtocolError: one of them, or a register, has another length.
        """
        claims = SimulatedClaims(
            report_data=report_data,
            nonce=nonce,
            ueid=self._device.ueid,
            oemid=_oemid(self._device.root),
            measurements=self._measurements,
            sandbox=self._sandbox,
            debug=self._debug,
            svn=self._svn,
            issued_at=self._clock(),
        )
        return self._device.sign(claims.encode())


class SimulatedVerifier:
    """Verifies tokens of devices under one root.

    Args:
        root: the manufacturer's certificate, DER. Its fingerprint must have been compared with the
            contract's.
        crl: the manufacturer's revocation list, DER. Without one every token is refused: it comes
            through hosts that would otherwise hide a revocation by leaving the list out.

    Raises:
        EvidenceRefused: `root` or `crl` is malformed.
    """

    platform = PLATFORM

    def __init__(self, root: bytes, crl: bytes | None) -> None:
        try:
            self._root = load_certificate(root)
            self._crls = [] if crl is None else [read_crl(crl)]
        except ProtocolError as error:
            raise EvidenceRefused(_SUBJECT, [error.what]) from None
        self._oemid = _oemid(root)

    def verify(self, token: bytes, *, now: datetime, admitted: datetime | None = None) -> Claims:
        """See `Verifier.verify`. All of chain, signature and profile is judged; what cannot be
        parsed ends it early.
        """
        try:
            signed = cose.parse(token)
            chain = [load_certificate(der) for der in signed.chain]
        except ProtocolError as error:
            raise EvidenceRefused(_SUBJECT, [error.what]) from None
        reasons = chain_problems(chain, self._root, self._crls, now, admitted)
        key = p384_key(chain[0])
        if key is not None and not signed.signed_by(key):
            reasons.append("the token is not signed by its device")
        try:
            claims = SimulatedClaims.decode(signed.payload)
            if claims.oemid != self._oemid:
                reasons.append("the token names another manufacturer")
            if claims.ueid != _ueid_of(chain[0]):
                reasons.append("the token names another device than its certificate")
        except ProtocolError as error:
            raise EvidenceRefused(_SUBJECT, [*reasons, error.what]) from None
        if reasons:
            raise EvidenceRefused(_SUBJECT, reasons)
        return Claims(
            platform=PLATFORM,
            hwmodel=HWMODEL.decode("ascii"),
            ueid=claims.ueid,
            report_data=claims.report_data,
            measurements=claims.measurements,
            debug=claims.debug,
            svn=claims.svn,
            sandbox=claims.sandbox.mode,
            seccomp_digest=claims.sandbox.seccomp_digest,
            landlock_digest=claims.sandbox.landlock_digest,
            issued_at=claims.issued_at,
            nonce=claims.nonce,
        )


def _oemid(root: bytes) -> bytes:
    return hashlib.sha256(root).digest()[:OEMID_BYTES]


def _ueid_of(certificate: x509.Certificate) -> bytes:
    """The device's id as its certificate states it; empty where it states none, which equals no
    claim.
    """
    values = [
        attribute.value
        for attribute in certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    ]
    try:
        return bytes.fromhex(values[0]) if len(values) == 1 and isinstance(values[0], str) else b""
    except ValueError:
        return b""


def _usage(*, issuing: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not issuing,
        key_cert_sign=issuing,
        crl_sign=issuing,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - _BACKDATED).not_valid_after(until)
