"""A node's calls to its host's own routes (`fedark.operate.host.service`): outbound HTTPS under the
host's own authority.

Each call is signed with the transport key. A refusal is raised in the host's words, made safe to
show; a host that cannot be reached is a FederationError, which callers try again later.
"""

from __future__ import annotations

import json
import math
import re
import ssl
from typing import TypeVar

import httpx

from fedark.contract.contract import now
from fedark.foundation.closing import Closing
from fedark.foundation.errors import FederationError, InputError, ProtocolError, Refused, printable
from fedark.foundation.jsontext import read_json
from fedark.foundation.proxies import proxy_for
from fedark.operate.host.folder import host_of
from fedark.operate.joining import request_headers
from fedark.operate.node.folder import NodeFolder

__all__ = ["HostClient"]

_PREFIX = "/v1/fedark/"
_MAX_ANSWER = 8 << 20
_MAX_BUNDLE = 1 << 50
_DIGEST = re.compile("[0-9a-f]{96}")
_Kind = TypeVar("_Kind", dict, list)  # type: ignore[type-arg]


class HostClient(Closing):
    """See the module's docstring. Use it as a context manager."""

    def __init__(self, node: NodeFolder, *, timeout: float = 20.0) -> None:
        address = node.admission.address if node.joined else node.invitation.address
        self._address, self._name, self._key = address, node.config.name, node.transport_key()
        context = ssl.create_default_context(cafile=str(node.ca))
        self._client = httpx.Client(
            base_url=f"https://{address}",
            verify=context,
            timeout=timeout,
            trust_env=False,
            proxy=proxy_for(host_of(address), node.config.proxy) or None,
        )
        self._certificate = b""

    def close(self) -> None:
        self._client.close()

    def hello(self) -> float:
        """Seconds by which the host's clock is ahead of this one's, within the time of the call."""
        told = _parsed(self._call("GET", "hello"), dict).get("time")
        if type(told) is not float or not math.isfinite(told):
            raise _malformed()
        return told - now().timestamp()

    @property
    def certificate(self) -> bytes:
        """The host's certificate (DER) at the last call; empty before the first."""
        return self._certificate

    def join(self, request: bytes) -> None:
        """File the join request."""
        self._call("POST", "join", request)

    def bundle(self) -> bytes | None:
        """The bundle for this node, or None while nobody has approved it.

        Raises:
            Refused: it was revoked, or the host does not know it.
        """
        data = self._call("GET", "bundle")
        status = _parsed(data, dict).get("status")
        if status == "revoked":
            raise Refused(f"The host has revoked {self._name}.", fix="Ask its operator.")
        return None if status == "pending" else data

    def put_offer(self, data: bytes) -> None:
        """Hand in a signed offer."""
        self._call("PUT", "offers", data)

    def jobs(self) -> list[dict[str, str]]:
        """The jobs that this node is a party of, oldest first: digest, name, status, reason."""
        value = _parsed(self._call("GET", "jobs"), list)
        keys = ("digest", "name", "status", "reason")
        if not all(
            isinstance(job, dict) and _DIGEST.fullmatch(str(job.get("digest"))) for job in value
        ):
            raise _malformed()
        return [{key: printable(str(job.get(key, ""))) for key in keys} for job in value]

    def contract(self, digest: str) -> bytes:
        """A contract."""
        return self._call("GET", f"jobs/{digest}")

    def answer(self, digest: str, answer: str, reason: str) -> None:
        """Tell what the operator says to a contract."""
        self._call(
            "PUT",
            f"jobs/{digest}/answer",
            json.dumps({"answer": answer, "reason": reason}).encode(),
        )

    def held(self, digest: str) -> dict[str, int] | None:
        """How much of a bundle the host has, or None for nothing."""
        data = self._call_or_none("GET", f"catalogue/{digest}")
        return _held(data) if data is not None else None

    def manifest(self, digest: str) -> bytes | None:
        """The manifest of a bundle that the host has whole."""
        return self._call_or_none("GET", f"catalogue/{digest}/manifest")

    def piece(self, digest: str, offset: int) -> bytes | None:
        """A piece of its payload."""
        return self._call_or_none("GET", f"catalogue/{digest}/payload/{offset}")

    def put_manifest(self, digest: str, data: bytes) -> dict[str, int]:
        """Begin, or go on with, the upload of a bundle; returns what the host has."""
        return _held(self._call("PUT", f"catalogue/{digest}/manifest", data))

    def put_piece(self, digest: str, offset: int, data: bytes) -> dict[str, int]:
        """Upload a piece; returns what the host has now."""
        return _held(self._call("PUT", f"catalogue/{digest}/payload/{offset}", data))

    def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        data = self._call_or_none(method, path, body)
        if data is None:
            raise InputError(f"The host has no {printable(path, 40)}...")
        return data

    def _call_or_none(self, method: str, path: str, body: bytes = b"") -> bytes | None:
        target = _PREFIX + path
        headers = request_headers(self._key, self._name, method, target, body)
        try:
            with self._client.stream(method, target, content=body, headers=headers) as response:
                tls = response.extensions["network_stream"].get_extra_info("ssl_object")
                self._certificate = (
                    tls.getpeercert(True) or b""
                )  # by position: it may be the raw TLS object
                data = bytearray()
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _MAX_ANSWER:
                        raise ProtocolError(
                            "The host's answer is too large.", safe="It was dropped."
                        )
        except httpx.HTTPError as error:
            if (reason := _distrust(error)) is not None:
                raise Refused(
                    f"The certificate of the host at {self._address} is not good here: {reason}.",
                    safe="Nothing was sent.",
                    fix=(
                        "Is the address the one of the invitation, and the clock right? If so, ask"
                        " the host's operator."
                    ),
                ) from None
            raise FederationError(
                f"The host at {self._address} cannot be reached ({type(error).__name__}).",
                fix="Look at the network and the clock; fedark node doctor says more.",
            ) from None
        if response.status_code == 404:
            return None
        if response.is_success:
            return bytes(data)
        raise _refusal(response.status_code, bytes(data))


def _distrust(error: BaseException | None) -> str | None:
    """Why a certificate was not trusted, if that is what went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return printable(str(error.verify_message))
        error = error.__cause__ or error.__context__
    return None


def _parsed(data: bytes, kind: type[_Kind]) -> _Kind:
    """JSON of this type."""
    try:
        value = read_json(data)
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise _malformed()
    return value


def _held(data: bytes) -> dict[str, int]:
    value = _parsed(data, dict)
    size, total = value.get("size"), value.get("total")
    if type(size) is not int or type(total) is not int or not 0 <= size <= total <= _MAX_BUNDLE:
        raise _malformed()
    return {"size": size, "total": total, "whole": value.get("whole") is True}


def _malformed() -> ProtocolError:
    return ProtocolError(
        "The host's answer is malformed.",
        safe="It was dropped.",
        fix="Are host and node of the same release?",
    )


def _refusal(status: int, data: bytes) -> Exception:
    try:
        value = _parsed(data, dict)
        what, safe, fix = (
            printable(str(value.get(key, "")), 600) for key in ("what", "safe", "fix")
        )
    except ProtocolError:
        what, safe, fix = f"The host answered with status {status}.", "", ""
    kind = {400: InputError, 401: Refused, 426: InputError}.get(status, FederationError)
    return kind(what, safe=safe, fix=fix)
