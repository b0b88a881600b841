"""Between a node's operator and its host: fetches contracts and sealed bundles, hands in offers,
and tells what the operator said.

It holds the transport key and nothing else of value: neither the party's keys nor its records are
in this process. What it stores is checked by whom it concerns: contracts by the operator and by the
node when it signs, bundles against the contract's digest and the provider's signature. What it says
to the host ("ready") starts a job and signs nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from fedark.contract.contract import Contract, now
from fedark.foundation.errors import FedarkError, FederationError, InputError, ProtocolError
from fedark.foundation.logs import of_run, tell_error, working_on
from fedark.links.flower.service import NodeClient
from fedark.links.link import VERSION
from fedark.operate.host.catalogue import MAX_PIECE, Catalogue
from fedark.operate.host.store import JOB_ENDS
from fedark.operate.node.doctor import Finding, unready
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostclient import HostClient
from fedark.operate.node.sources import Source, source_of
from fedark.operate.offer import Offer
from fedark.stages.consent import Consent
from fedark.v1 import stage_pb2
from fedark.vault.bundle import SealedBundle, find_bundle, read_manifest
from fedark.vault.manifest import Manifest

__all__ = ["OFFERS", "HostSync"]

OFFERS = "offers"
"""In a provider's folder: JOB.offer, written by the operator's command, and JOB.sent once the host
has it.
"""
_MANY_BYTES = 1 << 40
_CUT_OFF = ("stopped", "expired", "failed")
_ANSWERS = {
    "approved": "ready",
    "waiting": "waiting",
    "refused": "refused",
    "used": "ready",
    "ended": "refused",
}
_CHECK_EVERY = 30.0


class HostSync:
    """See the module's docstring.

    Args:
        node: a node that has joined.
        socket: of its daemon.
        say: told of what goes on.
    """

    def __init__(self, node: NodeFolder, socket: Path, say: Callable[[str], None]) -> None:
        self._node = node
        self._socket = socket
        self._ended: set[str] = set()
        self._closed: set[str] = set()
        self._unfit: list[Finding] = []
        self._check_due = 0.0
        self._say = say
        self._consent = Consent(node.path)
        self._told: dict[str, tuple[str, str]] = {}
        self._catalogue = Catalogue(node.catalogue, limit=_MANY_BYTES)

    def step(self) -> None:
        """One look at the host.

        Raises:
            FederationError: it cannot be reached.
            FedarkError: it refused.
        """
        with HostClient(self._node) as host:
            data = host.bundle()
            if data is not None and data != (self._node.path / "host.json").read_bytes():
                self._node.install(data)
                self._say("certificates were renewed")
            if self._node.config.role == "provider":
                self._hand_in(host)
            for job in host.jobs():
                with working_on(**of_run(bytes.fromhex(job["digest"]), self._run(job["digest"]))):
                    if job["status"] in ("proposed", "running"):
                        self._consider(host, job["digest"], job["name"])
                    elif job["status"] in JOB_ENDS:
                        self._over(job["digest"], job["name"], job["status"], job["reason"])

    # -- jobs

    def _over(self, digest: str, name: str, status: str, reason: str) -> None:
        """Close a contract that nobody needs to answer any more, and end a run of it here."""
        kept = self._node.path / "consent" / f"{digest}.contract"
        if digest not in self._closed and kept.is_file():
            contract = Contract.decode(kept.read_bytes(), kept.name)
            self._consent.end(contract, f"{status} at the host{f' ({reason})' if reason else ''}")
            self._closed.add(digest)
            if status == "failed" and self._run(digest):
                tell_error(self._say, f"job {name} has failed: {reason}")
        if status in _CUT_OFF:
            self._end(digest, name, status)

    def _consider(self, host: HostClient, digest: str, name: str) -> None:
        contract = self._contract(host, digest)
        if contract.expired(now()):
            return
        decision = self._consent.decision(contract)
        answer, reason = _ANSWERS[decision.status], ""
        if answer == "waiting" and digest not in self._told:
            self._say(f"job {name} waits for its operator: fedark node jobs")
        if decision.status == "approved" and (problem := self._unready()):
            answer, reason = "waiting", f"its own check of its {problem} finds a problem"
        elif decision.status == "approved" and self._node.config.role == "customer":
            try:
                self._fetch_bundles(host, contract)
            except FederationError:
                raise
            except FedarkError as error:
                answer, reason = "waiting", error.what
        if self._told.get(digest) != (answer, reason):
            host.answer(digest, answer, reason)
            self._told[digest] = (answer, reason)
            self._say(f"told the host about job {name}: {answer}{f' ({reason})' if reason else ''}")

    def _run(self, digest: str) -> str:
        """The run of a contract that this node has taken part in, or ""."""
        used = self._node.path / "consent" / f"{digest}.used"
        return used.read_text() if used.is_file() else ""

    def _unready(self) -> str:
        """Which check of this machine keeps the node from a job, or "". The host is told no more
        than its name; the operator all of it.
        """
        if time.monotonic() >= self._check_due:
            self._check_due = time.monotonic() + _CHECK_EVERY
            found = unready(NodeFolder(self._node.path))
            for finding in found:
                if finding not in self._unfit:
                    tell_error(self._say, f"not ready for a job: {finding.check}: {finding.what}")
            if self._unfit and not found:
                self._say("ready for a job again")
            self._unfit = found
        return self._unfit[0].check if self._unfit else ""

    def _contract(self, host: HostClient, digest: str) -> Contract:
        path = self._node.path / "consent" / f"{digest}.contract"
        data = path.read_bytes() if path.is_file() else host.contract(digest)
        contract = Contract.decode(data, "a contract from the host")
        if contract.digest().hex() != digest:
            raise ProtocolError(
                "The host sent another contract than it named.", safe="It was dropped."
            )
        self._consent.propose(contract)
        return contract

    def _end(self, digest: str, name: str, status: str) -> None:
        """Have the daemon end a run that the host has cut off, with its enclave; a run that is over
        already stays so.
        """
        run_id = self._run(digest)
        if digest in self._ended or not run_id:
            return
        abort = stage_pb2.AbortRequest(reason=f"the host says that the job is {status}")
        request = stage_pb2.StageRequest(
            version=VERSION, run_id=run_id, contract_digest=bytes.fromhex(digest), abort=abort
        )
        reply = stage_pb2.StageReply()
        with NodeClient(self._socket) as daemon:
            if daemon.status().stage:
                return  # it would wait for the end of that stage, and so would this process
            reply.ParseFromString(daemon.handle(request.SerializeToString(), timeout=30))
        self._ended.add(digest)
        if reply.HasField("abort"):
            self._say(f"job {name} is {status}; its run has ended here")

    # -- sealed bundles

    def _fetch_bundles(self, host: HostClient, contract: Contract) -> None:
        """Have every bundle of a contract in the catalogue: from the operator's own sources, else
        from the host.

        Raises:
            FedarkError: one is nowhere to be had.
        """
        provider = bytes.fromhex(contract.provider.signing_key)
        for terms in contract.models:
            if find_bundle(self._node.catalogue, terms.bundle, provider) is not None:
                continue
            sources: list[Source] = [
                source_of(where, self._node.path) for where in self._node.config.bundle_sources
            ]
            sources.append(host)
            for source in sources:
                if self._fetch(source, terms.bundle, provider):
                    self._say(f"the sealed bundle of model {terms.name} is here and whole")
                    break
            else:
                raise InputError(
                    f"the sealed bundle of model {terms.name} is nowhere to be had yet"
                )

    def _fetch(self, source: Source, digest: str, provider: bytes) -> bool:
        held = self._catalogue.held(digest)
        if held is None:
            manifest = source.manifest(digest)
            if manifest is None:
                return False
            self._catalogue.begin(digest, manifest, provider)
            held = self._catalogue.held(digest)
        while held is not None and not held.whole:
            free = shutil.disk_usage(self._node.catalogue).free
            if free < held.total - held.size + MAX_PIECE:
                raise InputError(
                    f"the disk has {free} bytes free, and the bundle needs {held.total - held.size}"
                    " more"
                )
            data = source.piece(digest, held.size) if held.size < held.total else b""
            if data is None or (not data and held.size < held.total):
                return False
            held = self._catalogue.add(digest, held.size, data)
        return held is not None

    def _hand_in(self, host: HostClient) -> None:
        """Upload what the operator has offered: bundles first, so that no contract names one that
        is not to be had.
        """
        for path in sorted((self._node.path / OFFERS).glob("*.offer")):
            sent = path.with_suffix(".sent")
            data = path.read_bytes()
            if sent.is_file() and sent.read_bytes() == data:
                continue
            party = self._node.request.party
            for terms in Offer.verify(data, bytes.fromhex(party.signing_key), by=party.name).models:
                self._upload(host, terms.bundle)
            host.put_offer(data)
            sent.write_bytes(data)
            self._say(f"the offer for job {path.stem} is with the host")

    def _upload(self, host: HostClient, digest: str) -> None:
        for path in sorted(self._node.catalogue.glob("*.fedark")):
            data = read_manifest(path)
            manifest = Manifest.verify(data, Manifest.claimed_provider(data))
            if manifest.digest().hex() == digest:
                break
        else:
            raise InputError(f"The bundle {digest[:16]}... is gone from the catalogue.")
        bundle = SealedBundle.load(path, manifest.provider)
        held = host.put_manifest(digest, data)
        if held["total"] != bundle.manifest.payload_size:
            raise ProtocolError(
                "The host awaits another size of a bundle than its manifest names.",
                safe="No piece was sent.",
            )
        with (bundle.path / "payload").open("rb") as file:
            while held["size"] < held["total"]:
                before = file.seek(held["size"])
                held = host.put_piece(digest, before, file.read(MAX_PIECE))
                if held["size"] <= before or held["total"] != bundle.manifest.payload_size:
                    raise ProtocolError(
                        "The host takes no more of a bundle.", safe="What it has is kept."
                    )
