"""A sealed base answers under a lease as the base in clear does, and for nobody else."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import refusing
from typer.testing import CliRunner

import fedark.enclave.inference as inference_module
from fedark.attestation.platforms.simulated import SimulatedDevice
from fedark.cli import _register, app
from fedark.contract.contract import Contract, SignedContract
from fedark.contract.lease import LEASE_LABEL, Lease, SignedLease
from fedark.enclave.session import LeaseConfig
from fedark.foundation.errors import (
    EnclaveFailed,
    FedarkError,
    InputError,
    ModelError,
    ProtocolError,
    Refused,
    ReleaseRefused,
)
from fedark.foundation.keys import HpkeKey, PartyKeys, SigningKey
from fedark.measurement import measure_enclave
from fedark.operate.broker.keys import LEASES
from fedark.operate.party import DEVICE, PartyConfig
from fedark.records.reading import Record
from fedark.serving.engine import LOST, ClearEngine, LeasedEngine
from fedark.serving.leased import Leased
from fedark.serving.model import load
from fedark.simulation import InProcessEnclave
from fedark.tuning.adapter import Adapter, read_adapter
from fedark.tuning.mixed import Asked
from fedark.tuning.writing import Piece, Wish
from fedark.v1 import enclave_pb2 as pb
from fedark.vault.bundle import SealedBundle, seal
from fedark.vault.lease import ADAPTER_LABEL, Usage, adapter_statement
from fedark.vault.manifest import ModelCard, ReleasePolicy
from fedark.vault.release import accept
from fedark.vault.weightkey import KeyStore

_spec = importlib.util.spec_from_file_location(
    "broker_conftest", Path(__file__).parents[1] / "operate" / "broker" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_broker = importlib.util.module_from_spec(_spec)
sys.modules["broker_conftest"] = _broker
_spec.loader.exec_module(_broker)
prepared, tls, world = _broker.prepared, _broker.tls, _broker.world

if not app.registered_commands:
    _register()


@dataclass
class Use:
    """A provider's broker, a sealed base that it leases, and a customer with a finished adapter."""

    world: Any
    done: Any
    bundle: SealedBundle
    registers: Any
    enclaves: list[InProcessEnclave] = field(default_factory=list)

    def lease(self, **changes: Any) -> Lease:
        contract = self.world.contract
        reference = {name: value.hex() for name, value in self.registers.items()}
        terms = self.done.terms.model_copy(update={"bundle": self.bundle.manifest.digest().hex()})
        values: dict[str, Any] = {
            "job": "grid",
            "created": (datetime.now(UTC) - timedelta(hours=1)).isoformat(),
            "expires": (datetime.now(UTC) + timedelta(days=30)).isoformat(),
            "seconds": 600,
            "tokens": 1000,
            "total": 5000,
            "provider": contract.provider,
            "customer": contract.party("north"),
            "terms": terms,
            "attestation": contract.attestation.model_copy(update={"inference": reference}),
        }
        return Lease(**values | changes)

    def signed(self, lease: Lease | None = None) -> SignedLease:
        lease = lease or self.lease()
        digest = lease.digest()
        return SignedLease.verify(
            lease,
            {
                name: self.world.signing(name).sign(LEASE_LABEL, digest)
                for name in (lease.provider.name, lease.customer.name)
            },
        )

    def start(self, run_config: bytes) -> InProcessEnclave:
        device = SimulatedDevice.load(self.world.federation.folder("north") / DEVICE)
        enclave = InProcessEnclave("inference", run_config, device, self.registers)
        self.enclaves.append(enclave)
        return enclave

    def obtain(
        self, signed: Any, enclave: InProcessEnclave, run_id: str, usage: bytes = b"", **more: Any
    ) -> Any:
        values = {"party": "north", "signing": self.world.signing(), "heads": self.world.heads()}
        client = self.world.client(self.world.serve())
        return client.obtain(enclave, signed, run_id=run_id, usage=usage, **values | more)

    def leased(self, signed: SignedLease | None = None, **options: Any) -> Leased:
        signed = signed or self.signed()
        client = self.world.client(self.world.serve())

        def portion(enclave: Any, run_id: str, usage: bytes) -> Any:
            return client.obtain(
                enclave,
                signed,
                run_id=run_id,
                party="north",
                signing=self.world.signing(),
                heads=self.world.heads(),
                usage=usage,
            )

        values = {"bundle": self.bundle, "signing": self.world.signing()}
        return Leased(signed, self.start, portion, **values | options)

    def enclave(self, signed: SignedLease, run_id: str = "life-1") -> InProcessEnclave:
        return self.start(LeaseConfig("north", signed.contract, run_id).encode())

    def grant(self, grants: Any) -> pb.Call:
        name = self.done.terms.name
        return pb.Call(
            grant=pb.Grant(model=name, manifest=grants.manifests[name], grant=grants.by_model[name])
        )

    def open(self, signed: SignedLease, run_id: str = "life-1") -> tuple[InProcessEnclave, pb.Call]:
        """An enclave that is ready to answer with adapter "a", and the grant by which it is."""
        enclave = self.enclave(signed, run_id)
        grant = self.grant(self.obtain(signed, enclave, run_id))
        enclave.call(grant)
        payload = b"".join(bytes(piece) for piece in self.bundle.payload())
        enclave.call(pb.Call(sealed=pb.Sealed(model=self.done.terms.name, data=payload, last=True)))
        enclave.call(self.adapter(signed, run_id, self.world.signing()))
        return enclave, grant

    def adapter(self, signed: SignedLease, run_id: str, signing: SigningKey) -> pb.Call:
        flat = self.done.flat.astype("<f4").tobytes()
        statement = adapter_statement(signed.digest, run_id, "a", flat)
        signature = signing.sign(ADAPTER_LABEL, statement)
        return pb.Call(adapter=pb.Adapter(name="a", flat=flat, signature=signature))


ASK = pb.Call(ask=pb.Ask(adapter="a", prompts=["open line", "hold now"]))


def sealed(world: Any, base: Path, *roles: str) -> SealedBundle:
    catalogue = (world.provider / PartyConfig.read(world.provider).catalogue).resolve()
    out = catalogue / f"leased-{'-'.join(roles)}.fedark"
    keys = PartyKeys.load(world.provider / "party.keys")
    policy = ReleasePolicy(
        expires=(datetime.now(UTC) + timedelta(days=300)).isoformat(),
        platforms=("simulated",),
        sandbox="none",
        minimum_cohort=2,
        roles=roles,
    )
    card = ModelCard(name="leased", title="Leased", licence="Apache-2.0", task="classification")
    manifest, key = seal(base, out, provider=keys.signing, card=card, policy=policy)
    KeyStore(world.provider / "weight-keys").put(manifest, key)
    return SealedBundle.load(out, keys.signing.public)


@pytest.fixture(params=["minilm"])
def use(world: Any, finish: Callable[..., Any], request: pytest.FixtureRequest) -> Use:
    done = finish(request.param)
    bundle = sealed(world, done.base, "trainer", "inference")
    return Use(world, done, bundle, measure_enclave("inference").registers)


def asked(tell: Callable[[str], None], act: Callable[[], Any]) -> str:
    """What the provider's broker answered, and tell the table of attacks."""
    with pytest.raises(Refused) as error:
        act()
    assert error.value.logged is not None  # the provider's log says so, and shows it
    reasons = getattr(error.value, "reasons", ()) or error.value.what.splitlines()[1:]
    tell(f"{type(error.value).__name__}: {reasons[0].strip(' -')}")
    return str(error.value)


def refused(kind: type[FedarkError], act: Callable[[], Any]) -> str:
    with refusing(), pytest.raises(kind) as error:
        act()
    return str(error.value)


@pytest.mark.parametrize("use", ["minilm", "llama", "gpt2"], indirect=True)
def test_a_leased_base_answers_and_measures_as_the_base_in_clear_does(
    use: Use, records: Callable[..., list[Record]]
) -> None:
    adapter = read_adapter(use.done.folder)
    clear = load(adapter, str(use.done.base))
    leased = use.leased().model("mine", adapter)
    own = records(use.done.terms.labels or ("hold",))
    prompts = [record.prompt for record in own]
    if use.done.terms.labels:
        assert np.array_equal(leased.probabilities(prompts), clear.probabilities(prompts))
    else:
        assert leased.answers(prompts[:4], longest=5) == clear.answers(prompts[:4], longest=5)
        own = own[:8]
    assert leased.evaluate(own) == clear.evaluate(own)


def test_a_portion_that_is_used_up_is_followed_by_the_next_and_the_provider_holds_the_receipt(
    use: Use, texts: list[str]
) -> None:
    signed = use.signed(use.lease(tokens=60, total=180))
    leased = use.leased(signed)
    model = leased.model("mine", read_adapter(use.done.folder))
    for _ in range(6):
        model.probabilities(["open line now", "hold a line of load"])
    enclave = use.enclaves[-1]
    public = enclave.call(pb.Call(start=pb.Start(run_config=enclave_config(leased)))).hello
    usage = Usage.verify(
        leased.usage,
        signing_public=public.signing_public,
        lease=signed.digest,
        run_id=leased._run_id,
    )
    read = 6 * (5 + 7)
    assert usage.portions == 2
    assert list(usage.adapters.values()) == [(read, 0)]
    assert usage.left == 2 * 60 - read
    kept = list((use.world.provider / LEASES / "usage").iterdir())
    assert len(kept) == 1
    assert kept[0].stat().st_mode & 0o777 == 0o600
    told = refused(ReleaseRefused, lambda: [model.probabilities(["hold"] * 9) for _ in range(9)])
    assert "180 of the lease's 180 tokens are given out already" in told


def enclave_config(leased: Leased) -> bytes:
    lease = leased.signed.contract
    return LeaseConfig(lease.customer.name, lease, leased._run_id).encode()


def test_an_enclave_that_is_started_again_needs_another_portion(use: Use) -> None:
    signed = use.signed(use.lease(tokens=1000, total=2000))
    for run_id in ("life-1", "life-2"):
        enclave, _ = use.open(signed, run_id)
        enclave.call(ASK)
    told = refused(ReleaseRefused, lambda: use.open(signed, "life-3"))
    assert "2,000 of the lease's 2,000 tokens are given out already" in told


@pytest.mark.attack("token budget replayed after a restart")
def test_a_restarted_enclave_takes_no_grant_of_its_former_life(use: Use) -> None:
    signed = use.signed()
    _, grant = use.open(signed)
    again = use.enclave(signed)  # same lease, same run id, same registers
    told = refused(ReleaseRefused, lambda: again.call(grant))
    assert "its recipient is not this enclave's" in told
    assert "its nonce is not this enclave's" in told


@pytest.mark.attack("replayed lease grant")
def test_a_grant_adds_its_tokens_once(use: Use) -> None:
    enclave, grant = use.open(use.signed())
    assert "taken by this enclave already" in refused(Refused, lambda: enclave.call(grant))


@pytest.mark.attack("expired lease")
def test_an_expired_portion_answers_nothing_and_its_weights_are_forgotten(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    enclave, _ = use.open(use.signed())
    enclave.call(ASK)
    later = datetime.now(UTC) + timedelta(seconds=601)
    monkeypatch.setattr(inference_module, "now", lambda: later)
    assert "has ended" in refused(Refused, lambda: enclave.call(ASK))
    assert enclave._session._task is None
    monkeypatch.undo()
    assert "No weights are open" in refused(ProtocolError, lambda: enclave.call(ASK))


@pytest.mark.attack({"back": "clock set back", "stopped": "clock stopped"}, param="how")
@pytest.mark.parametrize("how", ["back", "stopped"])
def test_a_host_that_turns_its_clock_back_gains_no_time(
    use: Use, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    enclave, _ = use.open(use.signed())
    began = datetime.now(UTC)
    if how == "back":
        monkeypatch.setattr(inference_module, "now", lambda: began + timedelta(seconds=300))
        enclave.call(ASK)
        monkeypatch.setattr(inference_module, "now", lambda: began)
        assert "was set back" in refused(Refused, lambda: enclave.call(ASK))
    else:
        boot = inference_module._boot()
        monkeypatch.setattr(inference_module, "now", lambda: began + timedelta(seconds=1))
        monkeypatch.setattr(inference_module, "_boot", lambda: boot + 601)
        assert "has ended" in refused(Refused, lambda: enclave.call(ASK))
    assert enclave._session._task is None


@pytest.mark.attack("clock before the grant")
def test_a_host_whose_clock_is_before_the_grant_gets_no_key_opened(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = use.signed()
    enclave = use.enclave(signed)
    grant = use.grant(use.obtain(signed, enclave, "life-1"))
    before = datetime.now(UTC) - timedelta(minutes=30)
    monkeypatch.setattr(inference_module, "now", lambda: before)
    told = refused(ReleaseRefused, lambda: enclave.call(grant))
    assert "clock is before the time at which the provider made it" in told


@pytest.mark.attack("lease of another model")
def test_a_grant_under_a_lease_of_another_model_opens_nothing(use: Use) -> None:
    signed = use.signed()
    other = use.signed(use.lease(terms=use.lease().terms.model_copy(update={"name": "another"})))
    enclave, stranger = use.enclave(signed), use.enclave(other)
    grants = use.obtain(other, stranger, "life-1")
    grant = pb.Grant(
        model=use.done.terms.name,
        manifest=grants.manifests["another"],
        grant=grants.by_model["another"],
    )
    told = refused(ReleaseRefused, lambda: enclave.call(pb.Call(grant=grant)))
    assert "its model is not this enclave's" in told
    assert "its contract is not this enclave's" in told


def test_an_adapter_of_another_base_is_not_asked_for(use: Use) -> None:
    adapter = read_adapter(use.done.folder)
    other = adapter.terms.model_copy(update={"weights": "0" * 96})
    told = refused(ModelError, lambda: use.leased().model("a", Adapter(other, adapter.flat)))
    assert "trained on other weights" in told


@pytest.mark.attack("another owner's adapter")
def test_an_adapter_that_the_leases_customer_has_not_signed_for_this_enclave_is_refused(
    use: Use,
) -> None:
    signed = use.signed()
    enclave, _ = use.open(signed)
    for call in (
        use.adapter(signed, "life-1", use.world.signing("south")),
        use.adapter(signed, "life-2", use.world.signing()),
    ):
        told = refused(Refused, lambda call=call: enclave.call(call))
        assert "not given by north, to whom the base is leased" in told


def test_an_adapter_of_another_shape_or_not_finite_leaves_the_enclave_as_it_was(use: Use) -> None:
    signed = use.signed()
    enclave, _ = use.open(signed)
    before = enclave.call(ASK).answered.answers
    for flat in (b"abc", b"\0" * 8, np.full(use.done.flat.size, np.nan, "<f4").tobytes()):
        statement = adapter_statement(signed.digest, "life-1", "a", flat)
        signature = use.world.signing().sign(ADAPTER_LABEL, statement)
        call = pb.Call(adapter=pb.Adapter(name="a", flat=flat, signature=signature))
        refused(ProtocolError, lambda call=call: enclave.call(call))
    assert enclave.call(ASK).answered.answers == before


def job_contract(use: Use) -> SignedContract:
    """The world's job, on the bundle that is leased too."""
    terms = use.lease().terms
    contract = Contract.build(
        use.world.contract.to_map() | {"models": [terms.model_dump(mode="python")]}
    )
    return use.world.signed(contract)


@pytest.mark.attack(
    {"trainer": "a trainer's grant for inference", "inference": "a lease's grant for training"},
    param="made",
)
@pytest.mark.parametrize("made", ["trainer", "inference"])
def test_a_grant_for_one_kind_of_enclave_opens_nothing_in_the_other(use: Use, made: str) -> None:
    if made == "trainer":
        job = use.world.signed()
        terms = job.contract.models[0]
        enclave = use.enclave(use.signed(use.lease(terms=terms)))
        grants = use.obtain(job, use.world.trainer("north", "life-1"), "life-1")
        grant = pb.Grant(
            model=terms.name,
            manifest=grants.manifests[terms.name],
            grant=grants.by_model[terms.name],
        )
        told = refused(ReleaseRefused, lambda: enclave.call(pb.Call(grant=grant)))
    else:
        signed, job = use.signed(), job_contract(use)
        grants = use.obtain(signed, use.enclave(signed), "life-1")
        hpke = HpkeKey(kem=job.contract.attestation.kem)
        told = refused(
            ReleaseRefused,
            lambda: accept(
                grants.by_model[use.done.terms.name],
                hpke=hpke,
                manifest=use.bundle.manifest,
                contract=job.contract,
                model=use.done.terms.name,
                run_id="life-1",
                party="north",
                nonce=b"",
                evidence=b"",
                now=datetime.now(UTC),
            ),
        )
    assert "its role is not this enclave's" in told
    assert "its contract is not this enclave's" in told


@pytest.mark.attack(
    {"trainer": "a trainer that asks for a lease", "inference": "an inference enclave that trains"},
    param="asks",
)
@pytest.mark.parametrize("asks", ["trainer", "inference"])
def test_the_broker_gives_each_kind_of_enclave_its_own_kind_of_grant(
    use: Use, asks: str, refusal: Callable[[str], None]
) -> None:
    signed, job = use.signed(), use.world.signed()
    if asks == "trainer":
        enclave = use.world.trainer("north", "life-1")
        told = asked(refusal, lambda: use.obtain(signed, enclave, "life-1"))
    else:
        enclave = use.enclave(signed)
        told = asked(refusal, lambda: use.obtain(job, enclave, "life-1"))
    assert "its role is" in told


@pytest.mark.attack("a lease against the release policy")
def test_a_policy_that_names_no_inference_enclave_releases_none(
    use: Use, refusal: Callable[[str], None]
) -> None:
    bundle = sealed(use.world, use.done.base, "trainer")
    terms = use.lease().terms.model_copy(update={"bundle": bundle.manifest.digest().hex()})
    signed = use.signed(use.lease(terms=terms))
    told = asked(refusal, lambda: use.obtain(signed, use.enclave(signed), "life-1"))
    assert "the provider's release policy names no inference enclave (it names trainer)" in told


@pytest.mark.attack("revoked lease")
def test_a_revoked_lease_gets_no_further_portion(use: Use) -> None:
    signed = use.signed()
    enclave = use.enclave(signed)
    use.obtain(signed, enclave, "life-1")
    revoked = use.world.provider / LEASES / "revoked" / signed.digest.hex()
    revoked.parent.mkdir(parents=True)
    revoked.touch()
    told = refused(Refused, lambda: use.obtain(signed, enclave, "life-1"))
    assert "maker has revoked this lease" in told


@pytest.mark.attack("an enclave that is not the leased one")
def test_an_enclave_that_measures_otherwise_gets_no_key(
    use: Use, refusal: Callable[[str], None]
) -> None:
    signed = use.signed()
    registers = dict(use.registers) | {"application": b"x" * 48}
    other = Use(use.world, use.done, use.bundle, registers)
    told = asked(refusal, lambda: use.obtain(signed, other.enclave(signed), "life-1"))
    assert "application" in told


def test_a_further_portion_needs_the_enclaves_own_receipt(use: Use) -> None:
    signed = use.signed()
    enclave = use.enclave(signed)
    use.obtain(signed, enclave, "life-1")
    told = refused(Refused, lambda: use.obtain(signed, enclave, "life-1"))
    assert "usage receipt did not come along" in told
    forged = Usage(signed.digest, "life-1", "north", 1, 1000, 0, {}).sign(SigningKey())
    told = refused(Refused, lambda: use.obtain(signed, enclave, "life-1", forged))
    assert "not of this enclave and lease" in told
    assert use.world.broker()._log.leased(signed.digest) == {"life-1": 1000}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_use_a_sealed_base_in_a_sandboxed_enclave(
    use: Use, records: Callable[..., list[Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Provider and customer by their commands, the broker over TLS, the enclave a process of its
    own; the answers are those of the base in clear.
    """
    provider, customer = use.world.provider, use.world.federation.folder("north")
    for folder in (provider, customer):
        path = folder / "party.toml"
        path.write_text(path.read_text().replace('sandbox = "none"', 'sandbox = "landlock"'))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    for name, target in (("maker", provider), ("north", customer)):
        (place / name).symlink_to(target)
    shutil.copytree(use.done.folder, place / "adapter-base")
    shutil.copy(use.world.certificate, place / "broker.pem")
    catalogue = (provider / PartyConfig.read(provider).catalogue).resolve()
    (place / "catalogue").symlink_to(catalogue)
    server = use.world.serve()
    own = records(use.done.terms.labels)
    with (place / "incidents.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label"], *[[r.prompt, r.answer] for r in own]])
    shutil.copy(place / "incidents.csv", place / "labelled.csv")
    shutil.copytree(use.done.base, place / "base-model")
    page = (Path(__file__).parents[2] / "docs" / "secret-base.md").read_text()
    toml = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert toml is not None
    (place / "use.toml").write_text(
        toml[1].replace("keys.example:8443", f"127.0.0.1:{server.port}")
    )
    commands = [shlex.split(line) for line in re.findall(r"^\$ (.+)$", page, re.MULTILINE)]
    done = [command for command in commands if command[1] not in ("broker",)]
    assert [command[1:3] for command in done] == [
        ["model", "seal"],
        ["lease", "make"],
        ["lease", "sign"],
        ["predict", "adapter-base"],
        ["eval", "adapter-base"],
        ["lease", "revoke"],
    ]
    said = ""
    for command in done:
        result = CliRunner().invoke(app, command[1:])
        assert result.exception is None, (command, result.output, result.exception)
        said += result.output
    with (place / "answers.csv").open() as file:
        answers = [row["label"] for row in csv.DictReader(file)]
    clear = load(read_adapter(use.done.folder), str(use.done.base))
    best = clear.probabilities([record.prompt for record in own]).argmax(1)
    assert answers == [use.done.terms.labels[index] for index in best]
    assert "tokens read, 0 written" in said
    told = CliRunner().invoke(app, done[3][1:])
    assert "maker has revoked this lease" in str(told.exception)


WISHES = {
    1: Wish("a", "open line", 6),
    2: Wish("b", "hold the load now", 4),
    3: Wish("a", "shed", 9, temperature=1.5, top_p=0.9, seed=4),
}


def written(engine: Any, begin: dict[int, Wish]) -> dict[int, tuple[str, Piece]]:
    """The text of every wish, and its last piece."""
    texts, last, begun = dict.fromkeys(begin, ""), dict[int, Piece](), False
    while len(last) < len(begin):
        for piece in engine.write({} if begun else begin, []):
            if piece.id in begin:
                texts[piece.id] += piece.text
                last |= {piece.id: piece} if piece.end else {}
        begun = True
    return {number: (texts[number], last[number]) for number in begin}


def engines(use: Use, **lease: Any) -> tuple[ClearEngine, LeasedEngine]:
    """A base in clear and a leased one, each with the same two adapters."""
    clear = ClearEngine(load(read_adapter(use.done.folder), str(use.done.base)).task)
    both = clear, LeasedEngine(use.leased(use.signed(use.lease(**lease))))
    for engine in both:
        engine.put("a", Adapter(use.done.terms, use.done.flat))
        engine.put("b", Adapter(use.done.terms, -use.done.flat))
    return both


@pytest.mark.parametrize("use", ["llama"], indirect=True)
def test_a_leased_base_writes_for_many_as_the_base_in_clear_and_is_charged_what_it_wrote(
    use: Use,
) -> None:
    clear, leased = engines(use)
    right = written(clear, WISHES)
    assert written(leased, WISHES) == right
    assert len({text for text, _ in right.values()}) == 3
    usage = Usage.claimed(leased._leased.usage)
    counts = [sum(one) for one in zip(*usage.adapters.values(), strict=True)]
    assert counts == [
        sum(last.read for _, last in right.values()),
        sum(last.written for _, last in right.values()),
    ]
    assert usage.left == 1000 - sum(counts)
    with pytest.raises(InputError):
        leased.embed([Asked("a", "open")])


@pytest.mark.parametrize("use", ["llama"], indirect=True)
def test_texts_that_end_early_too_long_or_with_their_client_give_back_what_they_did_not_use(
    use: Use,
) -> None:
    _, leased = engines(use)
    last = written(leased, {1: Wish("a", "line " * 40, 5)})[1][1]
    assert (last.end, last.read) == ("too long", 41)
    assert Usage.claimed(leased._leased.usage).left == 1000
    leased.write({2: Wish("a", "open line", 20)}, [])
    leased.write({}, [2])
    usage = Usage.claimed(leased._leased.usage)
    assert usage.left >= 1000 - 3 - 4
    assert leased._begun == set()


@pytest.mark.parametrize("use", ["llama"], indirect=True)
def test_a_portion_that_ends_among_texts_ends_none_of_them(use: Use) -> None:
    clear, leased = engines(use, tokens=24, total=200)
    right = written(clear, WISHES)
    for number, wish in WISHES.items():
        assert written(leased, {number: wish})[number] == right[number]
    leased.write({4: Wish("a", "open", 12)}, [])
    found = written(leased, {5: Wish("b", "open", 12)})
    assert found[5] == written(clear, {5: Wish("b", "open", 12)})[5]
    assert Usage.claimed(leased._leased.usage).portions >= 3
    assert leased._leased.lives == 1


@pytest.mark.parametrize("use", ["llama"], indirect=True)
def test_texts_of_an_enclave_that_ended_are_lost_and_the_next_is_answered(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear, leased = engines(use, total=3000)
    right = written(clear, WISHES)
    leased.write({7: Wish("a", "open", 12)}, [])
    killed = use.enclaves[-1]

    def dead(call: Any, **more: Any) -> Any:
        raise EnclaveFailed("The enclave was killed (SIGKILL).")

    monkeypatch.setattr(killed, "call", dead)
    with pytest.raises(EnclaveFailed):
        leased.write({}, [])
    assert len(use.enclaves) == 2
    assert written(leased, WISHES) == right
    # An expired portion: the weights are forgotten, and what was being written with them.
    leased.write({8: Wish("a", "open", 12)}, [])
    use.enclaves[-1]._session._portion.boot = 0.0
    pieces = leased.write({9: WISHES[1]}, [])
    assert [piece.id for piece in pieces if piece.end == LOST] == [8]
    assert leased._leased.lives == 3


@pytest.mark.parametrize("use", ["minilm"], indirect=True)
def test_prompts_for_several_adapters_are_labelled_by_one_call(use: Use, texts: list[str]) -> None:
    clear, leased = engines(use)
    asked = [Asked("ab"[n % 2], text) for n, text in enumerate(texts[:9])]
    for ours, right in zip(leased.label(asked), clear.label(asked), strict=True):
        assert np.array_equal(ours.values, right.values)
        assert (ours.tokens, ours.cut) == (right.tokens, right.cut)
    usage = Usage.claimed(leased._leased.usage)
    assert sum(read for read, _ in usage.adapters.values()) == 1000 - usage.left
    assert len(usage.adapters) == 2
    with pytest.raises(InputError):
        leased.write({1: WISHES[1]}, [])


@pytest.mark.parametrize("use", ["llama"], indirect=True)
def test_what_may_not_begin_in_an_enclave_changes_nothing_there(use: Use) -> None:
    enclave, _ = use.open(use.signed(use.lease(tokens=60)))
    session = enclave._session
    good = pb.Wish(id=1, adapter="a", prompt="open", longest=5, top_p=1)

    def tried(*wishes: pb.Wish) -> str:
        return refused(
            FedarkError, lambda: enclave.call(pb.Call(write=pb.Write(begin=wishes, steps=1)))
        )

    def changed(**values: Any) -> pb.Wish:
        wish = pb.Wish()
        wish.CopyFrom(good)
        for name, value in values.items():
            setattr(wish, name, value)
        return wish

    assert "no adapter of that name" in tried(good, changed(id=2, adapter="b"))
    assert "same number" in tried(good, good)
    assert "may take" in tried(*(changed(id=n, longest=20) for n in range(3)))
    for values in ({"longest": 0}, {"longest": 24}, {"temperature": float("nan")}, {"top_p": 0.0},
                   {"temperature": -1.0}, {"top_p": 1.5}):  # fmt: skip
        tried(changed(**values))
    assert session._begun == {}
    assert session._portion.tokens == 60
    assert not session._writer.busy
    enclave.call(pb.Call(write=pb.Write(begin=[good], steps=1)))
    assert "same number" in tried(good)
