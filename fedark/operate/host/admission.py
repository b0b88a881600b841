"""Who may join: invitations, requests, approval and revocation, as a person at the host decides.

A request is approved by name after its fingerprint was compared with the node's operator. Approval
certifies the node's quoting key, admits its transport key at the front and the SuperLink, and
answers with a signed admission. Revocation undoes all three: the front refuses the node's next
request, the SuperLink forgets it, and the platform's revocation list names its device.
"""

from __future__ import annotations

import secrets
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedark.contract.contract import Party, fingerprint, now
from fedark.foundation.errors import InputError, Refused
from fedark.operate.host.folder import HostFolder
from fedark.operate.host.store import NodeRow
from fedark.operate.joining import (
    Admission,
    Invitation,
    JoinRequest,
    Role,
    dump,
    load_transport_public,
    parse,
)

__all__ = [
    "approve",
    "approved_parties",
    "ends_soon",
    "file_request",
    "invite",
    "request_of",
    "revoke",
]

_INVITED_DAYS = 7
_RENEWED = timedelta(days=30)


def invite(host: HostFolder, name: str, role: Role) -> Invitation:
    """A new invitation for one name and role; it files one request within a week."""
    if name == host.config.name:
        raise InputError(f"{name} is the aggregator's own name.")
    token = secrets.token_hex(32)
    expires = (now() + timedelta(days=_INVITED_DAYS)).isoformat(timespec="seconds")
    invitation = Invitation(
        name=name,
        role=role,
        address=host.config.address,
        ca=host.ca.decode(),
        aggregator=host.aggregator,
        token=token,
        expires=expires,
    )
    host.store.invite(token, name, role, expires)
    return invitation


def file_request(host: HostFolder, data: bytes) -> JoinRequest:
    """Check a join request and keep it for a person to decide; it may come twice.

    Raises:
        InputError: malformed, without a valid token, or for a name that is taken.
        Refused: a signature is not right.
    """
    request = parse(data, JoinRequest, "the join request")
    if request.party.role == "aggregator":
        raise Refused("A join request of an aggregator.", safe="It was dropped.")
    request.verify()
    host.store.file_request(
        request.token,
        request.party.name,
        request.party.role,
        dump(request),
        request.transport_key.strip(),
    )
    return request


def request_of(row: NodeRow) -> JoinRequest:
    """The request of a node, as it was checked when it was filed."""
    return parse(row.request, JoinRequest, f"the request of {row.name}")


def approve(host: HostFolder, name: str, expected: str) -> Admission:
    """Admit a node; returns the admission for it.

    Args:
        expected: the fingerprint that the node's operator told; spaces do not count.

    Raises:
        InputError: there is no such request, or it is revoked.
        Refused: the fingerprint is another one.
    """
    row = _row(host, name)
    request = request_of(row)
    if row.status == "revoked":
        raise InputError(
            f"{name} is revoked.",
            fix=f"Forget it, then invite it anew: fedark aggregator revoke --forget {name}",
        )
    if fingerprint(request.party).replace(" ", "") != expected.replace(" ", "").lower():
        raise Refused(
            f"The fingerprint of {name}'s request is {fingerprint(request.party)}, not the one that"
            " was given.",
            safe=f"{name} was not admitted.",
            fix=(
                "Ask its operator once more; if they have another, somebody else filed this"
                " request."
            ),
        )
    root, crl = host.collateral()
    chain: tuple[bytes, ...] = ()
    if row.status == "approved" and not ends_soon(row.bundle):
        chain = tuple(
            bytes.fromhex(der) for der in parse(row.bundle, Admission, "the admission").device_chain
        )
    elif request.device_key:
        key = load_pem_public_key(request.device_key.encode())
        load_transport_public(request.device_key)
        chain = host.root().certify(key, now=now())  # type: ignore[arg-type]
    admission = Admission(
        party=request.party,
        address=host.config.address,
        ca=host.ca.decode(),
        aggregator=host.aggregator,
        root=root.hex(),
        crl=crl.hex(),
        device_chain=tuple(der.hex() for der in chain),
    ).signed(host.keys().signing)
    host.store.approve(name, dump(admission))
    return admission


def revoke(host: HostFolder, name: str) -> None:
    """Close a node out.

    Raises:
        InputError: there is none of that name.
    """
    row = _row(host, name)
    host.store.revoke(name)
    if row.bundle:
        chain = parse(row.bundle, Admission, "the admission").device_chain
        if chain:
            with host.root_alone() as root:
                root.revoke(bytes.fromhex(chain[0]), now=now())
                root.save(host.path / "platform")
                host.write_crl(root)


def approved_parties(host: HostFolder) -> dict[str, Party]:
    """Every approved node as a party, and the aggregator."""
    parties = {
        row.name: request_of(row).party for row in host.store.nodes() if row.status == "approved"
    }
    return {host.config.name: host.aggregator, **parties}


def ends_soon(admission: bytes) -> bool:
    """Whether the certificate of a node's device ends within a month: then `approve` issues a new
    one.
    """
    chain = parse(admission, Admission, "the admission").device_chain
    return (
        bool(chain)
        and x509.load_der_x509_certificate(bytes.fromhex(chain[0])).not_valid_after_utc - now()
        < _RENEWED
    )


def _row(host: HostFolder, name: str) -> NodeRow:
    row = host.store.node(name)
    if row is None:
        raise InputError(
            f"No node of the name {name} has asked to join.",
            fix="See them: fedark aggregator status",
        )
    return row
