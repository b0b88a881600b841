"""What an enclave runs on: equal for two installs of the same wheels, and different for anything
that it could import.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedark.foundation.errors import InputError, Refused
from fedark.measurement import loader, runtime
from fedark.measurement.cache import DigestCache
from fedark.measurement.tree import MeasuredPath, entries_of, register


def wheel(
    folder: Path,
    name: str,
    files: dict[str, str],
    *,
    requires: tuple[str, ...] = (),
    script: bool = False,
) -> Path:
    """A valid wheel of pure Python."""
    info = f"{name}-1.0.dist-info"
    metadata = "".join(f"Requires-Dist: {line}\n" for line in requires)
    contents = dict(files)
    contents[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}\nRequires-Dist: never\n"
    )
    contents[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    if script:
        contents[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name}-tool = {name}:main\n"
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}"
        for path, text in contents.items()
    ]
    contents[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for item, text in contents.items():
            archive.writestr(zipfile.ZipInfo(item), text)
    return path


def unpack(path: Path, site: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)


def roots_of(*names: str) -> list[MeasuredPath]:
    return runtime.distribution_roots(*runtime.distributions(names))


def runtime_register(*names: str) -> bytes:
    return register("runtime", entries_of(roots_of(*names), DigestCache(None)))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site folder, alone on `sys.path` with the standard library."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(
        sys, "path", [str(folder), *(path for path in sys.path if "site-packages" not in path)]
    )
    return folder


def test_two_installs_of_one_wheel_by_pip_have_equal_registers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheel(
        tmp_path / "wheels",
        "alpha",
        {"alpha/__init__.py": "def main(): pass\n", "alpha/data.txt": "d"},
        script=True,
    )
    values = []
    for name, options in (("one", ["--no-compile"]), ("a/much/longer/two", ["--compile"])):
        target = tmp_path / name
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            *options,
            "--target",
            str(target),
        ]
        subprocess.run([*command, str(path)], check=True, capture_output=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(target)])
            values.append(runtime_register("alpha"))
        assert (target / "alpha-1.0.dist-info" / "direct_url.json").exists()
        assert (target / "bin" / "alpha-tool").exists()
    assert values[0] == values[1]


def test_what_an_installer_leaves_does_not_count_and_is_not_visible(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha.py": ""}), site)
    before, info = runtime_register("alpha"), site / "alpha-1.0.dist-info"
    for name, text in (
        ("INSTALLER", "uv"),
        ("REQUESTED", ""),
        ("direct_url.json", "{}"),
        ("uv_cache.json", "{}"),
    ):
        (info / name).write_text(text)
    with (info / "RECORD").open("a") as record:
        record.write("../../../bin/alpha,,\n__pycache__/alpha.cpython-311.pyc,,\n")
    (site / "evil.pth").write_text("import os")
    (site / "sitecustomize.py").write_text("import os")
    assert runtime_register("alpha") == before
    visible = {Path(root.path).name for root in roots_of("alpha")}
    assert visible == {"alpha.py", "METADATA", "WHEEL"}


def test_a_file_smuggled_into_a_distribution_changes_the_register(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha/__init__.py": ""}), site)
    before = runtime_register("alpha")
    (site / "alpha" / "extra.py").write_text("")
    assert runtime_register("alpha") != before


def test_a_distribution_that_is_not_needed_does_not_count(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha/__init__.py": ""}), site)
    before = runtime_register("alpha")
    unpack(wheel(site.parent, "beta", {"beta/__init__.py": ""}), site)
    assert runtime_register("alpha") == before


def test_of_a_shared_folder_only_the_needed_parts_count_and_are_visible(site: Path) -> None:
    unpack(
        wheel(
            site.parent,
            "alpha",
            {"space/alpha/__init__.py": "", "space/alpha/deep/x.py": "", "space/one.py": ""},
        ),
        site,
    )
    alone = {root.label for root in roots_of("alpha")}
    assert "site/space" in alone
    unpack(
        wheel(site.parent, "beta", {"space/beta/__init__.py": "", "space/alpha/deep/y.py": ""}),
        site,
    )
    (site / "space" / "stray.py").write_text("")
    shared = {root.label for root in roots_of("alpha") if "dist-info" not in root.label}
    assert shared == {
        "site/space/alpha/__init__.py",
        "site/space/alpha/deep/x.py",
        "site/space/one.py",
    }


def test_an_excluded_folder_neither_counts_nor_is_visible_and_nothing_beside_it_slips_in(
    site: Path,
) -> None:
    unpack(
        wheel(
            site.parent,
            "alpha",
            {"alpha/__init__.py": "", "alpha/include/deep/a.h": "", "alpha/lib/x.py": ""},
        ),
        site,
    )

    def roots() -> list[MeasuredPath]:
        return runtime.distribution_roots(*runtime.distributions(["alpha"]), ["alpha/include"])

    def labels() -> set[str]:
        return {root.label for root in roots() if "dist-info" not in root.label}

    before = register("runtime", entries_of(roots(), DigestCache(None)))
    assert labels() == {"site/alpha/__init__.py", "site/alpha/lib"}
    (site / "alpha" / "include" / "deep" / "b.h").write_text("")
    (site / "alpha" / "stray.py").write_text("")
    assert labels() == {"site/alpha/__init__.py", "site/alpha/lib"}
    assert register("runtime", entries_of(roots(), DigestCache(None))) == before
    (site / "alpha" / "lib" / "stray.py").write_text("")
    assert register("runtime", entries_of(roots(), DigestCache(None))) != before


def test_requirements_are_followed_with_markers_and_extras(site: Path) -> None:
    requires = (
        'beta; python_version >= "3"',
        'gone; python_version < "3"',
        'absent; extra == "never"',
        "gamma[fast]",
    )
    unpack(wheel(site.parent, "alpha", {"alpha.py": ""}, requires=requires), site)
    unpack(wheel(site.parent, "beta", {"beta.py": ""}, requires=("gamma",)), site)
    unpack(
        wheel(site.parent, "gamma", {"gamma.py": ""}, requires=('delta_x; extra == "fast"',)), site
    )
    unpack(wheel(site.parent, "Delta.X", {"delta.py": ""}, requires=("alpha",)), site)
    needed, others = runtime.distributions(["alpha"])
    assert [item.name for item in needed] == ["alpha", "beta", "delta-x", "gamma"]
    assert others == []


def test_a_requirement_that_is_not_installed_is_named_with_who_needs_it(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha.py": ""}, requires=("beta",)), site)
    with pytest.raises(InputError, match="beta, which alpha needs, is not installed"):
        runtime.distributions(["alpha"])


def test_an_editable_install_is_refused(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"__editable__.alpha-1.0.pth": "/home/someone\n"}), site)
    with pytest.raises(InputError, match="editable"):
        roots_of("alpha")


def test_a_distribution_without_a_record_is_refused(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha.py": ""}), site)
    (site / "alpha-1.0.dist-info" / "RECORD").unlink()
    with pytest.raises(InputError, match="RECORD cannot be read"):
        roots_of("alpha")


def test_paths_of_a_record_that_leave_the_site_folder_are_not_followed(site: Path) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha.py": ""}), site)
    with (site / "alpha-1.0.dist-info" / "RECORD").open("a") as record:
        record.write('../../etc/passwd,,\n/etc/passwd,,\n"al,pha/../../../x",,\nalpha/../../y,,\n')
    assert {root.label for root in roots_of("alpha") if "dist-info" not in root.label} == {
        "site/alpha.py"
    }


def test_the_first_site_folder_on_the_path_counts_as_for_an_import(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(wheel(site.parent, "alpha", {"alpha.py": "1"}), site)
    before = runtime_register("alpha")
    other = tmp_path / "other"
    unpack(wheel(tmp_path / "w", "alpha", {"alpha.py": "2"}), other)
    monkeypatch.setattr(sys, "path", [*sys.path, str(other)])
    assert runtime_register("alpha") == before
    monkeypatch.setattr(sys, "path", [str(other), *sys.path])
    assert runtime_register("alpha") != before


def test_the_standard_library_leaves_out_other_packages_and_bytecode() -> None:
    roots, paths = runtime.stdlib_roots(["site-packages", "test", "config-*"])
    names = {Path(root.path).name for root in roots}
    assert "os.py" in names
    assert not names & {"site-packages", "test", "__pycache__"}
    assert not any(name.startswith("config-") for name in names)
    assert (paths[0] / "os.py").is_file()


def test_libc_and_the_loader_are_found_for_the_interpreter_and_a_changed_library_changes_the_entry(
    tmp_path: Path,
) -> None:
    cache = DigestCache(None)
    binary = entries_of([MeasuredPath(str(runtime.python_binary()), "python")], cache)
    found = {
        entry.label: entry
        for entry in runtime.library_entries(binary, ["libgcc_s.so.1", "not-there.so"], cache)
    }
    assert "lib/libc.so.6" in found
    assert any(label.startswith("lib/ld-linux") for label in found)
    assert "lib/not-there.so" not in found
    library = tmp_path / "libextra.so.1"
    shutil.copy(found["lib/libc.so.6"].path, library)
    (one,) = (
        e
        for e in runtime.library_entries([], [str(library)], cache)
        if e.label == "lib/libextra.so.1"
    )
    with library.open("ab") as file:
        file.write(b"\0")
    (two,) = (
        e
        for e in runtime.library_entries([], [str(library)], cache)
        if e.label == "lib/libextra.so.1"
    )
    assert one.digest != two.digest


def loader_cache(
    path: Path, libraries: dict[str, Path], *, old: bytes = b"", flags: int = 0x0303
) -> None:
    """Write what ldconfig would, with `old` for the older format before it."""
    head, strings, entries = 48, b"", b""
    start = head + 24 * len(libraries)
    for name, place in libraries.items():
        entries += struct.pack(
            "<iIIIQ", flags, start + len(strings), start + len(strings) + len(name) + 1, 0, 0
        )
        strings += name.encode() + b"\0" + os.fsencode(place) + b"\0"
    path.write_bytes(
        old
        + struct.pack("<20sII20x", b"glibc-ld.so.cache1.1", len(libraries), len(strings))
        + entries
        + strings
    )


def python_libraries() -> dict[str, Path]:
    cache = DigestCache(None)
    binary = entries_of([MeasuredPath(str(runtime.python_binary()), "python")], cache)
    return {
        entry.label.removeprefix("lib/"): Path(entry.path)
        for entry in runtime.library_entries(binary, [], cache)
    }


@pytest.fixture
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ld.so.cache"
    monkeypatch.setattr(loader, "CACHE", str(path))
    return path


def test_the_loaders_cache_of_this_machine_is_understood() -> None:
    if not Path(loader.CACHE).exists():
        pytest.skip("no such cache here")
    path, *_ = loader.cached_libraries()["libc.so.6"]
    assert Path(path).resolve() == python_libraries()["libc.so.6"].resolve()


@pytest.mark.parametrize("old", [b"", b"ld.so-1.7.0\0" + bytes(4)])
def test_a_library_that_the_loaders_cache_has_elsewhere_is_refused(
    cache_file: Path, tmp_path: Path, old: bytes
) -> None:
    known = python_libraries()
    copy = tmp_path / "libc.so.6"
    shutil.copy(known["libc.so.6"], copy)
    loader_cache(
        cache_file, {"libc.so.6": known["libc.so.6"], "libgone.so": tmp_path / "gone"}, old=old
    )
    assert python_libraries() == known
    loader_cache(cache_file, {"libc.so.6": copy}, old=old)
    assert python_libraries() == known
    with copy.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(Refused, match=r"may take .*libc\.so\.6"):
        python_libraries()
    loader_cache(cache_file, {"libc.so.6": copy}, old=old, flags=0x0003)  # for another processor
    assert python_libraries() == known


def test_a_library_that_only_the_loaders_cache_knows_is_measured(
    cache_file: Path, tmp_path: Path
) -> None:
    library = tmp_path / "libonly-there.so.1"
    shutil.copy(python_libraries()["libc.so.6"], library)
    loader_cache(cache_file, {library.name: library})
    found = runtime.library_entries([], [library.name], DigestCache(None))
    assert str(library) in {entry.path for entry in found}


def test_a_build_for_newer_processors_is_refused(tmp_path: Path) -> None:
    library, variant = (
        tmp_path / "libextra.so.1",
        tmp_path / "glibc-hwcaps" / "x86-64-v3" / "libextra.so.1",
    )
    shutil.copy(python_libraries()["libc.so.6"], library)
    runtime.library_entries([], [str(library)], DigestCache(None))
    variant.parent.mkdir(parents=True)
    variant.write_bytes(b"another")
    with pytest.raises(Refused, match="x86-64-v3"):
        runtime.library_entries([], [str(library)], DigestCache(None))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"glibc-ld.so.cache1.1\xff\xff\xff"])
def test_a_loaders_cache_that_cannot_be_read_is_refused(cache_file: Path, content: bytes) -> None:
    cache_file.write_bytes(content)
    with pytest.raises(InputError, match="loader's cache"):
        python_libraries()


def test_without_a_loaders_cache_nothing_changes(cache_file: Path) -> None:
    assert not cache_file.exists()
    assert "libc.so.6" in python_libraries()
