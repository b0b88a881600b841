"""A party's folder: what a node of this machine is made from.

party.toml      name, role, where its records are, what it accepts
party.keys      its long-lived keys (mode 0600)
roster.json     the public keys of every party that it deals with, got by a trusted way
device/         the simulated platform's quoting key and certificate (customers and aggregator)
former-keys.jsonl  keys that other parties had before
collateral/     simulated.root and simulated.crl: the platform root that it trusts; hardware
                vendors' statements
policy.toml     its own appraisal policy, if it has one (`fedark.attestation.appraisal`)
weight-keys/    the provider's keys, one for each sealed bundle
runs/ID/        what a run left: adapters, reports
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import Field, ValidationError

from fedark.attestation.appraisal import AppraisalPolicy
from fedark.attestation.guest import Guest
from fedark.attestation.platforms.base import EnclavePlatform
from fedark.attestation.platforms.nitro import NitroAttester
from fedark.attestation.platforms.sev_snp import SevSnpAttester
from fedark.attestation.platforms.simulated import SimulatedDevice
from fedark.attestation.platforms.tdx import TdxAttester
from fedark.contract.contract import Contract, Party, now
from fedark.contract.job import DataSpec
from fedark.foundation.errors import ContractError, InputError
from fedark.foundation.files import write_atomic
from fedark.foundation.keys import HYBRID, Kem, PartyKeys
from fedark.foundation.terms import Finite, Name, Terms, explain, to_tuples
from fedark.measurement import measure_enclave
from fedark.privacy.accounting import Budget
from fedark.stages.aggregator import AggregatorHost
from fedark.stages.customer import CustomerNode
from fedark.stages.loading import CustomerData
from fedark.stages.node import Node
from fedark.stages.provider import ProviderNode
from fedark.stages.roster import FileBacked, read_roster, write_roster
from fedark.stages.settings import EnclaveFactory, NodeSettings
from fedark.vault.bundle import own_bundles
from fedark.vault.weightkey import KeyStore, WeightKey

__all__ = [
    "DEVICE",
    "KEYS",
    "BudgetConfig",
    "DataConfig",
    "PartyConfig",
    "collateral_of",
    "load_aggregator",
    "load_machine",
    "load_node",
    "reference_values",
    "write_party",
]

POLICY = "policy.toml"
CONFIG, KEYS, DEVICE, COLLATERAL, WEIGHT_KEYS = (
    "party.toml",
    "party.keys",
    "device",
    "collateral",
    "weight-keys",
)


class DataConfig(Terms):
    """A customer's records; paths are relative to the party's folder.

    Attributes:
        template: for files that hold finished prompts in one column: the template that these were
            made by, which is compared with the contract's; else `spec.prompt` is.
    """

    file: str
    test: str = ""
    template: str = ""
    spec: DataSpec


class BudgetConfig(Terms):
    """A privacy budget, see `fedark.privacy.accounting.Budget`."""

    epsilon: Annotated[Finite, Field(gt=0)] = 8.0
    delta: Annotated[Finite, Field(gt=0, lt=0.1)] = 1e-5


class PartyConfig(Terms):
    """`party.toml`.

    Attributes:
        catalogue: folder of sealed bundles, relative to the party's folder.
        platforms, sandbox, minimum_cohort, kem: what this party accepts in a contract.
        machine: what its enclaves run on.
        data: a customer's records.
        budget: the most that a customer's records may ever spend on all jobs under a privacy
            mechanism.
        proxy: the HTTP proxy on the way to the host, such as "http://proxy:3128"; "" for that of
            the environment, if there is one.
        bundle_sources: where sealed bundles may be fetched besides the host: folders, and https://
            addresses (`fedark.operate.node.sources`).
        personal_key: the public half (hex) of a key that its enclave seals personal adapters to,
            made by `fedark node personal-key`; "" to have them as PEFT folders at once.
    """

    version: Literal[1] = 1
    name: Name
    role: Literal["provider", "customer", "aggregator"]
    catalogue: str
    platforms: tuple[str, ...] = ("simulated",)
    sandbox: Literal["namespaces", "landlock", "none"] = "landlock"
    minimum_cohort: Annotated[int, Field(ge=2)] = 3
    kem: Annotated[tuple[Kem, ...], Field(min_length=1)] = (HYBRID,)
    machine: Literal["simulated", "nitro", "sev-snp", "tdx"] = "simulated"
    data: DataConfig | None = None
    budget: BudgetConfig = BudgetConfig()
    proxy: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    bundle_sources: tuple[str, ...] = ()
    personal_key: Annotated[str, Field(pattern=r"^([0-9a-f]{2432}|[0-9a-f]{64})?$")] = ""

    @classmethod
    def read(cls, folder: Path) -> PartyConfig:
        """Read a party's configuration.

        Raises:
            InputError: it is missing.
            ContractError: with every problem.
        """
        path = folder / CONFIG
        try:
            value = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(to_tuples(value))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise ContractError(str(path), explain(error)) from None
        except ValueError as error:
            raise ContractError(str(path), [str(error)]) from None

    def write(self, folder: Path) -> None:
        """Write it as `party.toml` of this folder."""
        values = {
            key: value for key, value in self.model_dump(mode="json").items() if value is not None
        }
        write_atomic(folder / CONFIG, tomli_w.dumps(values).encode())


def write_party(
    folder: Path,
    config: PartyConfig,
    *,
    keys: PartyKeys | None,
    roster: Iterable[Party],
    collateral: Mapping[str, bytes],
    device: SimulatedDevice | None = None,
) -> None:
    """Write a party's folder.

    Args:
        keys: of a new party; None where the folder has keys, and keeps them.

    Raises:
        InputError: it has keys, or a device, already.
        StorageError: it cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if keys is not None:
        keys.save(folder / KEYS)
    config.write(folder)
    write_roster(folder, roster)
    for name, data in collateral.items():
        write_atomic(folder / COLLATERAL / name, data)
    if device is not None:
        device.save(folder / DEVICE)


def collateral_of(folder: Path) -> dict[str, bytes]:
    """The platform roots, CRLs and vendors' statements that this party holds, by file name; see
    `fedark.attestation.trust`.
    """
    return {
        path.name: path.read_bytes()
        for path in sorted((folder / COLLATERAL).glob("*"))
        if path.is_file()
    }


def reference_values() -> dict[str, Mapping[str, bytes]]:
    """What this installation's enclaves measure: role -> register -> SHA-384."""
    return {role: measure_enclave(role).registers for role in ("trainer", "aggregator")}


def load_machine(folder: Path) -> EnclavePlatform:
    """What the enclaves of the party run on whose folder this is.

    Raises:
        InputError, ContractError: its configuration, or its simulated device, is missing or
        malformed.
    """
    match PartyConfig.read(folder).machine:
        case "nitro":
            return Guest(NitroAttester())
        case "sev-snp":
            return Guest(SevSnpAttester())
        case "tdx":
            return Guest(TdxAttester())
    return SimulatedDevice.load(folder / DEVICE)


def load_node(
    folder: Path,
    start_enclave: EnclaveFactory | None,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    reference: Mapping[str, Mapping[str, bytes]] | None = None,
    provider: type[ProviderNode] = ProviderNode,
) -> Node:
    """The node of the provider or customer whose folder this is.

    Args:
        start_enclave: a customer's way to start its trainer enclave.
        reference: `reference_values()`, if they were measured just now.
        provider: what a provider's folder is loaded as.

    Raises:
        InputError, ContractError: something of the folder is missing or malformed.
    """
    config = PartyConfig.read(folder)
    settings = NodeSettings(
        party=config.name,
        keys=PartyKeys.load(folder / KEYS),
        roster=FileBacked(lambda: read_roster(folder)),
        state=folder,
        catalogue=(folder / config.catalogue).resolve(),
        reference=reference or reference_values(),
        collateral=FileBacked(lambda: collateral_of(folder)),
        platforms=config.platforms,
        sandbox=config.sandbox,
        minimum_cohort=config.minimum_cohort,
        personal_key=bytes.fromhex(config.personal_key),
        budget=Budget(config.budget.epsilon, config.budget.delta),
        kem=config.kem,
        own=(
            AppraisalPolicy.read(folder / POLICY, now=now()) if (folder / POLICY).exists() else None
        ),
        start_enclave=start_enclave,
        on_progress=on_progress,
    )
    if config.role == "customer":
        if config.data is None:
            raise ContractError(str(folder / CONFIG), ["data: missing, a customer has records"])
        test = folder / config.data.test if config.data.test else None
        return CustomerNode(
            settings,
            CustomerData(
                folder / config.data.file,
                test,
                config.data.spec,
                config.data.template or config.data.spec.prompt,
            ),
        )
    if config.role == "provider":
        return provider(settings, FileBacked(lambda: _weight_keys(settings)))
    raise InputError(f"{folder} is an aggregator's folder, not a node's.")


def _weight_keys(settings: NodeSettings) -> dict[str, WeightKey]:
    """Of every bundle that this provider has sealed, also since the node was started."""
    store = KeyStore(settings.state / WEIGHT_KEYS)
    mine = own_bundles(settings.catalogue, settings.keys.signing.public)
    return {bundle.manifest.digest().hex(): store.get(bundle.manifest) for bundle in mine}


def load_aggregator(
    folder: Path,
    contract: Contract,
    start_enclave: EnclaveFactory,
    on_progress: Callable[[str], None] = lambda text: None,
) -> AggregatorHost:
    """The aggregator's host, with one job to run."""
    PartyConfig.read(folder)
    signing = PartyKeys.load(folder / KEYS).signing
    return AggregatorHost(
        contract, folder, collateral_of(folder), signing, start_enclave, on_progress=on_progress
    )
