"""A node's client that calls the host's service in this process, with the same signed headers; and
nodes that have joined.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedark.contract.contract import Contract, fingerprint
from fedark.contract.job import DataSpec
from fedark.operate.host.admission import approve, file_request, invite
from fedark.operate.host.folder import HostFolder, init_host
from fedark.operate.host.service import HostService
from fedark.operate.joining import dump, request_headers
from fedark.operate.node.folder import NodeFolder, begin_join
from fedark.operate.node.hostclient import HostClient, _refusal
from fedark.operate.party import DataConfig

Passing = Callable[[str, str, dict[str, str], bytes], tuple[str, str, dict[str, str], bytes]]


def make_host(folder: Path) -> HostFolder:
    return init_host(
        folder,
        name="pool",
        listen="127.0.0.1:8443",
        address="pool.example:8443",
        sandbox="landlock",
    )


def make_node(
    host: HostFolder, folder: Path, name: str, role: str, data: Path | None = None
) -> NodeFolder:
    """A node that has made its request."""
    config = None
    if role == "customer":
        records = data or folder.parent / f"{name}.csv"
        if data is None:
            records.write_text("desk,message,action\nnorth,open line,open\nnorth,close bus,close\n")
        config = DataConfig(
            file=str(records), spec=DataSpec(prompt="{desk}: {message}", answer="action")
        )
    return begin_join(
        folder, invite(host, name, role), data=config, sandbox="landlock", minimum_cohort=2
    )  # type: ignore[arg-type]


def admitted(
    host: HostFolder, folder: Path, name: str, role: str, data: Path | None = None
) -> NodeFolder:
    """A node that was approved and has installed its bundle."""
    node = make_node(host, folder, name, role, data)
    file_request(host, (node.path / "request.json").read_bytes())
    node.install(dump(approve(host, name, fingerprint(node.request.party))))
    return node


class DirectClient(HostClient):
    """`service`: whom it calls; `passing`: may alter what passes."""

    service: HostService
    passing: Passing | None = None

    def _call_or_none(self, method: str, path: str, body: bytes = b"") -> bytes | None:
        target = f"/v1/fedark/{path}"
        sent = (method, target, request_headers(self._key, self._name, method, target, body), body)
        if type(self).passing is not None:
            sent = type(self).passing(*sent)
        answer = self.service.handle(*sent)
        if answer.status == 404:
            return None
        if answer.status >= 300:
            raise _refusal(answer.status, answer.body)
        return answer.body


def client_of(host: HostFolder) -> type[DirectClient]:
    return type("Client", (DirectClient,), {"service": HostService(host)})


def proposed(host: HostFolder, contract: Contract) -> Contract:
    names = [party.name for party in contract.parties]
    host.store.propose(contract.digest().hex(), contract.job, contract.encode(), names)
    return contract
