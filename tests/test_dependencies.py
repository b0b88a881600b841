"""What is imported is declared, what is declared is locked, and what an enclave measures is locked
whole.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fedark.measurement import runtime
from fedark.measurement.manifest import EnclaveManifest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(*names: str) -> dict[str, Version]:
    """Name -> version of the files below requirements/; every entry must carry a digest."""
    found: dict[str, Version] = {}
    for name in names:
        text = (ROOT / "requirements" / name).read_text()
        for line in text.replace("\\\n", " ").splitlines():
            if line and not line.startswith("#"):
                match = re.fullmatch(
                    r"([a-z0-9.-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+) *", line
                )
                assert match is not None, line[:80]
                assert match[1] not in found, f"{match[1]} is locked twice"
                found[match[1]] = Version(match[2])
    return found


RUN, DEV, TORCH = locked("run.txt"), locked("dev.txt"), locked("torch.txt")


def declared(*extras: str) -> dict[str, Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(item.name): item for item in map(Requirement, texts)}


def imported(folder: Path) -> dict[str, set[str]]:
    """Third-party top-level module -> the files that import it."""
    own = {"fedark", *(path.stem for path in folder.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = "google.protobuf" if name.startswith("google.") else name.split(".")[0]
                if top not in sys.stdlib_module_names and (top == name or top not in own):
                    found.setdefault(top, set()).add(str(path.relative_to(ROOT)))
    found.pop("fedark", None)
    return found


@pytest.mark.parametrize("folder", ["fedark", "enclaves", "examples"])
def test_every_third_party_import_is_declared(folder: str) -> None:
    owners = packages_distributions() | {"google.protobuf": ["protobuf"]}
    allowed = declared("arrow").keys()
    missing = {}
    for module, files in imported(ROOT / folder).items():
        of_example = folder == "examples" and list((ROOT / folder).rglob(f"{module}.py"))
        if not of_example and not {canonicalize_name(o) for o in owners.get(module, [])} & allowed:
            missing[module] = sorted(files)
    assert not missing


def test_the_search_for_imports_finds_them() -> None:
    """A search that finds nothing would find nothing missing."""
    found = imported(ROOT / "fedark")
    assert {"cryptography", "flwr", "google.protobuf", "pyarrow", "torch", "rich"} <= found.keys()
    assert "fedark" not in found


@pytest.mark.parametrize("role", ["trainer", "aggregator"])
def test_every_distribution_that_an_enclave_measures_is_locked_at_the_installed_version(
    role: str,
) -> None:
    described = EnclaveManifest.load(ROOT / "enclaves" / role / "enclave.toml")
    needed, _ = runtime.distributions(described.runtime.distributions)
    assert needed
    lock = RUN | TORCH
    wrong = {
        item.name: (item.version, lock.get(item.name))
        for item in needed
        if lock.get(item.name) not in (Version(item.version), Version(Version(item.version).public))
    }
    assert not wrong, f"installed beside locked: {wrong}; `make` installs the lock"


def test_the_locks_answer_to_what_is_declared() -> None:
    """What `make lock` would resolve again: stale locks fail here, without asking an index."""
    for name, item in declared("dev", "docs", "arrow").items():
        version = (RUN | DEV | TORCH).get(name)
        assert version is not None, f"{name} is not locked: run `make lock`"
        assert item.specifier.contains(version), f"{item} is locked at {version}: run `make lock`"
    assert declared().keys() <= (RUN | TORCH).keys()
    assert not RUN.keys() & DEV.keys()


@pytest.mark.parametrize("lock", ["run", "dev"])
def test_a_lock_is_whole(lock: str) -> None:
    """pip installs it without looking at what its packages require, so all of that is in it."""
    below = RUN | TORCH | (DEV if lock == "dev" else {})
    missing = set()
    for name in below:
        for text in distribution(name).requires or ():
            item = Requirement(text)
            if item.marker is None or item.marker.evaluate({"extra": ""}):
                needed = canonicalize_name(item.name)
                if needed not in below:
                    missing.add((name, needed))
    assert not missing


def test_torch_is_locked_in_both_builds() -> None:
    text = (ROOT / "requirements" / "torch.txt").read_text()
    assert {"torch": Version("2.13.0")} == TORCH
    assert text.count("--hash") > 6
    assert not [name for name in RUN | DEV if name.startswith(("nvidia", "cuda", "triton"))]
