"""Measuring an enclave: three registers over everything that its process will execute, and the list
of what that is.

The launcher measures before it starts the enclave, gives the sandbox `Measurement.visible` and
nothing else to read, and calls `check_unchanged` before it quotes: an edit after the hashing is
then either invisible to the enclave or found. The fourth register, "runconfig", is
`run_config_register` of the bytes that the enclave is started with.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from fedark.foundation.errors import InputError, Refused
from fedark.measurement import runtime
from fedark.measurement.cache import DigestCache, default_cache
from fedark.measurement.detours import detours, refuse_detours
from fedark.measurement.manifest import EnclaveManifest, enclave_dir, package_dir
from fedark.measurement.policies import reference_policies
from fedark.measurement.tree import MeasuredPath, TreeEntry, entries_of, register

__all__ = ["Measurement", "differences", "measure_enclave", "run_config_register"]


@dataclass(frozen=True)
class Measurement:
    """What an enclave of a role is, on this machine, now.

    Attributes:
        role: "trainer" or "aggregator".
        registers: "launcher", "runtime", "application" -> SHA-384, 48 bytes: a contract's reference
            values.
        entries: register -> what went into it, sorted.
        entry_point: the script to run.
        python: the interpreter to run it with; start it with `-I -S -B -X pycache_prefix=FOLDER`,
            or poisoned bytecode in the measured folders would be executed.
        search_path: `sys.path` of the enclave: standard library, its extension modules, site
            folders, fedark's parent. Modules are found by listing these folders, so a sandbox must
            let them be listed.
        visible: files and whole folders that were measured, without a symlink on the way: all that
            the enclave may read.
        libraries: system libraries and the loader, where the loader looks for them; possibly links
            to files in `visible`.
        detours: files that must not exist as long as the enclave loads: they would put unmeasured
            code into it.
    """

    role: str
    registers: Mapping[str, bytes]
    entries: Mapping[str, tuple[TreeEntry, ...]] = field(repr=False)
    entry_point: Path
    python: Path
    search_path: tuple[Path, ...] = field(repr=False)
    visible: tuple[Path, ...] = field(repr=False)
    libraries: tuple[Path, ...] = field(repr=False)
    detours: tuple[Path, ...] = field(repr=False)

    def check_no_detours(self) -> None:
        """Look again for files that would lead the interpreter past what was measured.

        Raises:
            Refused: there is one; names it.
        """
        refuse_detours(self.detours)

    def check_unchanged(self) -> None:
        """Measure again.

        Raises:
            Refused: a file of the enclave was changed, added or removed meanwhile; names up to
                five.
        """
        again = measure_enclave(self.role)
        if dict(again.registers) != dict(self.registers):
            changes = differences(self.to_json(), again.to_json())
            raise Refused(
                f"The {self.role} enclave's files changed after it was measured:"
                f" {'; '.join(changes[:5])}.",
                safe="No evidence was made for it.",
                fix="Start it again.",
            )

    def to_json(self) -> dict[str, Any]:
        """Registers and their inputs, for people and for `differences`."""
        return {
            "role": self.role,
            "registers": {name: value.hex() for name, value in self.registers.items()},
            "policies": {
                mode: policies.model_dump(mode="json")
                for mode, policies in reference_policies().items()
            },
            "files": {
                name: {
                    entry.label: [entry.kind, entry.executable, entry.digest.hex()]
                    for entry in entries
                }
                for name, entries in self.entries.items()
            },
        }


def measure_enclave(role: str, *, cached: bool = True) -> Measurement:
    """Measure the enclave of `role` that this process's fedark would start.

    Args:
        cached: believe the user's own cache for files that did not change; False reads everything.

    Raises:
        InputError: a part of it is missing, unreadable, or of a kind that cannot be measured.
        Refused: a file changed meanwhile, or one is there that would put unmeasured code into the
            enclave.
    """
    folder = enclave_dir(role)
    manifest = EnclaveManifest.load(folder / "enclave.toml")
    if manifest.role != role:
        raise InputError(f"{folder / 'enclave.toml'} is the manifest of role {manifest.role!r}.")
    digests = DigestCache(default_cache() if cached else None)
    package = package_dir()

    application = [
        *(
            MeasuredPath(str(path), f"fedark/{path.name}")
            for path in sorted(package.iterdir())
            if path.name not in ("__pycache__", *manifest.application.exclude)
        ),
        MeasuredPath(str(folder.resolve()), "enclave"),
    ]
    launcher = [
        MeasuredPath(str(package / part), f"fedark/{part}") for part in manifest.launcher.paths
    ]
    needed, others = runtime.distributions(manifest.runtime.distributions)
    library, paths = runtime.stdlib_roots(manifest.runtime.stdlib_exclude)
    python = runtime.python_binary()
    elsewhere = detours(python, paths[0])
    refuse_detours(elsewhere)
    ground = [
        MeasuredPath(str(python), "python"),
        *library,
        *runtime.distribution_roots(needed, others, manifest.runtime.exclude),
    ]

    entries = {
        "launcher": entries_of(launcher, digests),
        "application": entries_of(application, digests),
    }
    base = entries_of(ground, digests)
    try:
        system = runtime.library_entries(
            [*base, *entries["application"]], manifest.runtime.libraries, digests
        )
    except OSError as error:
        raise InputError(f"{error.filename} cannot be measured: {error.strerror}.") from None
    entries["runtime"] = sorted([*base, *system], key=attrgetter("label"))
    digests.save()

    entry_point = folder.resolve() / manifest.entry
    if not entry_point.is_file():
        raise InputError(f"{entry_point}, the entry point of the {role} enclave, is missing.")
    outside = {entry.outside for part in entries.values() for entry in part if entry.outside}
    libraries = {os.path.realpath(entry.path) for entry in system}
    sites = dict.fromkeys(Path(item.site) for item in needed)
    return Measurement(
        role=role,
        registers={
            name: register(name, entries[name]) for name in ("launcher", "runtime", "application")
        },
        entries={name: tuple(part) for name, part in entries.items()},
        entry_point=entry_point,
        python=python,
        search_path=tuple(dict.fromkeys([*paths, *sites, package.parent])),
        visible=tuple(
            Path(path)
            for path in sorted(
                {root.path for root in (*application, *ground)} | outside | libraries
            )
        ),
        libraries=tuple(Path(entry.path) for entry in system),
        detours=elsewhere,
    )


def run_config_register(run_config: bytes) -> bytes:
    """The register "runconfig": SHA-384 of the run configuration as it is handed to the enclave, 48
    bytes.
    """
    return hashlib.sha384(run_config).digest()


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs from `one` to `other`, both from `Measurement.to_json`: one line for each file,
    none if all is equal.
    """
    lines = []
    for name in sorted(one["files"].keys() | other["files"].keys()):
        before, after = one["files"].get(name, {}), other["files"].get(name, {})
        for label in sorted(before.keys() | after.keys()):
            if label not in after:
                lines.append(f"{name}: {label} was removed")
            elif label not in before:
                lines.append(f"{name}: {label} was added")
            elif before[label] != after[label]:
                lines.append(f"{name}: {label} {_change(before[label], after[label])}")
    return lines


def _change(before: list[Any], after: list[Any]) -> str:
    if before[0] != after[0]:
        return f"is now a {'file' if after[0] == 'f' else 'link'}"
    if before[2] != after[2]:
        return "has other content" if after[0] == "f" else "leads elsewhere"
    return "became executable" if after[1] else "is no longer executable"
