"""Joining: keys stay where they were made, a person compares fingerprints, and every shortcut is
refused.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import parties
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from direct import admitted, client_of, make_host, make_node

from fedark.attestation.claims import MEASURED_REGISTERS, RUN_CONFIG, SandboxFacts
from fedark.attestation.platforms.simulated import (
    SimulatedAttester,
    SimulatedDevice,
    SimulatedRoot,
    SimulatedVerifier,
)
from fedark.contract.contract import fingerprint, now
from fedark.foundation.errors import (
    ContractError,
    EvidenceRefused,
    FedarkError,
    InputError,
    Refused,
)
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.operate.host import admission
from fedark.operate.host.admission import approve, approved_parties, file_request, invite, revoke
from fedark.operate.host.folder import HostFolder
from fedark.operate.joining import (
    Admission,
    Invitation,
    JoinRequest,
    dump,
    parse,
    request_headers,
    transport_pem,
    verify_request,
)
from fedark.operate.party import load_node
from fedark.stages.roster import read_roster


@pytest.fixture
def host(tmp_path: Path) -> HostFolder:
    return make_host(tmp_path / "host")


def secrets_of(folder: Path) -> list[bytes]:
    keys = [path for path in folder.rglob("*") if path.suffix in (".key", ".keys", ".secret")]
    lines = [line.strip() for path in keys for line in path.read_bytes().splitlines()]
    return [line for line in lines if len(line) > 40 and b"-----" not in line]


def test_a_node_joins_and_no_private_key_is_in_any_of_the_three_files(
    host: HostFolder, tmp_path: Path
) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    assert node.joined
    assert approved_parties(host)["north"] == node.request.party
    assert read_roster(node.path).keys() == {"north", "pool"}
    exchanged = b"".join(
        (node.path / name).read_bytes() for name in ("invitation.json", "request.json", "host.json")
    )
    held = secrets_of(node.path) + secrets_of(host.path)
    assert len(held) > 10
    assert not [secret for secret in held if secret in exchanged]
    device = SimulatedDevice.load(node.path / "device")
    assert device.root == host.root().certificate


def test_a_provider_joins_without_a_device(host: HostFolder, tmp_path: Path) -> None:
    node = admitted(host, tmp_path / "maker", "maker", "provider")
    assert not (node.path / "device").exists()
    assert (
        load_node(node.path, None, reference={"trainer": {}, "aggregator": {}}).role == "provider"
    )


def test_everything_in_both_folders_is_private(host: HostFolder, tmp_path: Path) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    assert node.path.stat().st_mode & 0o077 == host.path.stat().st_mode & 0o077 == 0
    for folder in (node.path, host.path):
        secret = [
            path
            for path in folder.rglob("*")
            if path.suffix in (".key", ".keys", ".secret", ".sqlite")
        ]
        assert secret
        assert [path for path in secret if path.stat().st_mode & 0o077] == []


def test_another_fingerprint_admits_nobody(host: HostFolder, tmp_path: Path) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    file_request(host, (node.path / "request.json").read_bytes())
    with pytest.raises(Refused, match="not the one that was given"):
        approve(host, "north", fingerprint(parties.party("north")))
    assert not host.store.admits(node.request.transport_key.strip())
    with pytest.raises(Refused):
        approve(host, "north", "")
    approve(host, "north", fingerprint(node.request.party).replace(" ", "").upper())
    assert host.store.admits(node.request.transport_key.strip())


def test_whoever_files_a_request_first_with_a_stolen_invitation_shows_by_the_fingerprint(
    host: HostFolder, tmp_path: Path
) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    thief = PartyKeys()
    request = JoinRequest(
        party=parties.party("north", thief),
        transport_key=transport_pem(key := ec.generate_private_key(ec.SECP384R1())),
        device_key=transport_pem(key),
        token=node.invitation.token,
    ).signed(thief.signing, key)
    file_request(host, dump(request))
    with pytest.raises(InputError, match="not valid: used"):
        file_request(host, (node.path / "request.json").read_bytes())
    with pytest.raises(Refused):
        approve(host, "north", fingerprint(node.request.party))


@pytest.mark.parametrize("field", ["signature", "transport_signature"])
def test_a_request_is_signed_with_both_keys(host: HostFolder, tmp_path: Path, field: str) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    value = json.loads((node.path / "request.json").read_bytes())
    value[field] = ("00" if value[field][:2] != "00" else "01") + value[field][2:]
    with pytest.raises(Refused):
        file_request(host, json.dumps(value).encode())
    other = ec.generate_private_key(ec.SECP384R1())
    swapped = json.loads((node.path / "request.json").read_bytes()) | {
        "transport_key": transport_pem(other)
    }
    with pytest.raises(Refused):
        file_request(host, json.dumps(swapped).encode())


def test_a_token_serves_one_name_one_role_once_and_for_a_week(
    host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    data = (node.path / "request.json").read_bytes()
    keys = PartyKeys()
    transport = ec.generate_private_key(ec.SECP384R1())
    for name, role, device in (
        ("south", "customer", transport_pem(transport)),
        ("north", "provider", ""),
    ):
        party = parties.party("north", keys).model_copy(update={"name": name, "role": role})
        request = JoinRequest(
            party=party,
            transport_key=transport_pem(transport),
            device_key=device,
            token=node.invitation.token,
        )
        with pytest.raises(InputError, match="another name or role"):
            file_request(host, dump(request.signed(keys.signing, transport)))
    with monkeypatch.context() as patch:
        patch.setattr(
            "fedark.operate.host.store.now",
            lambda: now() + admission.timedelta(days=admission._INVITED_DAYS, seconds=1),
        )
        with pytest.raises(InputError, match="too old"):
            file_request(host, data)
    file_request(host, data)
    file_request(host, data)  # the same one may come twice
    assert [row.name for row in host.store.nodes()] == ["north"]


def test_the_token_is_kept_as_its_hash_alone(host: HostFolder) -> None:
    invitation = invite(host, "north", "customer")
    assert invitation.token.encode() not in b"".join(
        path.read_bytes() for path in host.path.glob("host.sqlite*")
    )


def test_a_bundle_of_another_host_or_for_another_node_is_not_installed(
    host: HostFolder, tmp_path: Path
) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    file_request(host, (node.path / "request.json").read_bytes())
    bundle = approve(host, "north", fingerprint(node.request.party))
    with pytest.raises(Refused):
        node.install(dump(bundle.model_copy(update={"ca": "another"})))
    with pytest.raises(Refused):
        node.install(dump(bundle.signed(SigningKey())))
    stranger = make_host(tmp_path / "stranger")
    with pytest.raises(Refused, match="another aggregator"):
        node.install(
            dump(
                bundle.model_copy(update={"aggregator": stranger.aggregator}).signed(
                    stranger.keys().signing
                )
            )
        )
    with pytest.raises(Refused, match="another node"):
        node.install(
            dump(
                bundle.model_copy(update={"party": parties.party("east")}).signed(
                    host.keys().signing
                )
            )
        )
    assert not node.joined
    node.install(dump(bundle))
    other = SimulatedRoot(now=now())
    with pytest.raises(Refused, match="another platform root"):
        node.install(
            dump(
                bundle.model_copy(update={"root": other.certificate.hex()}).signed(
                    host.keys().signing
                )
            )
        )


def test_a_certificate_for_somebody_elses_device_is_not_installed(
    host: HostFolder, tmp_path: Path
) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    file_request(host, (node.path / "request.json").read_bytes())
    bundle = approve(host, "north", fingerprint(node.request.party))
    foreign = host.root().issue(now=now()).chain[0].hex()
    with pytest.raises(FedarkError):
        node.install(
            dump(bundle.model_copy(update={"device_chain": (foreign,)}).signed(host.keys().signing))
        )
    assert not node.joined


def test_revocation_refuses_the_node_everywhere_and_its_device_by_name(
    host: HostFolder, tmp_path: Path
) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    spared = admitted(host, tmp_path / "east", "east", "customer")
    with client_of(host)(node) as client:
        assert client.jobs() == []
        revoke(host, "north")
        with pytest.raises(Refused, match="not approved"):
            client.jobs()
        with pytest.raises(Refused, match="revoked"):
            client.bundle()
    assert not host.store.admits(node.request.transport_key.strip())
    assert host.store.admits(spared.request.transport_key.strip())
    root, crl = host.collateral()
    for folder, good in ((node, False), (spared, True)):
        attester = SimulatedAttester(
            SimulatedDevice.load(folder.path / "device"),
            measurements=dict.fromkeys((*MEASURED_REGISTERS, RUN_CONFIG), bytes(48)),
            sandbox=SandboxFacts("none"),
        )
        token = attester.quote(bytes(64), bytes(32))
        if good:
            SimulatedVerifier(root, crl).verify(token, now=now())
        else:
            with pytest.raises(EvidenceRefused, match="revoked"):
                SimulatedVerifier(root, crl).verify(token, now=now())


def test_a_node_that_is_revoked_while_its_certificates_are_renewed_stays_revoked(
    host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    keys = HostFolder.keys

    def meanwhile(self: HostFolder) -> PartyKeys:
        monkeypatch.setattr(HostFolder, "keys", keys)
        revoke(HostFolder.open(host.path), "north")
        return keys(self)

    monkeypatch.setattr(HostFolder, "keys", meanwhile)
    with pytest.raises(InputError, match="revoked meanwhile"):
        approve(host, "north", fingerprint(node.request.party))
    row = host.store.node("north")
    assert row is not None
    assert row.status == "revoked"
    assert not host.store.admits(row.transport)


def test_two_revocations_at_once_are_both_in_the_list(host: HostFolder, tmp_path: Path) -> None:
    serials = set()
    for name in ("north", "east", "south"):
        admitted(host, tmp_path / name, name, "customer")
        row = host.store.node(name)
        assert row is not None
        chain = parse(row.bundle, Admission, "the bundle").device_chain
        serials.add(x509.load_der_x509_certificate(bytes.fromhex(chain[0])).serial_number)
    start = threading.Barrier(3)
    workers = [
        threading.Thread(
            target=lambda name=name: (start.wait(60), revoke(HostFolder.open(host.path), name))
        )
        for name in ("north", "east", "south")
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    listed = x509.load_der_x509_crl(host.collateral()[1])
    assert {entry.serial_number for entry in listed} == serials


def test_a_revoked_name_joins_anew_only_once_it_is_forgotten(
    host: HostFolder, tmp_path: Path
) -> None:
    admitted(host, tmp_path / "north", "north", "customer")
    revoke(host, "north")
    again = make_node(host, tmp_path / "again", "north", "customer")
    data = (again.path / "request.json").read_bytes()
    with pytest.raises(InputError, match="joined already"):
        file_request(host, data)
    with pytest.raises(InputError, match="revoked"):
        approve(host, "north", fingerprint(again.request.party))
    host.store.forget("north")
    file_request(host, data)
    approve(host, "north", fingerprint(again.request.party))


def test_one_transport_key_serves_one_node(host: HostFolder, tmp_path: Path) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    keys, transport = PartyKeys(), node.transport_key()
    party = parties.party("east", keys)
    request = JoinRequest(
        party=party,
        transport_key=transport_pem(transport),
        device_key=transport_pem(transport),
        token=invite(host, "east", "customer").token,
    )
    with pytest.raises(InputError, match="transport key"):
        file_request(host, dump(request.signed(keys.signing, transport)))


def test_a_folder_that_is_not_empty_is_left_alone(host: HostFolder, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        make_node(host, tmp_path / "x", "north", "customer")
    with pytest.raises(InputError, match="not empty"):
        make_host(tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y"]


@pytest.mark.parametrize("kind", [Invitation, JoinRequest, Admission])
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b"\xff", b"1" * (65 << 10), b'{"kind": "x", "surprise": 1}']
)
def test_a_malformed_file_is_refused(kind: type, data: bytes) -> None:
    with pytest.raises((InputError, ContractError)):
        parse(data, kind, "it")


def test_a_signed_call_is_good_for_its_method_path_body_and_minute_alone() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    public = transport_pem(key)
    headers = request_headers(key, "north", "PUT", "/a", b"body", now=1000)
    digest = verify_request(public, headers, "PUT", "/a", now=1100)
    assert digest == hashlib.sha256(b"body").digest()
    for method, path, when in (("GET", "/a", 1000), ("PUT", "/b", 1000), ("PUT", "/a", 1121)):
        with pytest.raises(Refused):
            verify_request(public, headers, method, path, now=when)
    with pytest.raises(Refused, match="clocks"):
        verify_request(public, headers, "PUT", "/a", now=879)
    for changed in ({"fedark-node": "east"}, {"fedark-body": "00" * 32}, {"fedark-time": "1001"}):
        with pytest.raises(Refused):
            verify_request(public, headers | changed, "PUT", "/a", now=1000)
    other = transport_pem(ec.generate_private_key(ec.SECP384R1()))
    with pytest.raises(Refused):
        verify_request(other, headers, "PUT", "/a", now=1000)
    for name in headers.keys() - {"fedark-version"}:
        broken = {key: value for key, value in headers.items() if key != name}
        with pytest.raises(Refused):
            verify_request(public, broken, "PUT", "/a", now=1000)
