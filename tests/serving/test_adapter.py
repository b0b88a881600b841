"""An adapter's folder that somebody made to harm its reader is refused, and says why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedark.foundation.errors import ModelError
from fedark.tuning.adapter import read_adapter
from fedark.tuning.export import ADAPTER, HEAD, LABELS, TERMS

Change = Callable[[Path], None]


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        read_adapter(folder)
    return error.value.what


def tensors(file: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def alter(folder: Path) -> None:
        named = load_file(folder / file)
        change(named)
        save_file(named, folder / file)

    return alter


def nan(named: dict[str, Any]) -> None:
    next(v for k, v in named.items() if "lora_B" in k)[0, 0] = np.nan


def reshape(named: dict[str, Any]) -> None:
    key = next(k for k in named if "lora_B" in k)
    named[key] = np.ascontiguousarray(named[key].T)


def halve(named: dict[str, Any]) -> None:
    key = next(iter(named))
    named[key] = named[key].astype(np.float16)


def turn(named: dict[str, Any]) -> None:
    key = next(k for k in named if "lora_A" in k)
    named[key] = named[key][::-1].copy()


def terms(change: Callable[[dict[str, Any]], None]) -> Change:
    def alter(folder: Path) -> None:
        value = json.loads((folder / TERMS).read_text())
        change(value)
        (folder / TERMS).write_text(json.dumps(value))

    return alter


def huge(value: dict[str, Any]) -> None:
    value["terms"]["layout"][0]["shape"] = [1 << 20, 1 << 20]


def link(name: str) -> Change:
    def alter(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return alter


def fifo(folder: Path) -> None:
    (folder / LABELS).unlink()
    os.mkfifo(folder / LABELS)


def grow(folder: Path) -> None:
    with (folder / HEAD).open("ab") as file:
        file.truncate(1 << 30)  # a hole: no disk


CASES: dict[str, tuple[Change, str]] = {
    "a number that is not finite": (tensors(ADAPTER, nan), "not finite"),
    "another shape": (tensors(ADAPTER, reshape), "and not F32"),
    "another type": (tensors(HEAD, halve), "F16"),
    "a tensor too many": (tensors(HEAD, lambda n: n.update(extra=n["weight"])), "holds, besides"),
    "a tensor too few": (tensors(HEAD, lambda n: n.pop("bias")), "lacks bias"),
    "another A": (tensors(ADAPTER, turn), "not the one that the contract's seed gives"),
    "a link to the tensors": (link(ADAPTER), f"{ADAPTER} is a link"),
    "a link to the terms": (link(TERMS), f"{TERMS} is a link"),
    "a pipe": (fifo, "no plain file"),
    "a file that is too large": (grow, "larger than what its terms name"),
    "terms that name a terabyte": (terms(huge), "values"),
    "terms that are no terms": (terms(lambda v: v["terms"].pop("layout")), "layout: missing"),
    "terms of another form": (terms(lambda v: v.update(form="x")), "another version"),
    "an unknown term": (terms(lambda v: v["terms"].update(code="x")), "code: unknown key"),
    "other labels": (lambda f: (f / LABELS).write_text('["a", "b"]') and None, "different labels"),
    "no terms": (lambda f: (f / TERMS).unlink(), f"there is no {TERMS}"),
    "no JSON": (lambda f: (f / TERMS).write_text("{") and None, "malformed"),
    "a cut file": (lambda f: os.truncate(f / ADAPTER, 900), "cut off"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_made_to_harm_is_refused_with_its_reason(
    finish: Callable[..., Any], case: str
) -> None:
    done = finish("minilm")
    assert np.array_equal(read_adapter(done.folder).flat, done.flat)
    change, reason = CASES[case]
    change(done.folder)
    assert reason in refused(done.folder)


def test_a_folder_is_read_as_it_was_written_whatever_it_holds(finish: Callable[..., Any]) -> None:
    for name, options in (
        ("bert", {"method": "lora"}),
        ("gpt2", {}),
        ("minilm", {"method": "head"}),
    ):
        done = finish(name, **options)
        found = read_adapter(done.folder)
        assert found.terms == done.terms
        assert np.array_equal(found.flat, done.flat)


def test_no_folder_at_all_is_said_so(tmp_path: Path) -> None:
    assert "there is no such folder" in refused(tmp_path / "nowhere")
