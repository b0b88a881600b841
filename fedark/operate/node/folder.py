"""What a node's folder holds besides that of every party (`fedark.operate.party`), and how it comes
to be.

    state.json        version of all this
    invitation.json   which host it was invited by
    request.json      what it asked the host, until the host has approved it
    host.json         the admission that the host answered with
    ca.pem            the host's authority
    transport.key     authenticates its connections, and nothing more
    run/ logs/        socket, configuration and logs of its processes

Every private key is made here and stays here.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedark.attestation.platforms.simulated import SimulatedDevice
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.contract.contract import Party
from fedark.foundation.errors import InputError, Refused
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import HYBRID, HpkeKey, Kem, PartyKeys
from fedark.links.flower.configuration import write_private
from fedark.links.flower.provision import load_node_key
from fedark.operate.joining import Admission, Invitation, JoinRequest, dump, parse, transport_pem
from fedark.operate.party import COLLATERAL, DEVICE, DataConfig, PartyConfig, write_party
from fedark.operate.state import open_state, write_state
from fedark.sandbox.confine import Mode
from fedark.stages.roster import read_roster, write_roster

__all__ = ["NodeFolder", "begin_join"]

INVITATION, REQUEST, HOST, CA, TRANSPORT = (
    "invitation.json",
    "request.json",
    "host.json",
    "ca.pem",
    "transport.key",
)


class NodeFolder:
    """An opened node folder.

    Raises:
        InputError: it is none, or of another version.
    """

    def __init__(self, path: Path) -> None:
        open_state(path, "node")
        self.path = path.resolve()
        self.config = PartyConfig.read(self.path)
        self.invitation = parse(
            _read(self.path / INVITATION), Invitation, str(self.path / INVITATION)
        )

    @property
    def joined(self) -> bool:
        """Whether the host has approved it and its admission is installed."""
        return (self.path / HOST).is_file()

    @property
    def request(self) -> JoinRequest:
        """What it asked the host."""
        return parse(_read(self.path / REQUEST), JoinRequest, str(self.path / REQUEST))

    @property
    def admission(self) -> Admission:
        """What the host answered.

        Raises:
            InputError: nothing yet.
        """
        return parse(_read(self.path / HOST), Admission, str(self.path / HOST))

    @property
    def ca(self) -> Path:
        return self.path / CA

    @property
    def catalogue(self) -> Path:
        return (self.path / self.config.catalogue).resolve()

    def transport_key(self) -> ec.EllipticCurvePrivateKey:
        """The key of its connections."""
        return load_node_key(self.path / TRANSPORT)

    def install(self, data: bytes) -> Admission:
        """Take the host's admission; later ones renew certificates and address.

        Raises:
            Refused: the aggregator that invited this node did not sign it, it is for another node,
                or a trusted root changed.
            InputError, ContractError: it is malformed.
        """
        admission = parse(data, Admission, "the host's admission")
        admission.verify(self.invitation.aggregator)
        if admission.party != self.request.party:
            raise Refused("The admission is for another node.", safe="Nothing was installed.")
        root = self.path / COLLATERAL / SIMULATED_ROOT
        if root.is_file() and root.read_bytes().hex() != admission.root:
            raise Refused(
                "The host names another platform root than before.",
                safe="Nothing was installed.",
                fix="Ask the host; a new root needs a new folder.",
            )
        if self.config.role == "customer":
            self._install_device(admission)
        write_atomic(self.path / COLLATERAL / SIMULATED_ROOT, bytes.fromhex(admission.root))
        write_atomic(self.path / COLLATERAL / SIMULATED_CRL, bytes.fromhex(admission.crl))
        known = read_roster(self.path)
        write_roster(
            self.path,
            {
                **known,
                admission.aggregator.name: admission.aggregator,
                admission.party.name: admission.party,
            }.values(),
        )
        write_atomic(self.ca, admission.ca.encode())
        write_atomic(self.path / HOST, data)
        return admission

    def _install_device(self, admission: Admission) -> None:
        key = load_pem_private_key(_read(self.path / DEVICE / "device.key"), None)
        chain = tuple(bytes.fromhex(der) for der in admission.device_chain)
        if not chain or not isinstance(key, ec.EllipticCurvePrivateKey):
            raise Refused(
                "The admission certifies no device of this node.", safe="Nothing was installed."
            )
        root = bytes.fromhex(admission.root)
        SimulatedDevice(key, chain, root)  # raises where the certificate is not that of the key
        pem = [
            x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in (*chain, root)
        ]
        write_atomic(self.path / DEVICE / "device.pem", b"".join(pem), mode=0o600)


def begin_join(
    path: Path,
    invitation: Invitation,
    *,
    data: DataConfig | None,
    sandbox: Mode,
    minimum_cohort: int,
    kem: Kem = HYBRID,
) -> NodeFolder:
    """Make a node's folder with its own keys, and the request to the host in it.

    Args:
        data: a customer's records.
        sandbox, minimum_cohort: the least that the operator accepts.
        kem: of its keys.

    Raises:
        InputError: the folder is not empty, or a customer has no data.
    """
    if path.exists() and any(path.iterdir()):
        raise InputError(
            f"{path} is not empty.", safe="It was left as it is.", fix="Name another folder."
        )
    if (invitation.role == "customer") != (data is not None):
        need = (
            "needs its records (--data, --prompt, --answer)"
            if data is None
            else "has no records of this kind"
        )
        raise InputError(f"A {invitation.role} {need}.", safe="Nothing was made.")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    keys = PartyKeys(hpke=HpkeKey(kem=kem))
    party = Party(
        name=invitation.name,
        role=invitation.role,
        signing_key=keys.signing.public.hex(),
        hpke_key=keys.hpke.public.hex(),
    )
    config = PartyConfig(
        name=invitation.name,
        role=invitation.role,
        catalogue="catalogue",
        sandbox=sandbox,
        minimum_cohort=minimum_cohort,
        data=data,
    )
    write_party(path, config, keys=keys, roster=[invitation.aggregator, party], collateral={})
    (path / "catalogue").mkdir(mode=0o700)
    transport = _new_key(path / TRANSPORT)
    device = ""
    if invitation.role == "customer":
        (path / DEVICE).mkdir(mode=0o700)
        device = transport_pem(_new_key(path / DEVICE / "device.key"))
    request = JoinRequest(
        party=party,
        transport_key=transport_pem(transport),
        device_key=device,
        token=invitation.token,
    )
    write_private(path / INVITATION, dump(invitation))
    write_private(path / REQUEST, dump(request.signed(keys.signing, transport)))
    write_atomic(path / CA, invitation.ca.encode())
    write_state(path, "node")  # last: a folder that was made in part is no node's folder
    return NodeFolder(path)


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(
        path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), replace=False
    )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
