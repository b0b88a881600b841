"""The profile in the documentation is that of the code."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from fedark.attestation import certificates, cose, eat, evidence
from fedark.attestation.nonces import NONCE_LIFETIME
from fedark.attestation.policy import CLOCK_SKEW
from fedark.foundation import canonical

TEXT = (Path(__file__).parents[2] / "docs" / "eat-profile.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| -?\d+ \|", line)
]
IN_SUBMODS = {eat._MODE, eat._SECCOMP, eat._LANDLOCK}


def test_the_table_has_exactly_the_claims_of_a_token(lab: Any) -> None:
    payload = cose.parse(lab.attester().quote(b"r" * 64, b"n" * 32)).payload
    claims = canonical.decode(payload)
    submods = claims[eat._SUBMODS]["sandbox"]
    keys = [int(row[0]) for row in ROWS]
    assert len(keys) == len(set(keys))
    assert set(keys) == {*claims, *submods} == eat._KEYS | IN_SUBMODS
    assert {int(row[0]) for row in ROWS if "in submods" in row[1]} == set(submods)
    kinds = {int: "uint", bytes: "bstr", str: "tstr", dict: "map", list: "array"}
    for key, _, form, _, _ in ROWS:
        assert form.startswith(kinds[type({**claims, **submods}[int(key)])]), key


def test_the_table_and_the_modules_docstring_name_the_same_claims() -> None:
    lines = re.findall(r"^(-?\d+) +([a-z_ ]+?)  +\S", str(eat.__doc__), re.MULTILINE)
    outer = {key: name for key, name, *_ in ROWS if int(key) not in IN_SUBMODS}
    assert dict(lines) == outer


def test_the_profile_states_the_limits_and_the_identifier_of_the_code() -> None:
    assert f"`{eat.PROFILE}`" in TEXT
    for limit in (
        cose.MAX_TOKEN_BYTES,
        eat._MAX_PAYLOAD,
        certificates._MAX_DER,
        evidence.MAX_EVIDENCE_BYTES,
    ):
        assert f"{limit:,} bytes" in TEXT
    assert f"| {cose.MAX_CHAIN}, of" in TEXT
    assert (timedelta(minutes=2), timedelta(minutes=10)) == (CLOCK_SKEW, NONCE_LIFETIME)


def test_every_check_that_the_table_names_exists() -> None:
    from fedark.attestation import policy

    for name in re.findall(r"`policy\.(\w+)`", TEXT):
        assert hasattr(policy, name), name
