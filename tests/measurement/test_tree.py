"""A register changes with whatever an enclave could execute, and with nothing else."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fedark.foundation.errors import InputError, Refused
from fedark.measurement import tree
from fedark.measurement.cache import DigestCache
from fedark.measurement.tree import MeasuredPath, entries_of, register


def build(folder: Path) -> Path:
    (folder / "pkg" / "sub").mkdir(parents=True)
    (folder / "pkg" / "a.py").write_text("a = 1\n")
    (folder / "pkg" / "sub" / "b.py").write_text("b = 2\n")
    (folder / "pkg" / "tool").write_bytes(b"\x7fELF not really")
    (folder / "pkg" / "tool").chmod(0o755)
    (folder / "pkg" / "link").symlink_to("a.py")
    return folder


def value(folder: Path, cache: DigestCache | None = None) -> bytes:
    return register(
        "application",
        entries_of([MeasuredPath(str(folder / "pkg"), "pkg")], cache or DigestCache(None)),
    )


def test_equal_trees_in_two_folders_have_equal_registers(tmp_path: Path) -> None:
    assert value(build(tmp_path / "one")) == value(build(tmp_path / "elsewhere" / "two"))


def test_times_owners_write_bits_and_order_of_creation_do_not_count(tmp_path: Path) -> None:
    one = build(tmp_path / "one")
    two = tmp_path / "two"
    shutil.copytree(one, two, symlinks=True, copy_function=shutil.copy)
    os.utime(two / "pkg" / "a.py", (1, 1))
    (two / "pkg" / "a.py").chmod(0o600)
    assert value(one) == value(two)


def changed(folder: Path) -> None:
    (folder / "pkg" / "a.py").write_text("a = 2\n")


def added(folder: Path) -> None:
    (folder / "pkg" / "sub" / "c.py").write_text("")


def removed(folder: Path) -> None:
    (folder / "pkg" / "sub" / "b.py").unlink()


def renamed(folder: Path) -> None:
    (folder / "pkg" / "sub" / "b.py").rename(folder / "pkg" / "sub" / "d.py")


def moved(folder: Path) -> None:
    (folder / "pkg" / "sub" / "b.py").rename(folder / "pkg" / "b.py")


def made_executable(folder: Path) -> None:
    (folder / "pkg" / "a.py").chmod(0o744)


def made_not_executable(folder: Path) -> None:
    (folder / "pkg" / "tool").chmod(0o644)


def link_swapped(folder: Path) -> None:
    (folder / "pkg" / "link").unlink()
    (folder / "pkg" / "link").symlink_to("sub/b.py")


def file_became_link(folder: Path) -> None:
    (folder / "pkg" / "a.py").rename(folder / "pkg" / "real.py")
    (folder / "pkg" / "a.py").symlink_to("real.py")


def link_became_file(folder: Path) -> None:
    (folder / "pkg" / "link").unlink()
    shutil.copy(folder / "pkg" / "a.py", folder / "pkg" / "link")


def contents_exchanged(folder: Path) -> None:
    one, other = folder / "pkg" / "a.py", folder / "pkg" / "sub" / "b.py"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def sourceless_bytecode(folder: Path) -> None:
    (folder / "pkg" / "numba.pyc").write_bytes(b"")


@pytest.mark.parametrize(
    "edit",
    [
        changed,
        added,
        removed,
        renamed,
        moved,
        made_executable,
        made_not_executable,
        link_swapped,
        file_became_link,
        link_became_file,
        contents_exchanged,
        sourceless_bytecode,
    ],
)
def test_any_edit_changes_the_register(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    folder = build(tmp_path)
    before = value(folder)
    edit(folder)
    assert value(folder) != before


def test_bytecode_folders_do_not_count(tmp_path: Path) -> None:
    folder = build(tmp_path)
    before = value(folder)
    (folder / "pkg" / "__pycache__").mkdir()
    (folder / "pkg" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"poison")
    assert value(folder) == before


def test_a_link_into_a_bytecode_folder_counts_with_what_it_leads_to(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "pkg" / "__pycache__").mkdir()
    poison = folder / "pkg" / "__pycache__" / "evil.py"
    poison.write_text("1")
    (folder / "pkg" / "evil.py").symlink_to("__pycache__/evil.py")
    before = value(folder)
    poison.write_text("2")
    assert value(folder) != before


def test_a_link_to_a_file_outside_counts_with_the_content_of_that_file(tmp_path: Path) -> None:
    folder = build(tmp_path)
    outside = tmp_path / "outside.py"
    outside.write_text("1")
    (folder / "pkg" / "out.py").symlink_to("../outside.py")
    (entry,) = (
        e
        for e in entries_of([MeasuredPath(str(folder / "pkg"), "pkg")], DigestCache(None))
        if e.label == "pkg/out.py"
    )
    assert (entry.kind, entry.outside) == ("o", str(outside))
    before = value(folder)
    outside.write_text("2")
    assert value(folder) != before


def test_a_link_to_a_folder_outside_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (tmp_path / "other").mkdir()
    (folder / "pkg" / "out").symlink_to("../other")
    with pytest.raises(InputError, match="not measured"):
        value(folder)


def test_a_link_that_leads_nowhere_counts_by_its_text(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "pkg" / "dangling").symlink_to("nowhere")
    before = value(folder)
    (folder / "pkg" / "dangling").unlink()
    (folder / "pkg" / "dangling").symlink_to("elsewhere")
    assert value(folder) != before


def test_pipes_and_sockets_are_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    os.mkfifo(folder / "pkg" / "pipe")
    with pytest.raises(InputError, match="neither a file nor a link"):
        value(folder)
    (folder / "pkg" / "pipe").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "pkg" / "s"))
        with pytest.raises(InputError, match="neither a file nor a link"):
            value(folder)


def test_names_that_are_not_utf8_are_measured(tmp_path: Path) -> None:
    folder = build(tmp_path)
    before = value(folder)
    with open(os.fsencode(folder / "pkg") + b"/\xff\xfe.py", "wb"):
        pass
    assert value(folder) != before


def test_entries_cannot_be_shifted_from_one_path_to_another() -> None:
    def entry(label: str, digest: bytes) -> tree.TreeEntry:
        return tree.TreeEntry(label, "f", False, digest, label)

    one = [entry("a", b"1" * 48), entry("b", b"2" * 48)]
    two = [entry("a", b"2" * 48), entry("b", b"1" * 48)]
    three = [entry("af0", b"1" * 48), entry("b", b"2" * 48)]
    assert (
        len(
            {register("runtime", part) for part in (one, two, three, one[:1])}
            | {register("application", one)}
        )
        == 5
    )


def test_two_paths_under_one_label_are_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    roots = [
        MeasuredPath(str(folder / "pkg" / "a.py"), "x"),
        MeasuredPath(str(folder / "pkg" / "tool"), "x"),
    ]
    with pytest.raises(InputError, match="under one name"):
        entries_of(roots, DigestCache(None))


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path)
    real = tree.linkage

    def edit_after_reading(descriptor: int) -> object:
        with (folder / "pkg" / "big").open("ab") as file:
            file.write(b"more")
        return real(descriptor)

    (folder / "pkg" / "big").write_bytes(b"x" * 100)
    monkeypatch.setattr(tree, "linkage", edit_after_reading)
    with pytest.raises(Refused, match="changed while it was measured"):
        value(folder)


def test_a_missing_root_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be measured"):
        entries_of([MeasuredPath(str(tmp_path / "nothing"), "x")], DigestCache(None))
