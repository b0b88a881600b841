"""The public API: what it offers is pinned, what its examples show is true, and nothing is loaded
before it is used.
"""

from __future__ import annotations

import doctest
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import fedark
from fedark.attestation.binding import KeyBinding
from fedark.attestation.claims import RUN_CONFIG, SandboxFacts
from fedark.attestation.evidence import Evidence
from fedark.attestation.platforms.simulated import SimulatedRoot
from fedark.attestation.trust import SIMULATED_CRL, SIMULATED_ROOT
from fedark.foundation.errors import ContractError, EvidenceRefused, InputError
from fedark.foundation.keys import HpkeKey, SigningKey

PINNED = [
    "Job",
    "Result",
    "__version__",
    "audit",
    "compare",
    "plan",
    "seal",
    "simulate",
    "taste",
    "verify_dossier",
    "verify_evidence",
]


def test_the_public_names_are_these() -> None:
    assert fedark.__all__ == PINNED
    assert all(getattr(fedark, name) is not None for name in PINNED)
    assert dir(fedark) == PINNED
    with pytest.raises(AttributeError):
        fedark.nothing  # noqa: B018


def test_no_public_name_is_also_a_folders() -> None:
    """Python would put the folder in its place as soon as anything in there is imported."""
    folders = {path.stem for path in Path(fedark.__file__).parent.iterdir()}
    assert not folders & set(PINNED)


def test_importing_the_package_loads_nothing_of_it_and_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import fedark; "
        "print(sorted(set(sys.modules) - before - {'fedark', 'importlib', 'typing'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout
    assert "fedark." not in loaded
    assert not [name for name in ("torch", "numpy", "pydantic", "flwr") if name in loaded]


def _quoted(nonce: bytes) -> tuple[bytes, dict[str, bytes], str]:
    """An enclave's evidence, its collateral, and a policy that admits it."""
    now = datetime.now(UTC)
    root = SimulatedRoot(now=now)
    registers = {
        name: bytes([index]) * 48
        for index, name in enumerate(("launcher", "runtime", "application", RUN_CONFIG))
    }
    binding = KeyBinding(
        nonce=nonce,
        hpke_public=HpkeKey().public,
        signing_public=SigningKey().public,
        contract_digest=b"c" * 48,
        run_id="run",
        role="trainer",
        party="north",
    )
    attester = root.issue(now=now).attester(measurements=registers, sandbox=SandboxFacts.none())
    token = attester.quote(binding.report_data(), nonce)
    policy = f"""version = 1
[platforms.simulated]
root = "{root.sha256}"
minimum_svn = 1
sandbox = "none"
[trainer]
""" + "".join(
        f'{name} = "{value.hex()}"\n' for name, value in registers.items() if name != RUN_CONFIG
    )
    evidence = Evidence("simulated", token, binding).encode()
    return evidence, {SIMULATED_ROOT: root.certificate, SIMULATED_CRL: root.crl(now=now)}, policy


def _example(name: str) -> str:
    value = fedark.Job if name.startswith("Job.") else fedark
    return getattr(value, name.rpartition(".")[2]).__doc__ or ""


@pytest.mark.slow
@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize(
    "name",
    [
        "Job.load",
        "Job.from_dict",
        "simulate",
        "taste",
        "compare",
        "seal",
        "audit",
        "verify_dossier",
        "verify_evidence",
    ],
)
def test_an_example_does_what_it_shows(
    name: str, small_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_job.parent)
    evidence, collateral, policy = _quoted(b"n" * 32)
    Path("policy.toml").write_text(policy)
    scope: dict[str, Any] = {"evidence": evidence, "collateral": collateral}
    test = doctest.DocTestParser().get_doctest(_example(name), scope, name, None, None)
    assert test.examples
    result = doctest.DocTestRunner().run(test)
    assert (result.failed, result.attempted) == (0, len(test.examples))


@pytest.mark.usefixtures("measured_once")
def test_a_result_has_figures_curves_adapters_and_a_table_for_notebooks(
    small_job: Path, tmp_path: Path
) -> None:
    result = fedark.simulate(small_job, tmp_path / "work")
    assert result.figures.keys() == result.curves.keys() == result.adapters.keys() == {"tiny"}
    assert (result.adapters["tiny"] / "adapter_config.json").is_file()
    assert all(0 <= value <= 100 for value in result.figures["tiny"].values())
    html = result._repr_html_()
    assert html.startswith("<pre")
    assert "acceptance set" in html
    assert "acceptance set" in str(result)


def test_evidence_that_answers_another_challenge_or_policy_is_refused(tmp_path: Path) -> None:
    evidence, collateral, policy = _quoted(b"n" * 32)
    path = tmp_path / "policy.toml"
    path.write_text(policy)
    good = fedark.verify_evidence(evidence, path, collateral=collateral, nonce=b"n" * 32)
    assert good.platform == "simulated"
    with pytest.raises(EvidenceRefused, match="another challenge"):
        fedark.verify_evidence(evidence, path, collateral=collateral, nonce=b"m" * 32)
    with pytest.raises(EvidenceRefused):
        fedark.verify_evidence(evidence[:-1] + b"x", path, collateral=collateral)
    with pytest.raises(EvidenceRefused, match="collateral is missing"):
        fedark.verify_evidence(evidence, path)
    with pytest.raises(EvidenceRefused):
        fedark.verify_evidence(evidence, path, role="aggregator", collateral=collateral)
    path.write_text(policy.replace("01" * 48, "02" * 48))
    with pytest.raises(EvidenceRefused, match="runtime"):
        fedark.verify_evidence(evidence, path, collateral=collateral)


def test_a_job_can_be_made_of_a_map_and_tells_every_problem(small_job: Path) -> None:
    value = tomllib.loads(small_job.read_text())
    assert fedark.Job.from_dict(value, small_job.parent).name == "small"
    value["job"]["rounds"] = 0
    value["models"][0]["tsk"] = "x"
    with pytest.raises(ContractError) as caught:
        fedark.Job.from_dict(value, small_job.parent)
    assert len(caught.value.problems) >= 2


def test_sealing_what_is_no_model_makes_no_key(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        fedark.seal(
            tmp_path / "empty", tmp_path / "b.fedark", key=tmp_path / "k", name="x", licence="MIT"
        )
    assert not (tmp_path / "k").exists()
