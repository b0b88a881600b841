"""`fedark node doctor`: what of this machine and folder would keep the node from working, and how
to mend each.

Every check is made, whatever the others find. Nothing is changed, no key is used but the transport
key (to ask the host for its time and for this node's standing), and no record is shown: a data file
that does not fit is named by file and line.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from cryptography import x509

from fedark.attestation.trust import SIMULATED_CRL
from fedark.contract.contract import now
from fedark.foundation.errors import FedarkError, SandboxUnavailable
from fedark.foundation.files import os_problem
from fedark.links.flower.service import NodeClient
from fedark.operate.node.folder import NodeFolder
from fedark.operate.node.hostclient import HostClient
from fedark.operate.party import COLLATERAL, DEVICE, KEYS, WEIGHT_KEYS
from fedark.operate.state import socket_of
from fedark.sandbox import survey
from fedark.stages.consent import Consent
from fedark.stages.rules import Rules
from fedark.vault.bundle import find_bundle, own_bundles
from fedark.vault.weightkey import KeyStore

__all__ = ["Finding", "examine", "unready"]

_SOON = timedelta(days=14)
# Seconds that a node's clock may be ahead of its host's: Flower refuses its messages beyond.
_AHEAD = 5.0
_BEHIND = 60.0
_ROOM = 1 << 30
_LIST = "the platform's revocation list's"


@dataclass(frozen=True)
class Finding:
    """One check. `fix` says how to mend it, where that is not obvious from `what`."""

    check: str
    level: Literal["good", "warning", "bad"]
    what: str
    fix: str = ""


def examine(node: NodeFolder, only: tuple[str, ...] = ()) -> list[Finding]:
    """All checks of a node's folder and machine, or some."""
    checks: list[tuple[str, Callable[[NodeFolder], Iterator[Finding]]]] = [
        ("files", _files),
        ("sandbox", _sandbox),
        ("disk", _disk),
        ("data", _data),
        ("rules", _rules),
        ("host", _host),
        ("certificates", _certificates),
        ("models", _models),
        ("daemon", _daemon),
    ]
    found: list[Finding] = []
    for name, check in checks:
        if only and name not in only:
            continue
        try:
            found += check(node)
        except FedarkError as error:
            found.append(Finding(name, "bad", error.what, error.fix))
        except OSError as error:
            found.append(Finding(name, "bad", os_problem(error)))
        except ValueError as error:
            found.append(Finding(name, "bad", f"the check failed ({type(error).__name__})"))
    return found


def _files(node: NodeFolder) -> Iterator[Finding]:
    private = [node.path, node.path / KEYS, node.path / "transport.key"]
    private += [node.path / DEVICE / "device.key"] if node.config.role == "customer" else []
    open_to_others = [
        path
        for path in private
        if stat.S_IMODE(path.stat().st_mode) & 0o077 or path.stat().st_uid != os.geteuid()
    ]
    for path in open_to_others:
        mode = "700" if path.is_dir() else "600"
        yield Finding(
            "files",
            "bad",
            f"{path} is open to other users",
            f"chmod {mode} {shlex.quote(str(path))}; chown it to the node's user",
        )
    if not open_to_others:
        yield Finding("files", "good", "folder and keys are private")


def _sandbox(node: NodeFolder) -> Iterator[Finding]:
    if node.config.role == "provider":
        yield Finding("sandbox", "good", "a provider starts no enclave")
        return
    found = survey()
    kernel = (
        f"landlock ABI {found.landlock}, seccomp {'yes' if found.seccomp else 'no'}, namespaces"
        f" {found.namespaces or 'yes'}"
    )
    try:
        mode = found.mode("landlock")
    except SandboxUnavailable as error:
        yield Finding("sandbox", "bad", error.what, error.fix)
        return
    if mode == "landlock" and node.config.sandbox == "namespaces":
        yield Finding(
            "sandbox",
            "bad",
            f"this machine offers {mode}, the node's party.toml asks for namespaces ({kernel})",
            "sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000; with"
            " AppArmor also kernel.apparmor_restrict_unprivileged_userns=0; or run as root; or set"
            " sandbox = 'landlock'",
        )
    else:
        yield Finding("sandbox", "good", f"{mode} ({kernel})")


def unready(node: NodeFolder) -> list[Finding]:
    """What would keep this node from a job that begins now: its disk and its data."""
    return [
        finding for finding in examine(node, ("files", "disk", "data")) if finding.level == "bad"
    ]


def _disk(node: NodeFolder) -> Iterator[Finding]:
    free = shutil.disk_usage(node.path).free
    if free < _ROOM:
        yield Finding(
            "disk",
            "bad",
            f"{free >> 20} MiB free under {node.path}, less than {_ROOM >> 20}",
            "make room",
        )
    else:
        yield Finding("disk", "good", f"{free >> 30} GiB free")


def _data(node: NodeFolder) -> Iterator[Finding]:
    data = node.config.data
    if data is None:
        return
    for name in filter(None, (data.file, data.test)):
        path = node.path / name
        count = len(data.spec.read(path))
        yield Finding(
            "data", "good" if count else "bad", f"{path}: {count} records fit prompt and answer"
        )


def _rules(node: NodeFolder) -> Iterator[Finding]:
    rules = Rules.read(node.path)
    ended = [rule.name for rule in rules.allow if datetime.fromisoformat(rule.until) <= now()]
    if ended:
        yield Finding(
            "rules",
            "warning",
            f"rules that have ended: {', '.join(ended)}",
            "remove them, or renew `until`",
        )
    else:
        yield Finding(
            "rules",
            "good",
            f"{len(rules.allow)} standing rules; other contracts wait for the operator",
        )


def _host(node: NodeFolder) -> Iterator[Finding]:
    began = time.monotonic()
    with HostClient(node, timeout=10.0) as host:
        ahead = host.hello()
        trip = time.monotonic() - began
        yield Finding("host", "good", f"answers in {trip * 1000:.0f} ms")
        skew = -ahead
        if skew > _AHEAD + trip or skew < -_BEHIND - trip:
            way = "ahead of" if skew > 0 else "behind"
            yield Finding(
                "clock",
                "bad",
                f"this clock is {abs(skew):.0f} s {way} the host's",
                "timedatectl set-ntp true, on both machines",
            )
        else:
            yield Finding("clock", "good", f"within {abs(skew) + trip:.1f} s of the host's")
        yield _validity(
            "the host's certificate's",
            x509.load_der_x509_certificate(host.certificate).not_valid_after_utc,
        )
        if host.bundle() is None:
            yield Finding(
                "standing",
                "warning",
                "the request waits for a person at the host",
                "tell them your fingerprint",
            )
        else:
            yield Finding(
                "standing",
                "good",
                "approved" if node.joined else "approved; fedark node up installs the bundle",
            )


def _certificates(node: NodeFolder) -> Iterator[Finding]:
    ends: dict[str, datetime] = {}
    ends["the host's authority's"] = x509.load_pem_x509_certificate(
        node.ca.read_bytes()
    ).not_valid_after_utc
    if node.joined:
        crl = x509.load_der_x509_crl(
            (node.path / COLLATERAL / SIMULATED_CRL).read_bytes()
        ).next_update_utc
        if crl is not None:
            ends[_LIST] = crl
        for der_hex in node.admission.device_chain[:1]:
            ends["this device's"] = x509.load_der_x509_certificate(
                bytes.fromhex(der_hex)
            ).not_valid_after_utc
    for name, end in ends.items():
        yield _validity(name, end)


def _validity(name: str, end: datetime) -> Finding:
    left = end - now()
    if left < timedelta():
        return Finding(
            "certificates",
            "bad",
            f"{name} validity ended {end:%Y-%m-%d}",
            "fedark node up fetches new ones",
        )
    if left < _SOON and name != _LIST:
        return Finding(
            "certificates",
            "warning",
            f"{name} validity ends {end:%Y-%m-%d}",
            "the host renews it while it runs",
        )
    return Finding("certificates", "good", f"{name} validity ends {end:%Y-%m-%d}")


def _models(node: NodeFolder) -> Iterator[Finding]:
    if node.config.role == "provider":
        own = bytes.fromhex(node.request.party.signing_key)
        store = KeyStore(node.path / WEIGHT_KEYS)
        count = 0
        for bundle in own_bundles(node.catalogue, own):
            store.get(bundle.manifest)  # raises where the key is gone
            count += 1
        yield Finding("models", "good", f"{count} sealed bundles, each with its key")
        return
    consent = Consent(node.path)
    for contract in consent.proposed():
        if contract.expired(now()) or consent.decision(contract).status != "approved":
            continue
        provider = bytes.fromhex(contract.provider.signing_key)
        missing = [
            terms.name
            for terms in contract.models
            if find_bundle(node.catalogue, terms.bundle, provider) is None
        ]
        if missing:
            yield Finding(
                "models",
                "warning",
                f"job {contract.job}: the bundles of {', '.join(missing)} are not here yet",
                "fedark node up fetches them from the host, or name another place in bundle_sources"
                " of party.toml",
            )
        else:
            yield Finding("models", "good", f"job {contract.job}: every sealed bundle is here")


def _daemon(node: NodeFolder) -> Iterator[Finding]:
    try:
        with NodeClient(socket_of(node.path)) as client:
            status = client.status()
    except FedarkError:
        yield Finding(
            "daemon",
            "warning",
            "the node does not run",
            f"fedark node up {shlex.quote(str(node.path))}",
        )
    else:
        doing = f"stage {status.stage}" if status.stage else "waits"
        yield Finding("daemon", "good", f"runs ({doing})")
