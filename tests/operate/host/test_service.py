"""The host's own routes: who may ask what, and sealed bundles that arrive whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import secrets
import tempfile
from pathlib import Path

import parties
import pytest
from direct import admitted, client_of, make_host, make_node, proposed

from fedark.foundation.errors import FedarkError, FederationError, InputError, Refused, StorageError
from fedark.foundation.keys import PartyKeys, SigningKey
from fedark.links.flower.service import NodeServer
from fedark.operate.host.catalogue import MAX_PIECE, Catalogue
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.service import HostService
from fedark.operate.joining import request_headers
from fedark.operate.node import hostsync
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostsync import OFFERS, HostSync
from fedark.operate.node.sources import FolderSource, source_of
from fedark.operate.offer import Offer
from fedark.stages.consent import Consent
from fedark.v1 import stage_pb2
from fedark.vault.bundle import SealedBundle, seal
from fedark.vault.manifest import ModelCard, ReleasePolicy, VerifiedManifest

NOWHERE = Path("/nowhere/node.sock")


@pytest.fixture
def host(tmp_path: Path) -> HostFolder:
    return make_host(tmp_path / "host")


def sealed(folder: Path, out: Path, key: SigningKey, size: int = 9 << 20) -> VerifiedManifest:
    """A bundle of a model that is nothing but noise."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(
        {"x": np.frombuffer(secrets.token_bytes(size), dtype=np.uint8)},
        folder / "model.safetensors",
    )
    card = ModelCard.model_validate(
        {"name": "tiny", "title": "tiny", "licence": "MIT", "task": "classification", "base": ""}
    )
    policy = ReleasePolicy(
        expires="2100-01-01T00:00:00+00:00",
        platforms=("simulated",),
        sandbox="landlock",
        minimum_cohort=3,
    )
    return seal(folder, out, provider=key, card=card, policy=policy)[0]


def call(
    service: HostService,
    node: NodeFolder,
    method: str,
    path: str,
    body: bytes = b"",
    **changes: str,
) -> int:
    target = f"/v1/fedark/{path}"
    headers = (
        request_headers(node.transport_key(), node.config.name, method, target, body) | changes
    )
    return service.handle(method, target, headers, body).status


def test_without_a_signature_only_the_time_is_told(host: HostFolder) -> None:
    service = HostService(host)
    hello = service.handle("GET", "/v1/fedark/hello", {}, b"")
    assert hello.status == 200
    assert set(json.loads(hello.body)) == {"time", "protocol"}
    version = {"fedark-version": "1"}
    digest = "0" * 96
    for method in ("GET", "PUT", "POST", "DELETE"):
        for path in (
            "bundle",
            "jobs",
            f"jobs/{digest}",
            "offers",
            f"catalogue/{digest}/manifest",
            "x",
            "",
        ):
            assert service.handle(method, f"/v1/fedark/{path}", version, b"").status == 401
            assert (
                service.handle(
                    method, f"/v1/fedark/{path}", version | {"fedark-node": "north"}, b""
                ).status
                == 401
            )


def test_an_older_or_newer_node_is_told_what_to_do(host: HostFolder, tmp_path: Path) -> None:
    node = admitted(host, tmp_path / "north", "north", "customer")
    for version in ("0", "2", "", "x" * 4000):
        headers = request_headers(node.transport_key(), "north", "GET", "/v1/fedark/jobs", b"") | {
            "fedark-version": version
        }
        answer = HostService(host).handle("GET", "/v1/fedark/jobs", headers, b"")
        assert answer.status == 426
        assert "same release of fedark" in json.loads(answer.body)["fix"]
        assert len(answer.body) < 1000


def test_a_node_that_waits_may_ask_for_its_bundle_and_nothing_else(
    host: HostFolder, tmp_path: Path
) -> None:
    node = make_node(host, tmp_path / "north", "north", "customer")
    service = HostService(host)
    with client_of(host)(node) as client:
        client.join((node.path / "request.json").read_bytes())
        assert client.bundle() is None
    assert call(service, node, "GET", "jobs") == 401
    assert call(service, node, "PUT", "offers", b"x") == 401


def test_a_node_sees_the_contracts_that_it_is_a_party_of_and_no_others(
    host: HostFolder, tmp_path: Path
) -> None:
    north, west = (admitted(host, tmp_path / name, name, "customer") for name in ("north", "west"))
    contract = proposed(host, parties.contract())
    digest = contract.digest().hex()
    service = HostService(host)
    with client_of(host)(north) as client:
        assert [job["digest"] for job in client.jobs()] == [digest]
        assert client.contract(digest) == contract.encode()
        client.answer(digest, "ready", "")
        with pytest.raises(InputError):
            client.answer(digest, "start it", "")
    with client_of(host)(west) as client:
        assert client.jobs() == []
        with pytest.raises(InputError):
            client.contract(digest)
    assert call(service, west, "PUT", f"jobs/{digest}/answer", b'{"answer": "refused"}') == 404
    assert host.store.answers(digest) == {"north": ("ready", "")}
    for body in (b"", b"[]", b"{}", b"\xff"):
        assert call(service, north, "PUT", f"jobs/{digest}/answer", body) == 400


def test_an_offer_is_its_providers_own(host: HostFolder, tmp_path: Path) -> None:
    maker = admitted(host, tmp_path / "maker", "maker", "provider")
    north = admitted(host, tmp_path / "north", "north", "customer")
    keys = PartyKeys.load(maker.path / "party.keys")
    value = {
        "job": "dispatch",
        "provider": "maker",
        "created": "2026-01-01T00:00:00+00:00",
        "models": (parties.model(),),
        "evaluation": {},
    }
    offer = Offer.model_validate(value)
    service = HostService(host)
    assert call(service, north, "PUT", "offers", offer.sign(keys.signing)) == 401
    assert call(service, maker, "PUT", "offers", offer.sign(SigningKey())) == 401
    assert call(service, maker, "PUT", "offers", b"junk") in (400, 401)
    assert host.store.offer("dispatch") is None
    assert call(service, maker, "PUT", "offers", offer.sign(keys.signing)) == 200
    assert host.store.offer("dispatch") == offer.sign(keys.signing)


def test_a_bundle_travels_from_provider_to_customer_in_pieces_and_goes_on_where_it_stopped(
    host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = admitted(host, tmp_path / "maker", "maker", "provider")
    keys = PartyKeys.load(maker.path / "party.keys")
    manifest = sealed(tmp_path / "model", maker.catalogue / "tiny.fedark", keys.signing)
    digest = manifest.digest().hex()
    offer = Offer.model_validate(
        {
            "job": "dispatch",
            "provider": "maker",
            "created": "2026-01-01T00:00:00+00:00",
            "models": (parties.model(bundle=digest),),
            "evaluation": {},
        }
    )
    (maker.path / OFFERS).mkdir()
    (maker.path / OFFERS / "dispatch.offer").write_bytes(offer.sign(keys.signing))
    client = client_of(host)
    monkeypatch.setattr(hostsync, "HostClient", client)
    pieces: list[str] = []

    class Cut(FederationError):
        pass

    def cut_second(
        method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[str, str, dict[str, str], bytes]:
        if "/payload/" in path:
            pieces.append(path.rpartition("/")[2])
            if len(pieces) == 2:
                raise Cut("the line went dead")
        return method, path, headers, body

    client.passing = staticmethod(cut_second)  # type: ignore[assignment]
    said: list[str] = []
    with pytest.raises(Cut):
        HostSync(maker, NOWHERE, said.append).step()
    assert host.store.offer("dispatch") is None
    HostSync(maker, NOWHERE, said.append).step()
    assert pieces == ["0", str(MAX_PIECE), str(MAX_PIECE), str(2 * MAX_PIECE)]
    assert host.store.offer("dispatch") is not None
    HostSync(maker, NOWHERE, said.append).step()
    assert len(pieces) == 4

    north = admitted(host, tmp_path / "north", "north", "customer")
    people = [
        maker.request.party,
        host.aggregator,
        north.request.party,
        parties.party("east"),
        parties.party("south"),
    ]
    contract = proposed(
        host, parties.contract(parties=people, models=[parties.model(bundle=digest)])
    )
    node = HostSync(north, NOWHERE, said.append)
    node.step()
    assert host.store.answers(contract.digest().hex())["north"][0] == "waiting"
    assert not list(north.catalogue.iterdir())
    Consent(north.path).approve(contract)
    pieces.clear()
    with pytest.raises(Cut):
        node.step()
    node.step()
    assert host.store.answers(contract.digest().hex())["north"][0] == "ready"
    found = SealedBundle.load(north.catalogue / f"{digest}.fedark", keys.signing.public)
    found.check_payload()
    assert found.manifest.digest() == manifest.digest()
    Consent(north.path).refuse(contract)
    node.step()
    assert host.store.answers(contract.digest().hex())["north"][0] == "refused"


def test_a_host_that_alters_a_bundle_or_a_contract_is_caught(
    host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = admitted(host, tmp_path / "maker", "maker", "provider")
    keys = PartyKeys.load(maker.path / "party.keys")
    manifest = sealed(tmp_path / "model", maker.catalogue / "tiny.fedark", keys.signing, 1 << 20)
    digest = manifest.digest().hex()
    at_host = Catalogue(host.catalogue, limit=1 << 30)
    payload = (maker.catalogue / "tiny.fedark" / "payload").read_bytes()
    at_host.begin(digest, manifest.encode(), keys.signing.public)
    assert at_host.add(digest, 0, payload).whole
    north = admitted(host, tmp_path / "north", "north", "customer")
    people = [
        maker.request.party,
        host.aggregator,
        north.request.party,
        parties.party("east"),
        parties.party("south"),
    ]
    contract = proposed(
        host, parties.contract(parties=people, models=[parties.model(bundle=digest)])
    )
    Consent(north.path).approve(contract)
    monkeypatch.setattr(hostsync, "HostClient", client_of(host))
    stored = host.catalogue / f"{digest}.fedark" / "payload"
    stored.write_bytes(payload[:-1] + bytes([payload[-1] ^ 1]))
    node = HostSync(north, NOWHERE, lambda text: None)
    node.step()
    answer, reason = host.store.answers(contract.digest().hex())["north"]
    assert answer == "waiting"
    assert "not what its manifest says" in reason
    assert not list(north.catalogue.glob("*.fedark"))
    foreign = sealed(tmp_path / "other", tmp_path / "other.fedark", SigningKey(), 1 << 16)
    (host.catalogue / f"{digest}.fedark" / "manifest").write_bytes(foreign.encode())
    node.step()
    assert host.store.answers(contract.digest().hex())["north"][0] == "waiting"
    assert not list(north.catalogue.glob("*.fedark"))

    altered = parties.contract(parties=people, rounds=9)
    real = HostService._job_of
    monkeypatch.setattr(
        HostService,
        "_job_of",
        lambda *asked: dataclasses.replace(real(*asked), contract=altered.encode()),
    )
    second = proposed(host, parties.contract(parties=people, rounds=7))
    with pytest.raises(FedarkError, match="another contract than it named"):
        node.step()
    assert second.digest() not in [c.digest() for c in Consent(north.path).proposed()]


def test_a_run_that_the_host_has_cut_off_is_ended_at_the_node_once_its_daemon_answers(
    host: HostFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = admitted(host, tmp_path / "north", "north", "customer")
    people = [
        host.aggregator,
        north.request.party,
        *(parties.party(name) for name in ("maker", "east", "south")),
    ]
    contract = proposed(host, parties.contract(parties=people))
    digest = contract.digest().hex()
    consent = Consent(north.path)
    consent.approve(contract)
    consent.use(contract, "run-1")
    monkeypatch.setattr(hostsync, "HostClient", client_of(host))
    asked: list[stage_pb2.StageRequest] = []

    class Daemon:
        party, role = "north", "customer"

        def handle(self, request: bytes) -> bytes:
            asked.append(stage_pb2.StageRequest.FromString(request))
            return stage_pb2.StageReply(abort=stage_pb2.AbortReply()).SerializeToString()

        def close(self) -> None: ...

    with tempfile.TemporaryDirectory(prefix="fedark-") as folder:
        said: list[str] = []
        node = HostSync(north, Path(folder) / "n.sock", said.append)
        node.step()
        assert asked == []
        host.store.set_job(digest, "running")
        host.store.set_job(digest, "stopped", "by hand")
        with pytest.raises(FederationError, match="cannot be reached"):
            node.step()
        server = NodeServer(Daemon(), Path(folder) / "n.sock")
        node.step()
        node.step()
        server.close()
    ((request,),) = ([(r.run_id, r.contract_digest, r.WhichOneof("body")) for r in asked],)
    assert request == ("run-1", contract.digest(), "abort")
    assert said[-1] == "job dispatch is stopped; its run has ended here"


# -- the catalogue


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[SigningKey, VerifiedManifest, bytes]:
    key = SigningKey()
    manifest = sealed(tmp_path / "m", tmp_path / "b.fedark", key, 1 << 16)
    return key, manifest, (tmp_path / "b.fedark" / "payload").read_bytes()


def test_only_the_signer_of_a_manifest_opens_an_upload(tmp_path: Path, bundle) -> None:
    key, manifest, _ = bundle
    catalogue = Catalogue(tmp_path / "c", limit=1 << 30)
    digest = manifest.digest().hex()
    with pytest.raises(Refused):
        catalogue.begin(digest, manifest.encode(), SigningKey().public)
    with pytest.raises(FedarkError, match="another digest"):
        catalogue.begin("0" * 96, manifest.encode(), key.public)
    with pytest.raises(FedarkError, match="96 hex digits"):
        catalogue.begin("../" + "0" * 93, manifest.encode(), key.public)
    with pytest.raises(InputError, match="has not come yet"):
        catalogue.add(digest, 0, b"x")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("damage", ["longer", "altered", "empty"])
def test_a_payload_that_is_not_what_was_signed_is_dropped_whole(
    tmp_path: Path, bundle, damage: str
) -> None:
    key, manifest, payload = bundle
    catalogue = Catalogue(tmp_path / "c", limit=1 << 30)
    digest = manifest.digest().hex()
    catalogue.begin(digest, manifest.encode(), key.public)
    wrong = {
        "longer": payload + b"x",
        "altered": payload[:-1] + bytes([payload[-1] ^ 1]),
        "empty": b"",
    }[damage]
    with pytest.raises(FedarkError):
        catalogue.add(digest, 0, wrong)
    assert catalogue.held(digest) is None
    assert catalogue.manifest(digest) is None


def test_a_piece_at_another_place_changes_nothing_and_tells_where_to_go_on(
    tmp_path: Path, bundle
) -> None:
    key, manifest, payload = bundle
    catalogue = Catalogue(tmp_path / "c", limit=1 << 30)
    digest = manifest.digest().hex()
    catalogue.begin(digest, manifest.encode(), key.public)
    assert catalogue.add(digest, 0, payload[:100]).size == 100
    assert catalogue.add(digest, 50, payload[50:]).size == 100
    assert catalogue.add(digest, 200, payload[200:]).size == 100
    assert catalogue.piece(digest, 0) is None
    assert catalogue.add(digest, 100, payload[100:]).whole
    assert catalogue.add(digest, 0, b"more").whole
    assert catalogue.piece(digest, len(payload) - 5) == payload[-5:]


def test_a_catalogue_without_room_takes_nothing(tmp_path: Path, bundle) -> None:
    key, manifest, payload = bundle
    catalogue = Catalogue(tmp_path / "c", limit=len(payload) - 1)
    with pytest.raises(StorageError, match="no room"):
        catalogue.begin(manifest.digest().hex(), manifest.encode(), key.public)


def test_a_folder_and_nothing_but_https_may_be_a_source(tmp_path: Path, bundle) -> None:
    _, manifest, payload = bundle
    source = source_of(".", tmp_path)
    assert isinstance(source, FolderSource)
    digest = manifest.digest().hex()
    assert source.manifest(digest) == manifest.encode()
    assert source.piece(digest, 10) == payload[10:]
    assert source.manifest("0" * 96) is None
    assert source.piece("0" * 96, 0) is None
    for where in ("http://x.example/b", "ftp://x", "file:///etc"):
        with pytest.raises(InputError, match="not an https"):
            source_of(where, tmp_path)
