"""Tiny bases with a finished adapter each, as a run leaves its folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedark.contract.contract import ModelTerms
from fedark.serving.model import read_base
from fedark.tuning.export import export_peft
from fedark.tuning.layout import Flat
from fedark.tuning.sources import model_files
from fedark.vault.manifest import weights_digest

_spec = importlib.util.spec_from_file_location(
    "tuning_conftest", Path(__file__).parents[1] / "tuning" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_tuning = importlib.util.module_from_spec(_spec)
sys.modules["tuning_conftest"] = _tuning
_spec.loader.exec_module(_tuning)
zoo, texts, records = _tuning.zoo, _tuning.texts, _tuning.records


@dataclass(frozen=True)
class Finished:
    """What a job left: the folder of the adapter, and what is in it."""

    folder: Path
    base: Path
    terms: ModelTerms
    flat: Flat
    tiny: Any


@pytest.fixture
def finish(zoo: Any, tmp_path: Path) -> Callable[..., Finished]:
    """Makes an adapter on a tiny base, whose weights its terms name."""

    def make(name: str, *, labels: tuple[str, ...] | None = None, **options: Any) -> Finished:
        tiny = zoo[name]
        if labels is not None:
            tiny = replace(tiny, labels=labels)
        terms = tiny.terms(**options)
        found = _digest(tiny.folder)
        terms = terms.model_copy(update={"weights": found})
        flat = (np.random.default_rng(1).normal(size=terms.travelling) * 0.3).astype(np.float32)
        folder = tmp_path / f"adapter-{name}"
        export_peft(terms, flat, folder)
        assert read_base(terms, str(tiny.folder))[0] == tiny.folder
        return Finished(folder, tiny.folder, terms, flat, tiny)

    return make


def _digest(folder: Path) -> str:
    contents = {name: path.read_bytes() for name, path in model_files(folder).items()}
    return weights_digest({n: hashlib.sha384(c).digest() for n, c in contents.items()}).hex()
