"""The dynamic section of real and of damaged ELF files."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest

from fedark.measurement.elf import Linkage, linkage


def read(path: Path) -> Linkage | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return linkage(descriptor)
    finally:
        os.close(descriptor)


def test_the_interpreter_names_its_loader_and_libc() -> None:
    linked = read(Path(os.path.realpath(sys.executable)))
    assert linked is not None
    assert linked.interpreter.startswith("/lib")
    assert "libc.so.6" in linked.needed or any(
        name.startswith("libpython") for name in linked.needed
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"#!/bin/sh\n",
        b"\x7fELF",
        b"\x7fELF\x01\x01" + b"\0" * 100,
        b"\x7fELF\x02\x01" + b"\xff" * 58,
    ],
)
def test_what_is_no_elf_file_has_no_linkage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f").write_bytes(content)
    assert read(tmp_path / "f") is None


def test_a_damaged_elf_file_never_crashes_the_reader(tmp_path: Path) -> None:
    whole = Path(os.path.realpath(sys.executable)).read_bytes()[: 1 << 16]
    chosen, path = random.Random(3), tmp_path / "f"
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[chosen.randrange(1 << chosen.choice((6, 10, 14)))] = chosen.randrange(256)
        path.write_bytes(damaged)
        read(path)
