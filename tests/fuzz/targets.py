"""Every parser that takes bytes from another party, with real samples of what it accepts.

The samples are made here, by honest code, once; where a parser stands behind a signature, a second
target signs what was bent with the right key, so that the parser is reached. `PARSERS` names what
must have a target: one that is removed fails the suite.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from engine import Target
from fuzzed_world import World
from midrun import parties
from outside import outside
from strangers import strangers
from sum_messages import sum_messages

sys.path[:0] = [
    str(Path(__file__).parents[1] / part)
    for part in ("attestation/platforms", "stages", "operate/host", "secagg")
]

from vendors import Authority, NitroMaker, SnpMaker, TdxMaker  # noqa: E402

from fedark.attestation import _x509, certificates, cose  # noqa: E402
from fedark.attestation.appraisal import AppraisalPolicy  # noqa: E402
from fedark.attestation.binding import HOST_LABEL, KeyBinding  # noqa: E402
from fedark.attestation.claims import SandboxFacts  # noqa: E402
from fedark.attestation.eat import SimulatedClaims  # noqa: E402
from fedark.attestation.evidence import Evidence  # noqa: E402
from fedark.attestation.gate import Gate  # noqa: E402
from fedark.attestation.guest import GuestAttester, GuestStatement, GuestVerifier  # noqa: E402
from fedark.attestation.nonces import NonceBook  # noqa: E402
from fedark.attestation.platforms.sev_snp import certificates_of_table  # noqa: E402
from fedark.attestation.platforms.simulated import SimulatedRoot, SimulatedVerifier  # noqa: E402
from fedark.attestation.platforms.tdx_collateral import Collateral  # noqa: E402
from fedark.attestation.reference import (  # noqa: E402
    REFERENCE_LABEL,
    ReferenceValues,
    VerifiedReference,
    sign_reference,
)
from fedark.enclave.channel import Channel, Disconnected  # noqa: E402
from fedark.enclave.protection import (  # noqa: E402
    Context,
    Delivery,
    GroupKey,
    Payload,
    ProtectedUpdate,
    open_delivery,
    protect,
    seal_delivery,
)
from fedark.foundation import canonical  # noqa: E402
from fedark.foundation.errors import FedarkError  # noqa: E402
from fedark.foundation.keys import HYBRID, HpkeKey, SigningKey  # noqa: E402
from fedark.translog.entry import Entry  # noqa: E402
from fedark.translog.head import HEAD_LABEL, TreeHead  # noqa: E402
from fedark.translog.log import TransparencyLog  # noqa: E402
from fedark.translog.memory import HeadMemory  # noqa: E402
from fedark.translog.merkle import verify_consistency, verify_inclusion  # noqa: E402
from fedark.translog.update import LogUpdate, make_update  # noqa: E402
from fedark.translog.view import check_views, sign_view  # noqa: E402
from fedark.v1 import enclave_pb2  # noqa: E402
from fedark.vault.manifest import Manifest  # noqa: E402
from fedark.vault.opener import Collector, Opener  # noqa: E402
from fedark.vault.release import Receipt, accept  # noqa: E402

NOW = datetime(2030, 6, 1, 12, 0, tzinfo=UTC)
REGISTERS = {name: os.urandom(48) for name in ("launcher", "runtime", "application", "runconfig")}
FACTS = SandboxFacts("namespaces", b"s" * 48, b"l" * 48)

PARSERS = (
    "cbor", "evidence", "gate", "cose", "claims", "simulated token", "simulated token, signed",
    "certificate",
    "revocation list", "vendor certificate",
    "vendor revocation list", "pem chain", "snp token", "snp table", "tdx quote", "tdx collateral",
    "nitro document",
    "guest statement", "guest token", "reference values", "reference values, signed", "policy file",
    "manifest", "manifest, signed", "sealed payload", "grant", "grant, signed", "receipt",
    "receipt, signed",
    "log entry", "tree head", "tree head, signed", "inclusion proof", "consistency proof",
    "log update", "log update, signed",
    "log view", "log view, signed", "head file", "contract", "run configuration", "channel frame",
    "protected update", "update payload", "group grant", "global state", "delivery",
    "secagg hello", "secagg hello, signed", "secagg round", "secagg upload", "secagg endorsement",
    "secagg unmask request",
    "secagg survivors", "secagg shares", "broker challenge", "broker release",
    "stage request, provider", "stage request, customer",
    "stage request, customer, masked", "stage reply, masked", "aggregator request",
    "enclave call, trainer",
    "enclave call, aggregator",
    "enclave call, trainer, masked", "enclave call, aggregator, masked", "job file",
    "checkpoint", "checkpoint, sealed", "ledger head", "ledger head, signed", "report",
    "report, signed", "stage reply",
    "safetensors",
    "invitation", "join request", "admission", "offer", "offer, signed", "host call", "host answer",
    "broker reply",
    "tokenizer", "tokenizer settings", "weight index", "pooling settings", "model configuration",
    "front",
)  # fmt: skip

Made = Iterator[Target]


def _signed_by(key: SigningKey, label: str) -> Callable[[bytes], bytes]:
    return lambda body: canonical.encode({"body": body, "signature": key.sign(label, body)})


def _body(signed: bytes) -> bytes:
    body: bytes = canonical.decode(signed)["body"]
    return body


def _evidence() -> Made:
    root = SimulatedRoot(now=NOW)
    device = root.issue(now=NOW)
    crl = root.crl(now=NOW)
    verifier = SimulatedVerifier(root.certificate, crl)
    attester = device.attester(measurements=REGISTERS, sandbox=FACTS)
    attester._clock = lambda: NOW
    binding = KeyBinding(
        b"n" * 32, HpkeKey().public, SigningKey().public, b"c" * 48, "run-1", "trainer", "north"
    )
    token = attester.quote(binding.report_data(), binding.nonce)
    host = SigningKey()
    evidence = Evidence(
        "simulated", token, binding, host.sign(HOST_LABEL, binding.host_statement())
    ).encode()
    claims = cose.parse(token).payload
    samples = [
        canonical.encode(value)
        for value in ({"a": [1, -1, 1.5, None, True, b"x", "y", {"z": {}}]}, [0, 1 << 63], {})
    ]
    yield Target(
        "cbor",
        [*samples, evidence, claims],
        lambda data: canonical.encode(canonical.decode(data)),
        "exact",
    )
    yield Target("evidence", [evidence], lambda data: Evidence.decode(data).encode(), "exact")
    yield Target("cose", [token], cose.parse, "open")
    yield Target("claims", [claims], lambda data: SimulatedClaims.decode(data).encode(), "exact")
    yield Target("simulated token", [token], lambda data: verifier.verify(data, now=NOW), "closed")
    yield Target(
        "simulated token, signed",
        [claims],
        lambda data: verifier.verify(device.sign(data), now=NOW),
        "open",
    )

    terms = SimpleNamespace(
        platforms=("simulated",), trainer={}, aggregator={}, kem=HYBRID,
        hardware=SimpleNamespace(tables=dict), minimum_svn=0,
        sandbox="none", policies={},
    )  # fmt: skip
    gate = Gate(
        terms=terms, contract_digest=b"c" * 48, run_id="run-1", verifiers={"simulated": verifier},
        nonces=NonceBook(),
        hosts={"north": host.public},
    )  # fmt: skip

    def admit(data: bytes) -> Any:
        return gate.admit(
            data, role="trainer", party="north", run_config_digest=REGISTERS["runconfig"], now=NOW
        )

    # Its nonce was never issued: nothing at all may pass, the sample included.
    yield Target("gate", [evidence, canonical.encode({"platform": "simulated"})], admit, "closed")
    for name, data, parse in (
        ("certificate", device.chain[0], certificates.load_certificate),
        ("revocation list", crl, _x509.read_crl),
    ):
        yield Target(name, [data], parse, "open", structure=False)
    statement = GuestStatement(b"r" * 64, REGISTERS, FACTS).encode()
    yield Target(
        "guest statement", [statement], lambda data: GuestStatement.decode(data).encode(), "exact"
    )


def _hardware() -> Made:
    authority = Authority(NOW)
    intel, amd, aws = TdxMaker(authority), SnpMaker(authority), NitroMaker(authority)
    for name, data, parse in (
        ("vendor certificate", amd.vcek.der, lambda data: _x509.load_certificate(data, "It", "x")),
        (
            "vendor revocation list",
            amd.crl(amd.ask.cert),
            lambda data: _x509.RevocationList(data, "It", "x"),
        ),
        (
            "pem chain",
            intel.pck_ca.pem + intel.root.pem,
            lambda data: _x509.load_pem_chain(data, 2, "It", "x"),
        ),
    ):
        yield Target(name, [data], parse, "open", structure=False)
    snp, tdx, nitro = amd.verifier(), intel.verifier(), aws.verifier()
    report = amd.quote()
    yield Target(
        "snp token", [report], lambda data: snp.verify(data, now=NOW), "closed", structure=False
    )
    table = (
        bytes.fromhex("63da758de6644564adc5f4b93be8accd")
        + (48).to_bytes(4, "little")
        + (9).to_bytes(4, "little")
    )
    yield Target(
        "snp table", [table + bytes(24) + b"x" * 9], certificates_of_table, "open", structure=False
    )
    yield Target(
        "tdx quote",
        [intel.quote()],
        lambda data: tdx.verify(data, now=NOW),
        "closed",
        structure=False,
    )
    words = (b'{"', b'"}', b"null", b"1e999", b"[[[[", b"\\u0000", b'"fmspc":', b"-1")
    yield Target(
        "tdx collateral",
        [intel.collateral()],
        lambda data: Collateral(data, root_key=intel.root.point),
        "open",  # white space and the order of outer fields are free: what counts is signed
        structure=False,
        words=words,
    )
    document = aws.quote(report_data=bytes(64), nonce=bytes(32))
    yield Target("nitro document", [document], lambda data: nitro.verify(data, now=NOW), "closed")
    hardware = SimpleNamespace(
        platform="nitro", quote=lambda report, nonce: aws.quote(report_data=report, nonce=nonce)
    )
    token = GuestAttester(hardware, measurements=REGISTERS, sandbox=FACTS).quote(
        b"r" * 64, bytes(32)
    )
    yield Target(
        "guest token", [token], lambda data: GuestVerifier(nitro).verify(data, now=NOW), "closed"
    )


def _reference(folder: Path) -> Made:
    publisher = SigningKey()
    values = ReferenceValues.model_validate(
        {
            "role": "trainer",
            "release": "fedark 0.1.0",
            "issued": NOW.isoformat(),
            "expires": (NOW + timedelta(days=1)).isoformat(),
            "registers": {"launcher": "ab" * 48, "tdx.mrtd": "cd" * 48},
        }
    )
    signed = sign_reference(values, publisher)

    def verify(data: bytes) -> Any:
        return VerifiedReference.verify(data, [publisher.public], now=NOW, source="x")

    yield Target("reference values", [signed], verify, "closed")
    resign = _signed_by(publisher, REFERENCE_LABEL)
    yield Target(
        "reference values, signed", [_body(signed)], lambda data: verify(resign(data)), "open"
    )
    text = f"""version = 1
[platforms.simulated]
root = "{"ab" * 32}"
[platforms.tdx]
accepted = ["UpToDate"]
[platforms.sev-snp.minimum_tcb.Milan]
bootloader = 3
tee = 0
snp = 8
microcode = 115
[trainer]
launcher = "{"ab" * 48}"
"""
    path = folder / "policy.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        AppraisalPolicy.read(path, now=NOW)

    words = (
        b"[",
        b"]]",
        b'"""',
        b" = ",
        b"\n",
        b"inf",
        b"1979-05-27",
        b"0x",
        b"{",
        b"signed = ['../x']\n",
    )
    yield Target("policy file", [text.encode()], read, "open", structure=False, words=words)


def _vault(world: Any) -> Made:
    contract, keys = world.contract, world.provider_keys
    encoded = world.bundle.manifest.encode()
    public = keys.signing.public
    yield Target("manifest", [encoded], lambda data: Manifest.verify(data, public), "closed")
    resign = _signed_by(keys.signing, "fedark/bundle/1")
    yield Target(
        "manifest, signed",
        [_body(encoded)],
        lambda data: Manifest.verify(resign(data), public),
        "open",
    )
    payload = b"".join(bytes(piece) for piece in world.bundle.payload(1 << 20))

    def open_all(data: bytes) -> None:
        opener = Opener(world.bundle.manifest, world.weight_key, Collector(world.bundle.manifest))
        opener.feed(data)
        opener.finish()

    yield Target("sealed payload", [payload], open_all, "closed", structure=False)

    trainer = world.enclaves["north"]._session
    nonce, digest = trainer._answered["maker"].nonce, trainer._answered["maker"].evidence

    def take(data: bytes) -> Any:
        return accept(
            data, hpke=trainer._hpke, manifest=world.bundle.manifest, contract=contract,
            model="tiny", run_id="run-1",
            party="north", nonce=nonce, evidence=digest, now=world.now,
        )  # fmt: skip

    yield Target("grant", [world.grant], take, "closed")
    resign_grant = _signed_by(keys.signing, "fedark/grant/1")
    yield Target(
        "grant, signed", [_body(world.grant)], lambda data: take(resign_grant(data)), "open"
    )

    def check(data: bytes) -> Any:
        return Receipt.verify(
            data,
            signing_public=trainer._signing.public,
            contract=contract.digest(),
            run_id="run-1",
            party="north",
        )

    yield Target("receipt", [world.receipt], check, "closed")
    resign_receipt = _signed_by(trainer._signing, "fedark/receipt/1")
    yield Target(
        "receipt, signed", [_body(world.receipt)], lambda data: check(resign_receipt(data)), "open"
    )


def _translog(folder: Path) -> Made:
    key, customer = SigningKey(), SigningKey()
    log = TransparencyLog(folder / "fuzz-log.sqlite", key)

    def log_one(number: int) -> Any:
        return log.refuse(
            party="north",
            run_id="run-1",
            contract=b"c" * 48,
            asked="admission",
            evidence=b"e" * 48,
            reasons=f"reason {number}",
            now=NOW + timedelta(seconds=number),
        )

    done = [log_one(number) for number in range(6)]
    first, head = done[2].head, done[-1].head
    since = log_one(7).head
    entries = [one.entry for one in done]
    yield Target(
        "log entry", [entries[1].encode()], lambda data: Entry.decode(data).encode(), "exact"
    )
    yield Target(
        "tree head",
        [head.encoded],
        lambda data: TreeHead.verify(data, key.public, by="x"),
        "closed",
    )
    resign = _signed_by(key, HEAD_LABEL)
    yield Target(
        "tree head, signed",
        [_body(head.encoded)],
        lambda data: TreeHead.verify(resign(data), key.public, by="x"),
        "open",
    )
    yield Target(
        "head file",
        [head.to_json(key.public).encode()],
        lambda data: TreeHead.from_json(data, key.public, by="x"),
        "open",  # white space is free; what counts in it is signed
        structure=False,
        words=(b"null", b"{}", b'"', b"\\u0000"),
    )
    inclusion = canonical.encode(log.inclusion(2, head))
    consistency = canonical.encode(log.consistency(first, since))

    def proven(data: bytes) -> None:
        verify_inclusion(entries[2].leaf(), 2, head.size, _path(data), head.root)

    def consistent(data: bytes) -> None:
        verify_consistency(first.size, first.root, since.size, since.root, _path(data))

    yield Target("inclusion proof", [inclusion], proven, "closed")
    yield Target("consistency proof", [consistency], consistent, "closed")
    update = make_update(
        log, key, party="north", run_id="run-1", head=since, since=None, indexes=[1, 3]
    )
    memory = HeadMemory(folder / "fuzz-heads.sqlite")

    def shown(data: bytes) -> Any:
        return memory.take(data, key.public, by="x", party="north", run_id="run-1")

    yield Target("log update", [update], shown, "closed")
    resign_update = _signed_by(key, "fedark/log-update/1")
    yield Target(
        "log update, signed",
        [_body(update)],
        lambda data: LogUpdate.verify(resign_update(data), key.public, by="x"),
        "open",
    )
    view = sign_view(customer, party="south", run_id="run-1", contract=b"c" * 48, head=since)

    def viewed(data: bytes) -> None:
        check_views(
            {"south": data}, own=since, party="north", run_id="run-1", contract=b"c" * 48,
            customers={"south": customer.public, "north": customer.public}, minimum=2,
            owner=key.public, by="x", memory=memory,
        )  # fmt: skip

    yield Target("log view", [view], viewed, "closed")
    resign_view = _signed_by(customer, "fedark/log-view/1")
    yield Target(
        "log view, signed", [_body(view)], lambda data: viewed(resign_view(data)), "closed"
    )


def _path(data: bytes) -> list[bytes]:
    """A proof's path, of the types that its callers have checked."""
    path = canonical.decode(data)
    if type(path) is not list or any(type(node) is not bytes or len(node) != 32 for node in path):
        raise FedarkError("not a path")
    return path


def _channel() -> Made:
    ours, theirs = os.pipe()
    channel = Channel(ours)
    body = enclave_pb2.Frame(
        call=enclave_pb2.Call(round=enclave_pb2.Round(round=3, state=b"x" * 40))
    ).SerializeToString()
    frame = len(body).to_bytes(4, "big") + body

    def receive(data: bytes) -> None:
        # A fresh pipe for each: after a fault the stream is out of step, and is never used again.
        nonlocal channel
        ours, theirs = os.pipe()
        channel = Channel(ours)
        try:
            os.write(theirs, data[:60_000])
            os.close(theirs)
            channel.receive()
        finally:
            channel.close()

    os.close(ours)
    os.close(theirs)
    yield Target(
        "channel frame",
        [frame],
        receive,
        "open",
        structure=False,
        expected=(FedarkError, Disconnected),
    )


def _protection() -> Made:
    hpke, trainer, aggregator = HpkeKey(), SigningKey(), SigningKey()
    peer = {
        "contract_digest": b"c" * 48,
        "run_id": "run-1",
        "kem": HYBRID,
        "hpke_public": hpke.public,
    }
    sender: Any = SimpleNamespace(
        **peer, party="north", role="trainer", signing_public=trainer.public
    )
    recipient: Any = SimpleNamespace(
        **peer, party="pool", role="aggregator", signing_public=aggregator.public
    )
    payload = Payload(3, {"m": np.arange(6, dtype=np.float32)}, {"m": {"before": (1, 2, 0.5)}})
    context = Context(b"c" * 48, "run-1", "update", 1, "north", b"b" * 48)
    update = protect(payload, context, recipient=recipient, signer=trainer).wire

    def opened(data: bytes) -> Any:
        return ProtectedUpdate.verify(data, sender=sender, context=context).open(hpke)

    yield Target("protected update", [update], opened, "closed", structure=False)
    yield Target(
        "update payload", [payload.encode()], lambda data: Payload.decode(data).encode(), "exact"
    )
    group = GroupKey()
    grant = group.grant(sender, aggregator)

    def granted(data: bytes) -> Any:
        return GroupKey.accept(
            data, hpke=hpke, signing_public=trainer.public, party="north", aggregator=recipient
        )

    yield Target("group grant", [grant], granted, "closed", structure=False)
    there = Context(b"c" * 48, "run-1", "global", 1, "pool")
    state = group.seal_global(dict(payload.vectors), there, aggregator)
    yield Target(
        "global state",
        [state],
        lambda data: group.open_global(data, there, recipient),
        "closed",
        structure=False,
    )
    delivery = seal_delivery(
        Delivery(payload.vectors, b""),
        contract=b"c" * 48,
        run_id="run-1",
        party="north",
        hpke_public=hpke.public,
        kem=HYBRID,
        signer=aggregator,
        base=bytes(48),
    )
    yield Target(
        "delivery",
        [delivery],
        lambda data: open_delivery(data, hpke=hpke, party="north", aggregator=recipient),
        "closed",
        structure=False,
    )


@functools.cache
def targets() -> dict[str, Target]:
    """Every target by name; made once in a process, in a folder that its end removes."""
    holder = tempfile.TemporaryDirectory(prefix="fedark-fuzz-")
    _HELD.append(holder)
    folder = Path(holder.name)
    world = World(folder)
    found = [
        *_evidence(), *_hardware(), *_reference(folder), *_vault(world), *_translog(folder),
        *_channel(), *_protection(),
        *sum_messages(), *parties(world), *outside(world, folder), *strangers(),
    ]  # fmt: skip
    return {target.name: target for target in found}


_HELD: list[tempfile.TemporaryDirectory[str]] = []
