"""The host's own routes: how nodes join, learn of jobs, answer them, and exchange sealed bundles.
No I/O but the host's folder.

    GET  /v1/fedark/hello                      anybody: time and protocol version
    POST /v1/fedark/join                       with an invitation's token: file a join request
    GET  /v1/fedark/bundle                     a node that asked, signed: its bundle, once approved
    everything else: approved nodes, signed
    PUT  /v1/fedark/offers                     a provider's signed offer
    GET  /v1/fedark/jobs                       the jobs that the node is a party of
    GET  /v1/fedark/jobs/DIGEST                a contract
    PUT  /v1/fedark/jobs/DIGEST/answer         what the node's operator says to it
    GET  /v1/fedark/catalogue/DIGEST           how much of a bundle is here
    GET|PUT /v1/fedark/catalogue/DIGEST/manifest, .../payload/OFFSET

A node is known by the transport key that its request's head is signed with, the digest of the body
in it (`fedark.operate.joining`). So a request is judged before its body is read, and whoever is not
known gets the same answer, after the same work, whichever name was used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from fedark.contract.contract import now
from fedark.foundation.errors import FedarkError, InputError, ProtocolError, Refused, printable
from fedark.foundation.jsontext import read_json
from fedark.operate.host.admission import file_request, request_of
from fedark.operate.host.catalogue import MAX_PIECE, Catalogue
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.store import JOB_ENDS, JobRecord, NodeRow
from fedark.operate.joining import MAX_FILE, transport_pem, unauthenticated, verify_request
from fedark.operate.offer import Offer

__all__ = ["MAX_BODY", "PREFIX", "PROTOCOL", "HostAnswer", "HostRequest", "HostService"]

PREFIX = "/v1/fedark/"
PROTOCOL = "1"
MAX_BODY = MAX_PIECE
ANSWERS = ("ready", "waiting", "refused")
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HostAnswer:
    """What goes back: status, content type and bytes. `why`: of a refusal, for the host's log."""

    status: int
    kind: str
    body: bytes
    why: str = ""


@dataclass(frozen=True)
class HostRequest:
    """A request whose head is good.

    Attributes:
        node: who proved to be at the other end, "" for nobody yet.
        most: bytes that the body may have.
    """

    node: str
    most: int
    act: Callable[[bytes], HostAnswer]


class _NotFoundError(FedarkError):
    pass


class _WrongVersionError(FedarkError):
    pass


def _json(value: object, status: int = 200) -> HostAnswer:
    return HostAnswer(status, "application/json", json.dumps(value).encode())


class HostService:
    """See the module's docstring."""

    def __init__(self, host: HostFolder) -> None:
        self._host = host
        self._store = host.store
        self._catalogue = Catalogue(host.catalogue, limit=host.config.catalogue_bytes)
        self._nobody = transport_pem(ec.generate_private_key(ec.SECP384R1()))
        digest, number = "([0-9a-f]{96})", "([0-9]{1,15})"
        routes: list[tuple[str, str, Callable[..., HostAnswer]]] = [
            ("PUT", "offers", self._put_offer),
            ("GET", "jobs", self._jobs),
            ("GET", f"jobs/{digest}", self._contract),
            ("PUT", f"jobs/{digest}/answer", self._answer),
            ("GET", f"catalogue/{digest}", self._held),
            ("GET", f"catalogue/{digest}/manifest", self._manifest),
            ("GET", f"catalogue/{digest}/payload/{number}", self._piece),
            ("PUT", f"catalogue/{digest}/manifest", self._put_manifest),
            ("PUT", f"catalogue/{digest}/payload/{number}", self._put_piece),
        ]
        self._routes = [
            (method, re.compile(f"{PREFIX}{path}"), function) for method, path, function in routes
        ]

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> HostRequest | HostAnswer:
        """Judge a request by its head; never raises. An `HostAnswer` is a refusal.

        Args:
            headers: lower-case names.
        """
        return _answered(method, path, lambda: self._begin(method, path, headers))

    def finish(self, call: HostRequest, body: bytes) -> HostAnswer:
        """Answer a call, with its body; never raises."""
        return _answered(call.node, "a call", lambda: call.act(body))

    def handle(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HostAnswer:
        """Both at once."""
        call = self.begin(method, path, headers)
        return call if isinstance(call, HostAnswer) else self.finish(call, body)

    def _begin(self, method: str, path: str, headers: Mapping[str, str]) -> HostRequest:
        if (method, path) == ("GET", f"{PREFIX}hello"):
            told = {"time": now().timestamp(), "protocol": int(PROTOCOL)}
            return HostRequest("", 0, lambda body: _json(told))
        version = headers.get("fedark-version", "")
        if version != PROTOCOL:
            raise _WrongVersionError(
                f"The node speaks version {printable(version, 12) or 'none'} of the host's"
                f" protocol, this host {PROTOCOL}.",
                safe="Nothing was done.",
                fix="Bring node and host to the same release of fedark.",
            )
        if (method, path) == ("POST", f"{PREFIX}join"):
            return HostRequest("", MAX_FILE, self._join)
        row = self._store.node(headers.get("fedark-node", ""))
        digest = verify_request(row.transport if row else self._nobody, headers, method, path)
        if row is None:
            raise unauthenticated()
        if (method, path) == ("GET", f"{PREFIX}bundle"):
            return HostRequest(row.name, 0, lambda body: _bundle(row))
        _require_approved(row)
        for wanted, pattern, function in self._routes:
            found = pattern.fullmatch(path)
            if found is not None and wanted == method:
                act = partial(self._act, row.name, digest, function, found.groups())
                return HostRequest(row.name, MAX_BODY if method == "PUT" else 0, act)
        raise _NotFoundError("")

    def _act(
        self,
        name: str,
        digest: bytes,
        function: Callable[..., HostAnswer],
        values: tuple[str, ...],
        body: bytes,
    ) -> HostAnswer:
        if hashlib.sha256(body).digest() != digest:
            raise unauthenticated()
        row = self._store.node(name)
        if row is None:
            raise unauthenticated()
        _require_approved(row)  # a body may take minutes: it may have been revoked meanwhile
        return function(row, body, *values)

    def _join(self, body: bytes) -> HostAnswer:
        request = file_request(self._host, body)
        _log.info("%s asks to join as %s", request.party.name, request.party.role)
        return _json({"filed": request.party.name}, 202)

    # -- jobs

    def _put_offer(self, row: NodeRow, body: bytes) -> HostAnswer:
        if row.role != "provider":
            raise Refused(f"{row.name} is not a provider.", safe="Its offer was dropped.")
        key = bytes.fromhex(request_of(row).party.signing_key)
        offer = Offer.verify(body, key, by=row.name)
        self._store.put_offer(offer.job, row.name, body)
        _log.info("%s offers %d models for job %s", row.name, len(offer.models), offer.job)
        return _json({"stored": offer.job})

    def _jobs(self, row: NodeRow, body: bytes) -> HostAnswer:
        keys = ("digest", "name", "status", "reason")
        return _json(
            [{key: getattr(job, key) for key in keys} for job in self._store.jobs_of(row.name)]
        )

    def _contract(self, row: NodeRow, body: bytes, digest: str) -> HostAnswer:
        return HostAnswer(200, "application/cbor", self._job_of(row, digest).contract)

    def _answer(self, row: NodeRow, body: bytes, digest: str) -> HostAnswer:
        job = self._job_of(row, digest)
        try:
            value = read_json(body)
            answer, reason = value["answer"], printable(str(value.get("reason", "")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError("An answer is malformed.") from None
        if answer not in ANSWERS:
            raise InputError("An answer is none that exists.")
        if job.status not in JOB_ENDS:
            self._store.answer(digest, row.name, answer, reason)
        return _json({"status": job.status})

    def _job_of(self, row: NodeRow, digest: str) -> JobRecord:
        """A job that the node is a party of; others do not exist for it."""
        job = self._store.job_of(row.name, digest)
        if job is None:
            raise _NotFoundError("")
        return job

    # -- catalogue

    def _held(self, row: NodeRow, body: bytes, digest: str) -> HostAnswer:
        held = self._catalogue.held(digest)
        if held is None:
            raise _NotFoundError("")
        return _json({"size": held.size, "total": held.total, "whole": held.whole})

    def _manifest(self, row: NodeRow, body: bytes, digest: str) -> HostAnswer:
        return _bytes(self._catalogue.manifest(digest))

    def _piece(self, row: NodeRow, body: bytes, digest: str, offset: str) -> HostAnswer:
        return _bytes(self._catalogue.piece(digest, int(offset)))

    def _put_manifest(self, row: NodeRow, body: bytes, digest: str) -> HostAnswer:
        self._require_provider(row)
        self._catalogue.begin(digest, body, bytes.fromhex(request_of(row).party.signing_key))
        return self._held(row, b"", digest)

    def _put_piece(self, row: NodeRow, body: bytes, digest: str, offset: str) -> HostAnswer:
        self._require_provider(row)
        held = self._catalogue.add(digest, int(offset), body)
        return _json({"size": held.size, "total": held.total, "whole": held.whole})

    def _require_provider(self, row: NodeRow) -> None:
        if row.role != "provider":
            raise Refused(f"{row.name} is not a provider.", safe="Its bundle was dropped.")


def _answered(method: str, path: str, function: Callable[[], _Result]) -> _Result | HostAnswer:
    try:
        return function()
    except _NotFoundError:
        return HostAnswer(404, "text/plain", b"", "no such route, or nothing there for this node")
    except FedarkError as error:
        status = {_WrongVersionError: 426, Refused: 401, ProtocolError: 401}.get(type(error), 400)
        told = {"what": error.what, "safe": error.safe, "fix": error.fix}
        return HostAnswer(status, "application/json", json.dumps(told).encode(), error.what)
    except Exception:
        _log.exception("%s %s failed", method, printable(path, 160))
        return HostAnswer(500, "text/plain", b"", "a fault of this host")


def _require_approved(row: NodeRow) -> None:
    if row.status != "approved":
        raise Refused(f"{row.name} is not approved.", safe="Nothing was done.")


def _bundle(row: NodeRow) -> HostAnswer:
    if row.status == "approved":
        return HostAnswer(200, "application/json", row.bundle)
    return _json({"status": row.status}, 202)


def _bytes(data: bytes | None) -> HostAnswer:
    if data is None:
        raise _NotFoundError("")
    return HostAnswer(200, "application/octet-stream", data)
