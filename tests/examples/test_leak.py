"""The leak demonstration: the attack works on what is unprotected, and is no better than blind on
what is protected.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "leak"


@pytest.fixture(scope="module")
def leak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedark_example_leak", FOLDER / "leak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(leak: ModuleType) -> Any:
    return leak.grid_messages(1000)


@pytest.fixture(scope="module")
def attacks(leak: ModuleType, world: Any) -> Any:
    leak.EPSILONS = (3.0,)  # solving for the noise of one takes seconds
    return leak.demonstrate(*world, batches=(1, 4), repeats=3)


def test_an_unprotected_update_names_its_record(attacks: Any) -> None:
    rates = {(one.protection, one.batch): one.recovered for one in attacks[0]}
    assert rates["plain", 1] == 1.0
    assert rates["plain", 4] >= 0.25
    assert rates["sum of 8", 1] > 0.2


def test_a_protected_one_names_nothing(attacks: Any) -> None:
    protected = [one for one in attacks[0] if one.protection.startswith("epsilon")]
    assert {one.protection for one in protected} == {"epsilon 3"}
    # Three batches each, of one and of about four records: one hit is chance, of all records of
    # either size.
    assert np.mean([one.recovered for one in protected]) <= 0.25


def test_the_picture_is_well_formed_and_holds_the_sentences(leak: ModuleType, attacks: Any) -> None:
    found, shown = attacks
    picture = leak.draw(found, shown, 1000)
    texts = [
        element.text or ""
        for element in ET.fromstring(picture).iter()
        if element.tag.endswith("text")
    ]
    for sentence in shown["in the batch"]:
        assert any(text.startswith(sentence[:60]) for text in texts)
    assert "100%" in texts
