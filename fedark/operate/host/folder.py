"""The host's folder.

state.json       version of all this
host.toml        name, where the front listens, the address that nodes use, limits
host.sqlite      nodes, invitations, offers, jobs (`store`)
keys/            authority, server certificate, executor's secret (`fedark.links.flower.provision`)
platform/        the simulated platform's root, if the host is its manufacturer
party/           the aggregator's own party folder (`fedark.operate.party`)
catalogue/       sealed bundles on their way to customers
supervisor/      SuperLink's database, logs, sockets; made by `up`
"""

from __future__ import annotations

import fcntl
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.contract.contract import Party, now
from fedark.foundation.errors import ContractError, InputError
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import HYBRID, HpkeKey, Kem, PartyKeys
from fedark.foundation.terms import Name, Terms, explain, to_tuples
from fedark.links.flower.provision import Provisioned, provision
from fedark.operate.host.store import HostStore
from fedark.operate.joining import Address
from fedark.operate.party import COLLATERAL, KEYS, PartyConfig, collateral_of, write_party
from fedark.operate.state import open_state, write_state
from fedark.sandbox.confine import Mode
from fedark.stages.roster import read_roster

__all__ = ["HostConfig", "HostFolder", "init_host"]

CONFIG, DATABASE, KEY_FOLDER, PLATFORM, PARTY, CATALOGUE, SUPERVISOR = (
    "host.toml",
    "host.sqlite",
    "keys",
    "platform",
    "party",
    "catalogue",
    "supervisor",
)
_CRL_RENEWED = timedelta(days=10)


class HostConfig(Terms):
    """`host.toml`.

    Attributes:
        listen: host:port of the front.
        address: host:port that nodes connect to: that of the front, or of what stands before it.
        certificate, key, ca: PEM files of the front's certificate, relative to the folder.
        metrics: port on loopback for Prometheus; 0 for none.
        catalogue_bytes: how much sealed bundles may take.
    """

    version: Literal[1] = 1
    name: Name
    listen: Address
    address: Address
    certificate: str = f"{KEY_FOLDER}/server.pem"
    key: str = f"{KEY_FOLDER}/server.key"
    ca: str = f"{KEY_FOLDER}/ca.pem"
    metrics: Annotated[int, Field(ge=0, le=65535)] = 0
    catalogue_bytes: Annotated[int, Field(ge=0)] = 64 << 30


@dataclass(frozen=True)
class HostFolder:
    """An opened host folder."""

    path: Path
    config: HostConfig
    store: HostStore

    @classmethod
    def open(cls, path: Path) -> HostFolder:
        """Open what `init_host` made.

        Raises:
            InputError: it is no host's folder, or of another version.
            ContractError: `host.toml` is wrong, with every problem.
        """
        open_state(path, "host")
        return cls(path.resolve(), _read_config(path / CONFIG), HostStore(path / DATABASE))

    @property
    def party_folder(self) -> Path:
        return self.path / PARTY

    @property
    def catalogue(self) -> Path:
        return self.path / CATALOGUE

    @property
    def supervisor(self) -> Path:
        return self.path / SUPERVISOR

    @property
    def aggregator(self) -> Party:
        """The aggregator's public keys."""
        return read_roster(self.party_folder)[self.config.name]

    @property
    def ca(self) -> bytes:
        """PEM of the authority that nodes trust for this host's front."""
        return _read(self.path / self.config.ca)

    def keys(self) -> PartyKeys:
        """The aggregator's own keys."""
        return PartyKeys.load(self.party_folder / KEYS)

    def provisioned(self) -> Provisioned:
        """Keys and certificates of the SuperLink, which listens on loopback."""
        return provision(self.path / KEY_FOLDER)

    def root(self) -> SimulatedRoot:
        """The simulated platform's root, as its manufacturer.

        Raises:
            InputError: this host is not the manufacturer.
        """
        return SimulatedRoot.load(self.path / PLATFORM)

    @contextmanager
    def root_alone(self) -> Iterator[SimulatedRoot]:
        """The root, for whoever changes it or lists what it has revoked: one at a time, or one
        would undo the other.
        """
        self.root()  # or say that there is none
        descriptor = os.open(self.path / PLATFORM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield self.root()
        finally:
            os.close(descriptor)

    def write_crl(self, root: SimulatedRoot) -> bytes:
        """A fresh revocation list, kept for nodes and for the aggregator's own use; returns it
        (DER).
        """
        crl = root.crl(now=now())
        write_atomic(self.party_folder / COLLATERAL / SIMULATED_CRL, crl)
        return crl

    def collateral(self) -> tuple[bytes, bytes]:
        """Root certificate and revocation list (DER) that nodes are given; the list is made anew
        before it grows old.
        """
        found = collateral_of(self.party_folder)
        crl = found.get(SIMULATED_CRL, b"")
        written = (self.party_folder / COLLATERAL / SIMULATED_CRL).stat().st_mtime
        if (
            now().timestamp() - written > _CRL_RENEWED.total_seconds()
            and (self.path / PLATFORM).is_dir()
        ):
            with self.root_alone() as root:
                crl = self.write_crl(root)
        return found[SIMULATED_ROOT], crl


def init_host(
    path: Path,
    *,
    name: str,
    listen: str,
    address: str,
    sandbox: Mode,
    certificate: Path | None = None,
    key: Path | None = None,
    ca: Path | None = None,
    metrics: int = 0,
    kem: Kem = HYBRID,
) -> HostFolder:
    """Make a host's folder: keys, an authority with the front's certificate (or those that are
    given), a simulated platform.

    Args:
        listen: host:port of the front.
        address: host:port that nodes use; its host part goes into the certificate.
        sandbox: weakest mode for the aggregator's enclave.
        certificate, key: PEM files of an own certificate for the front.
        ca: PEM of the authority that nodes shall trust: of that certificate, or of a reverse
            proxy's that stands before the front.
        kem: of the aggregator's keys.

    Raises:
        InputError: the folder is not empty, or a certificate came without key or authority; nothing
            was changed.
        ContractError: a value is wrong, with every problem.
    """
    if (certificate is None) != (key is None) or (certificate is not None and ca is None):
        raise InputError(
            "An own certificate needs --certificate, --key and --ca together.",
            safe="Nothing was made.",
        )
    if path.exists() and any(path.iterdir()):
        raise InputError(
            f"{path} is not empty.", safe="It was left as it is.", fix="Name another folder."
        )
    values: dict[str, Any] = {
        "name": name,
        "listen": listen,
        "address": address,
        "metrics": metrics,
    }
    for option, file in (("certificate", certificate), ("key", key), ("ca", ca)):
        if file is not None:
            _read(file)
            values[option] = str(file.resolve())
    config = _config(values, "the options")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    provision(path / KEY_FOLDER, [host_of(address)])
    begun = now()
    root = SimulatedRoot(now=begun)
    root.save(path / PLATFORM)
    (path / PLATFORM).chmod(0o700)
    keys = PartyKeys(hpke=HpkeKey(kem=kem))
    own = Party(
        name=name,
        role="aggregator",
        signing_key=keys.signing.public.hex(),
        hpke_key=keys.hpke.public.hex(),
    )
    write_party(
        path / PARTY,
        PartyConfig(name=name, role="aggregator", catalogue=f"../{CATALOGUE}", sandbox=sandbox),
        keys=keys,
        roster=[own],
        collateral={SIMULATED_ROOT: root.certificate, SIMULATED_CRL: root.crl(now=begun)},
        device=root.issue(now=begun),
    )
    (path / CATALOGUE).mkdir(mode=0o700)
    store = HostStore(path / DATABASE, create=True)
    write_atomic(path / CONFIG, tomli_w.dumps(config.model_dump()).encode())
    write_state(path, "host")  # last: a folder that was made in part is no host's folder
    return HostFolder(path.resolve(), config, store)


LOOPBACK = ("127.0.0.1", "::1", "localhost")


def host_of(address: str) -> str:
    """The host part of host:port, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def port_of(address: str) -> int:
    """The port of host:port."""
    return int(address.rpartition(":")[2])


def _read_config(path: Path) -> HostConfig:
    try:
        value = tomllib.loads(_read(path).decode())
    except ValueError as error:
        raise ContractError(str(path), [str(error)]) from None
    return _config(value, str(path))


def _config(value: dict[str, Any], source: str) -> HostConfig:
    try:
        config = HostConfig.model_validate(to_tuples(value))
    except ValidationError as error:
        raise ContractError(source, explain(error)) from None
    wrong = [
        f"{name}: the port is over 65535"
        for name in ("listen", "address")
        if port_of(getattr(config, name)) > 65535
    ]
    if wrong:
        raise ContractError(source, wrong)
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
