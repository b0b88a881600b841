"""The manifest of an enclave, `enclave.toml`: its entry point, and what counts as part of it.

    role = "trainer"
    entry = "main.py"              # beside the manifest
    python = ">=3.11"              # a version specifier (PEP 440)

    [application]                  # register "application": the package fedark, and this folder
    exclude = ["_enclaves"]        # names at the top of the package
    [launcher]                     # register "launcher": what measures, confines and quotes
    paths = ["enclave", "errors.py"]
    [runtime]                      # register "runtime": Python, its library, what is installed
    distributions = ["numpy"]      # with all that they require
    exclude = ["torch/include"]    # folders of theirs that no enclave reads
    stdlib_exclude = ["test"]      # names or patterns at the top of the standard library
    libraries = ["libgcc_s.so.1"]  # system libraries that are opened by name and linked by nobody

The folder with the manifest is itself measured, so nobody widens what counts without changing a
register.
"""

from __future__ import annotations

import platform
import tomllib
from pathlib import Path
from typing import Annotated, Self

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import Field, ValidationError, field_validator

import fedark
from fedark.attestation.binding import ROLES
from fedark.foundation.errors import ContractError, InputError, printable
from fedark.foundation.terms import Terms, explain

__all__ = ["MANIFEST", "EnclaveManifest", "enclave_dir", "package_dir"]

MANIFEST = "enclave.toml"
_MAX_MANIFEST = 64 << 10
RelativePath = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$")
]


class ApplicationPart(Terms):
    """What of the package is not the application."""

    exclude: tuple[RelativePath, ...] = ()


class LauncherPart(Terms):
    """What of the package the launcher runs."""

    paths: Annotated[tuple[RelativePath, ...], Field(min_length=1)]


class RuntimePart(Terms):
    """What the enclave runs on."""

    distributions: Annotated[tuple[str, ...], Field(min_length=1)]
    exclude: tuple[RelativePath, ...] = ()
    stdlib_exclude: tuple[str, ...] = ()
    libraries: tuple[RelativePath, ...] = ()


class EnclaveManifest(Terms):
    """A valid `enclave.toml`."""

    role: str
    entry: RelativePath
    python: str
    application: ApplicationPart
    launcher: LauncherPart
    runtime: RuntimePart

    @field_validator("role")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in ROLES:
            raise ValueError(f"is not one of {', '.join(ROLES)}")
        return value

    @field_validator("python")
    @classmethod
    def _fits(cls, value: str) -> str:
        try:
            fits = SpecifierSet(value).contains(platform.python_version(), prereleases=True)
        except InvalidSpecifier:
            raise ValueError("is not a version specifier") from None
        if not fits:
            raise ValueError(f"asks for {value}, this is Python {platform.python_version()}")
        return value

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a manifest.

        Raises:
            InputError: it cannot be read.
            ContractError: with every problem in it.
        """
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_MANIFEST + 1)
            if len(text) > _MAX_MANIFEST:
                raise InputError(f"{path} is larger than {_MAX_MANIFEST} bytes.")
            value = tomllib.loads(text.decode("utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise InputError(f"{path} is not TOML: {printable(str(error))}.") from None
        try:
            return cls.model_validate(_tuples(value))
        except ValidationError as error:
            raise ContractError(str(path), explain(error)) from None


def package_dir() -> Path:
    """The folder of the package fedark that this process runs, symlinks resolved."""
    return Path(fedark.__file__).resolve().parent


def enclave_dir(role: str) -> Path:
    """The folder with the manifest of `role`: inside an installed package, or beside the package in
    a checkout.

    Raises:
        InputError: there is no such enclave.
    """
    if role in ROLES:
        package = package_dir()
        for folder in (package / "_enclaves" / role, package.parent / "enclaves" / role):
            if (folder / MANIFEST).is_file():
                return folder
    raise InputError(
        f"There is no enclave {printable(role)!r}.", fix=f"The roles are {' and '.join(ROLES)}."
    )


def _tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
