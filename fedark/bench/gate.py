"""`fedark bench gate`: from starting a trainer enclave to its weight key, step by step; what the
sandbox costs; appraisals a second.

The steps are those of a real run: an enclave process in the strongest sandbox that this machine
offers, evidence through a gate, `release` into a transparency log on the disk, and the grant taken
by the enclave. Every figure of a step is the median of a few starts, with the measurement cache
warm, as it is from the second start of an installation on.

The sandbox's cost is the time of the same LoRA step in two processes of the same interpreter,
libraries and environment, one confined and one not. They take turns, first the one and then the
other; the ratio is the median of the ratios of neighbours, so that what slows the whole machine for
a while slows both. On a machine that has other work the processor time is the better figure.
Appraisals are counted by the processor time of one thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import statistics
import subprocess  # nosec B404
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedark.attestation.binding import HOST_LABEL, KeyBinding
from fedark.attestation.claims import SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.gate import Gate
from fedark.attestation.nonces import NonceBook
from fedark.attestation.platforms.simulated import (
    SimulatedAttester,
    SimulatedDevice,
    SimulatedRoot,
    SimulatedVerifier,
)
from fedark.attestation.terms import SandboxMode
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.bench import Row, _hardware
from fedark.contract.contract import CONTRACT_LABEL, Contract, SignedContract, now
from fedark.enclave.host import EnclaveProcess
from fedark.enclave.launcher import _ENVIRONMENT, launch
from fedark.enclave.roles import create
from fedark.enclave.session import RunConfig
from fedark.enclave.vouching import vouch
from fedark.foundation.errors import EnclaveFailed, printable
from fedark.foundation.keys import HpkeKey, PartyKeys, SigningKey
from fedark.measurement import Measurement, measure_enclave, reference_policies
from fedark.measurement.manifest import package_dir
from fedark.sandbox import policy_digests, survey
from fedark.translog.log import TransparencyLog
from fedark.v1 import enclave_pb2 as pb
from fedark.vault.bundle import seal
from fedark.vault.manifest import ModelCard, ReleasePolicy, VerifiedManifest
from fedark.vault.release import release
from fedark.vault.weightkey import WeightKey

__all__ = ["rows"]

_STARTS, _PAIRS, _APPRAISALS, _DEVICES = 5, 60, 400, 100
_MAX_SLOWDOWN, _MIN_RATE, _MAX_MEASURE = 1.03, 200, 0.5
_STEPS = {
    "measure": "measure, cache warm",
    "spawn": "spawn",
    "lock": "import, lock, measure again",
    "keys": "keys",
    "quote": "quote",
    "verify": "verify",
    "release": "release, log on the disk",
    "unwrap": "unwrap",
}


def rows() -> Iterator[Row]:
    """Steps of a start, their sum, the sandbox's slow-down, and appraisals a second on one core."""
    mode = survey().mode("landlock")
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as name:
        world = _World.make(Path(name), mode)
        starts = [world.start() for _ in range(1 + _STARTS)][1:]
        for step, text in _STEPS.items():
            seconds = statistics.median(start[step] for start in starts)
            row = Row(f"{text} ({mode})", seconds, None, "s")
            yield (
                replace(row, goal=f"<= {_MAX_MEASURE}", ok=seconds <= _MAX_MEASURE)
                if step == "measure"
                else row
            )
        yield Row(
            f"start to key released ({mode})",
            statistics.median(sum(start.values()) for start in starts),
            None,
            "s",
        )
        for text, pairs in zip(("by the clock", "processor time"), _slowdown(world), strict=True):
            inside, outside = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
            ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
            goal, met = f"<= {_MAX_SLOWDOWN}", ratio <= _MAX_SLOWDOWN
            yield Row(
                f"LoRA step in the sandbox ({mode}), {text}", inside, outside, "s", ratio, goal, met
            )
        for text, devices in (("one device", 1), (f"{_DEVICES} devices in turn", _DEVICES)):
            rate = world.appraisals(devices)
            yield Row(
                f"evidence appraised, {text}",
                rate,
                None,
                "1/s",
                None,
                f">= {_MIN_RATE}",
                rate >= _MIN_RATE,
            )
        world.nonces = NonceBook(Path(name) / "nonces.sqlite")
        yield Row(
            "evidence appraised, nonces on the disk, by the clock",
            world.appraisals(1, time.perf_counter),
            None,
            "1/s",
        )
        for text, rate in _hardware.rates():
            yield Row(
                f"{text} verified", rate, None, "1/s", None, f">= {_MIN_RATE}", rate >= _MIN_RATE
            )


@dataclass
class _World:
    """One provider with a sealed bundle, and a contract that all have signed."""

    folder: Path
    mode: SandboxMode
    root: SimulatedRoot
    device: SimulatedDevice
    crl: bytes
    keys: dict[str, PartyKeys]
    signed: SignedContract
    manifest: VerifiedManifest
    key: WeightKey
    log: TransparencyLog
    nonces: NonceBook = field(default_factory=NonceBook)

    @classmethod
    def make(cls, folder: Path, mode: SandboxMode) -> _World:
        begun = now()
        keys = {name: PartyKeys() for name in ("provider", "pool", "north", "south")}
        model = folder / "model"
        model.mkdir()
        save_file(
            {"weight": np.frombuffer(secrets.token_bytes(1 << 20), dtype=np.uint8)},
            model / "model.safetensors",
        )
        (model / "config.json").write_text("{}", encoding="utf-8")
        later = (begun + timedelta(days=1)).isoformat()
        card = ModelCard(name="bench", title="Random bytes", licence="none", task="classification")
        policy = ReleasePolicy(expires=later, platforms=("simulated",), minimum_cohort=2)
        manifest, key = seal(
            model, folder / "bundle", provider=keys["provider"].signing, card=card, policy=policy
        )
        root = SimulatedRoot(now=begun)
        reference = {
            role: {name: value.hex() for name, value in measure_enclave(role).registers.items()}
            for role in ("trainer", "aggregator")
        }
        roles = {"provider": "provider", "pool": "aggregator"}
        contract = Contract.build(
            {
                "job": "bench",
                "created": begun.isoformat(),
                "expires": later,
                "rounds": 1,
                "parties": [
                    {
                        "name": name,
                        "role": roles.get(name, "customer"),
                        "signing_key": own.signing.public.hex(),
                        "hpke_key": own.hpke.public.hex(),
                    }
                    for name, own in keys.items()
                ],
                "models": [
                    {
                        "name": "bench",
                        "task": "classification",
                        "bundle": manifest.digest().hex(),
                        "weights": manifest.weights().hex(),
                        "prompt": "{text}",
                        "labels": ["yes", "no"],
                        "adapter": {},
                        "training": {},
                        "server": {},
                        "layout": [{"name": "head.bias", "shape": [2], "travels": True}],
                    }
                ],
                "attestation": {
                    "platforms": ["simulated"],
                    "simulated_root": root.sha256,
                    "sandbox": mode,
                    "policies": reference_policies(mode),
                    **reference,
                },
                "protection": {"minimum_cohort": 2},
                "privacy": {},
                "evaluation": {},
                "deliver_to": ["north"],
            }
        )
        signatures = {
            name: own.signing.sign(CONTRACT_LABEL, contract.digest())
            for name, own in keys.items()
            if name != "pool"
        }
        signed = SignedContract.verify(contract, signatures)
        log = TransparencyLog(folder / "log.sqlite", keys["provider"].signing)
        device, crl = root.issue(now=begun), root.crl(now=begun)
        return cls(folder, mode, root, device, crl, keys, signed, manifest, key, log)

    def start(self) -> dict[str, float]:
        """Seconds of each step of one start."""
        watch = _Stopwatch()
        config = self._config("trainer", "north")
        with ExitStack() as stack:
            with watch("measure"):
                measurement = measure_enclave("trainer")
            with watch("spawn"):
                enclave = stack.enter_context(self._spawn(measurement, config.encode()))
            with watch("lock"):
                enclave._launch.settle()
                enclave._await_lock(time.monotonic() + 180)
            with watch("keys"):
                enclave.call(pb.Call(start=pb.Start(run_config=config.encode())))
                vouch(enclave.call, config, self.keys["north"].signing)
            gate = self._gate()
            nonce = gate.challenge("trainer", "north", now=now())
            with watch("quote"):
                attest = pb.Attest(peer="provider", nonce=nonce)
                evidence = enclave.call(pb.Call(attest=attest)).evidence.evidence
            with watch("verify"):
                peer = gate.admit(
                    evidence,
                    role="trainer",
                    party="north",
                    run_config_digest=config.register(),
                    now=now(),
                )
            with watch("release"):
                grant = release(
                    self.key,
                    self.manifest,
                    peer,
                    contract=self.signed,
                    model="bench",
                    provider=self.keys["provider"].signing,
                    log=self.log,
                    now=now(),
                )
            group = self._admit_each_other(enclave)
            given = pb.Grant(
                model="bench", manifest=self.manifest.encode(), grant=grant, group_grant=group
            )
            with watch("unwrap"):
                enclave.call(pb.Call(grant=given))
        return watch.seconds

    def appraisals(self, devices: int, clock: Callable[[], float] = time.thread_time) -> float:
        """Evidence admitted in one second, of one core's time by default, from `devices` devices in
        turn.
        """
        registers = {**measure_enclave("trainer").registers, "runconfig": secrets.token_bytes(48)}
        facts = self._facts()
        attesters = [
            SimulatedAttester(self.root.issue(now=now()), measurements=registers, sandbox=facts)
            for _ in range(devices)
        ]
        gate, hpke, signing = self._gate(), HpkeKey().public, SigningKey().public
        evidence = []
        for index in range(_APPRAISALS):
            nonce = gate.challenge("trainer", "north", now=now())
            binding = KeyBinding(
                nonce, hpke, signing, self.signed.digest, "run-1", "trainer", "north"
            )
            token = attesters[index % devices].quote(binding.report_data(), nonce)
            host = self.keys["north"].signing.sign(HOST_LABEL, binding.host_statement())
            evidence.append(Evidence("simulated", token, binding, host).encode())
        begun = clock()
        for data in evidence:
            gate.admit(
                data,
                role="trainer",
                party="north",
                run_config_digest=registers["runconfig"],
                now=now(),
            )
        return _APPRAISALS / (clock() - begun)

    @contextmanager
    def _spawn(self, measurement: Measurement, run_config: bytes) -> Iterator[EnclaveProcess]:
        launched = launch(
            measurement,
            run_config,
            device=self.device,
            log=self.folder / "enclave.log",
            minimum_sandbox=self.mode,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4,
        )
        with EnclaveProcess(measurement.role, launched) as enclave:
            yield enclave

    def _config(self, role: str, party: str) -> RunConfig:
        return RunConfig(role=role, party=party, contract=self.signed.contract, run_id="run-1")

    def _gate(self) -> Gate:
        return Gate(
            terms=self.signed.contract.attestation,
            contract_digest=self.signed.digest,
            run_id="run-1",
            verifiers={"simulated": SimulatedVerifier(self.root.certificate, self.crl)},
            nonces=self.nonces,
            hosts=self.signed.contract.signing_keys,
        )

    def _facts(self) -> SandboxFacts:
        return SandboxFacts(self.mode, *policy_digests(self.mode, survey().landlock))

    def _admit_each_other(self, enclave: EnclaveProcess) -> bytes:
        """The group's key for the trainer, from an aggregator's session in this process, once each
        has admitted the other.
        """
        config = self._config("aggregator", "pool")
        registers = {**measure_enclave("aggregator").registers, "runconfig": config.register()}
        attester = SimulatedAttester(self.device, measurements=registers, sandbox=self._facts())
        pool = create(
            config.encode(),
            lambda report, nonce: (attester.platform, attester.quote(report, nonce)),
        )

        def ask(call: pb.Call) -> pb.Reply:
            return pool.handle(call, lambda progress: None)

        vouch(ask, config, self.keys["pool"].signing)

        def admission(peer: str, evidence: bytes) -> pb.Call:
            collateral = {SIMULATED_ROOT: self.root.certificate, SIMULATED_CRL: self.crl}
            signatures = self.signed.signatures
            return pb.Call(
                admit_peer=pb.AdmitPeer(
                    peer=peer,
                    evidence=evidence,
                    contract_signatures=signatures,
                    collateral=collateral,
                )
            )

        nonce = enclave.call(pb.Call(challenge=pb.Challenge(peer="pool"))).nonce.nonce
        evidence = ask(pb.Call(attest=pb.Attest(peer="north", nonce=nonce))).evidence.evidence
        enclave.call(admission("pool", evidence))
        nonce = ask(pb.Call(challenge=pb.Challenge(peer="north"))).nonce.nonce
        evidence = enclave.call(
            pb.Call(attest=pb.Attest(peer="pool", nonce=nonce))
        ).evidence.evidence
        return ask(admission("north", evidence)).admitted.group_grant


class _Stopwatch:
    """Seconds by name: `with watch("name"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun


Pairs = list[tuple[float, float]]


def _slowdown(world: _World) -> tuple[Pairs, Pairs]:
    """Seconds of neighbouring steps, inside and outside: by the clock, and of processor time."""
    real = measure_enclave("trainer")
    script = package_dir() / "bench" / "_gate_step.py"
    measurement = dataclasses.replace(real, entry_point=script)
    specification = json.dumps({"task": "plain", "path": [str(part) for part in real.search_path]})
    clock, processor = Pairs(), Pairs()
    with (
        world._spawn(measurement, b"bench") as enclave,
        _Plain(real, script, world.folder / "plain.log") as plain,
    ):
        enclave._await_lock(time.monotonic() + 180)
        enclave.call(pb.Call(start=pb.Start(run_config=b"bench")))
        plain.ask(specification)

        def inside() -> list[float]:
            return _seconds(
                enclave.call(pb.Call(round=pb.Round(round=1))).measured.local.decode("ascii")
            )

        def outside() -> list[float]:
            return _seconds(plain.ask("step"))

        for number in range(_PAIRS):
            if number % 2:
                mine = inside()
                other = outside()
            else:
                other = outside()
                mine = inside()
            clock.append((mine[0], other[0]))
            processor.append((mine[1], other[1]))
    return clock, processor


def _seconds(text: str) -> list[float]:
    return [float(part) for part in text.split()]


class _Plain:
    """The process outside the sandbox: a line in, a line out."""

    def __init__(self, measurement: Measurement, script: Path, log: Path) -> None:
        self._log = log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(  # nosec B603
                [str(measurement.python), "-I", "-S", "-B", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=_ENVIRONMENT,
                cwd="/",
            )

    def ask(self, line: str) -> str:
        if self._process.stdin is None or self._process.stdout is None:
            raise EnclaveFailed("The process outside the sandbox has no pipes.")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            said = printable(self._log.read_text(encoding="utf-8", errors="replace")[-300:])
            raise EnclaveFailed(f"The process outside the sandbox ended early: {said}")
        return answer

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
