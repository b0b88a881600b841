"""The constant bundle: its hash, its emptiness, and that nothing else passes for it."""

from __future__ import annotations

import hashlib
import io
import tomllib
import zipfile
from importlib import import_module

import pytest
from flwr.cli.build import build_fab_from_files

from fedark.foundation.errors import Refused
from fedark.links.flower import bundle


def test_the_bundle_has_the_pinned_hash() -> None:
    assert hashlib.sha256(bundle.build()).hexdigest() == bundle.PINNED_SHA256


def test_the_bundle_is_what_flowers_own_builder_makes_of_the_same_file() -> None:
    assert build_fab_from_files({"pyproject.toml": bundle.PYPROJECT.encode()})[0] == bundle.build()


def test_the_bundle_holds_no_code_and_its_components_are_in_the_installed_package() -> None:
    archive = zipfile.ZipFile(io.BytesIO(bundle.build()))
    assert set(archive.namelist()) == {"pyproject.toml", ".info/CONTENT"}
    components = tomllib.loads(archive.read("pyproject.toml").decode())["tool"]["flwr"]["app"][
        "components"
    ]
    for kind in ("serverapp", "clientapp"):
        module, _, name = components[kind].partition(":")
        assert module.startswith("fedark.links.flower.")
        assert hasattr(import_module(module), name)


@pytest.mark.parametrize(
    "change",
    [lambda b: b + b"\0", lambda b: b[:-1], lambda b: b"", lambda b: bytes([b[0] ^ 1]) + b[1:]],
)
def test_any_other_bytes_are_refused(change) -> None:
    with pytest.raises(Refused, match="not fedark's"):
        bundle.require_pinned(change(bundle.build()))
