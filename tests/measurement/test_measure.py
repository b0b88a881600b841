"""Measuring the real enclaves: reproducible, complete, fast the second time, and every edit is
found and named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedark.cli.enclave import app
from fedark.foundation.errors import ContractError, FedarkError, InputError, Refused
from fedark.measurement import (
    EnclaveManifest,
    Measurement,
    differences,
    enclave_dir,
    measure,
    measure_enclave,
    run_config_register,
    tree,
)
from fedark.measurement.manifest import package_dir

ROLES = ("trainer", "aggregator")
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def aggregator() -> Measurement:
    return measure_enclave("aggregator")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A second checkout."""
    return checkout(tmp_path / "copy")


def checkout(folder: Path) -> Path:
    folder.mkdir()
    for name in ("fedark", "enclaves"):
        shutil.copytree(
            CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


def measured(folder: Path, role: str = "aggregator", **environment: str) -> dict[str, Any]:
    """What a fresh process measures with the checkout in `folder`."""
    script = (
        "import json, sys\nfrom fedark.measurement import measure_enclave\n"
        "print(json.dumps(measure_enclave(sys.argv[1]).to_json()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, role],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_two_checkouts_measure_the_same(copy: Path, tmp_path: Path) -> None:
    assert measured(copy) == measured(checkout(tmp_path / "another"))


def test_an_installed_package_measures_like_a_checkout(copy: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    shutil.copytree(
        copy / "fedark", installed / "fedark", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(copy / "enclaves", installed / "fedark" / "_enclaves")
    (installed / "fedark" / "_examples").mkdir()
    (installed / "fedark" / "_examples" / "x.py").write_text("")
    assert measured(installed) == measured(copy)


def test_the_environment_and_startup_files_change_nothing(copy: Path, tmp_path: Path) -> None:
    before = measured(copy)["registers"]
    (tmp_path / "sitecustomize.py").write_text("x = 1\n")
    (tmp_path / "usercustomize.py").write_text("x = 1\n")
    after = measured(
        copy,
        PYTHONPATH=f"{copy}:{tmp_path}",
        PYTHONDONTWRITEBYTECODE="",
        PYTHONSTARTUP=str(tmp_path / "sitecustomize.py"),
        PYTHONHASHSEED="5",
        LC_ALL="C",
        TZ="Asia/Tokyo",
    )["registers"]
    assert after == before


@pytest.mark.parametrize(
    ("path", "registers"),
    [
        ("fedark/stages/__init__.py", {"application"}),
        ("fedark/attestation/gate.py", {"application", "launcher"}),
        ("enclaves/aggregator/main.py", {"application"}),
        ("enclaves/aggregator/enclave.toml", {"application"}),
        ("enclaves/trainer/main.py", set()),
    ],
)
def test_a_changed_file_changes_the_registers_it_belongs_to_and_is_named(
    copy: Path, path: str, registers: set[str]
) -> None:
    before = measured(copy)
    with (copy / path).open("a") as file:
        file.write("\n# edited\n")
    after = measured(copy)
    assert {
        name
        for name in before["registers"]
        if before["registers"][name] != after["registers"][name]
    } == registers
    label = path.replace("enclaves/aggregator", "enclave")
    assert differences(before, after) == [
        f"{name}: {label} has other content" for name in sorted(registers)
    ]


def test_added_removed_executable_and_swapped_files_are_named(copy: Path) -> None:
    before = measured(copy)
    (copy / "fedark" / "bench" / "extra.py").write_text("")
    (copy / "fedark" / "stages" / "__init__.py").chmod(0o755)
    (copy / "enclaves" / "aggregator" / "main.py").rename(copy / "main.py")
    (copy / "enclaves" / "aggregator" / "main.py").symlink_to("../../main.py")
    (copy / "fedark" / "cli" / "enclave.py").unlink()
    assert differences(before, measured(copy)) == [
        "application: enclave/main.py is now a link",
        "application: fedark/bench/extra.py was added",
        "application: fedark/cli/enclave.py was removed",
        "application: fedark/stages/__init__.py became executable",
    ]


def test_every_register_is_over_exactly_the_entries_that_are_shown(aggregator: Measurement) -> None:
    assert set(aggregator.registers) == {"launcher", "runtime", "application"}
    assert all(len(value) == 48 for value in aggregator.registers.values())
    labels = [entry.label for part in aggregator.entries.values() for entry in part]
    assert not any("__pycache__" in label for label in labels)
    for label in ("python", "stdlib/os.py", "lib/libc.so.6", "site/cbor2/__init__.py"):
        assert label in {entry.label for entry in aggregator.entries["runtime"]}


def test_the_aggregator_runs_without_torch(aggregator: Measurement) -> None:
    assert not any(entry.label.startswith("site/torch/") for entry in aggregator.entries["runtime"])


def test_an_edit_after_the_measurement_is_found(
    aggregator: Measurement, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "package_dir", lambda: copy / "fedark")
    monkeypatch.setattr(measure, "enclave_dir", lambda role: copy / "enclaves" / role)
    first = measure_enclave("aggregator")
    first.check_unchanged()
    with (copy / "fedark" / "foundation" / "keys.py").open("a") as file:
        file.write("#")
    with pytest.raises(Refused, match=r"fedark/foundation/keys\.py has other content"):
        first.check_unchanged()


SPY = """
import json, os, sys
search, modules = json.loads(sys.argv[1])
opened = set()
def note(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        opened.add(os.path.abspath(os.fsdecode(args[0])))
sys.addaudithook(note)
sys.path[:] = search
for module in modules:
    __import__(module)
mapped = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if line.count("/")}
print(json.dumps(sorted({path for path in opened if os.path.isfile(path)} | mapped)))
"""


@pytest.mark.parametrize(
    ("role", "modules"),
    [
        ("aggregator", ["fedark.enclave.aggregator"]),
        pytest.param("trainer", ["fedark.enclave.trainer", "peft"], marks=pytest.mark.slow),
    ],
)
def test_an_enclave_loads_from_what_was_measured_and_reads_or_maps_nothing_else(
    role: str, modules: list[str], tmp_path: Path
) -> None:
    """Links stand for the sandbox's mounts: of a folder on the search path, only what is visible
    can be found.
    """
    measurement = measure_enclave(role)
    search = []
    for number, folder in enumerate(measurement.search_path):
        if folder in measurement.visible:
            search.append(str(folder))
            continue
        view = tmp_path / "view" / str(number)
        view.mkdir(parents=True)
        search.append(str(view))
        for path in measurement.visible:
            if path.is_relative_to(folder):
                link = view / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    arguments = json.dumps([search, modules])
    done = subprocess.run(
        [
            str(measurement.python),
            "-I",
            "-S",
            "-B",
            "-X",
            f"pycache_prefix={tmp_path / 'none'}",
            "-c",
            SPY,
            arguments,
        ],
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    visible = [str(path) for path in measurement.visible]
    paths = [os.path.realpath(path) for path in json.loads(done.stdout.splitlines()[-1])]
    assert len(paths) > 100
    system = ("/proc/", "/sys/", "/dev/", "/etc/ld.so.")
    strays = [
        path
        for path in paths
        if not path.startswith(system)
        and not any(path == root or path.startswith(root + "/") for root in visible)
    ]
    assert strays == []


def test_poisoned_bytecode_in_a_measured_folder_is_not_executed(
    copy: Path, aggregator: Measurement, tmp_path: Path
) -> None:
    """Without `pycache_prefix` it is: the flag is what keeps unmeasured bytecode out of reach."""
    source = copy / "fedark" / "foundation" / "errors.py"
    cached = (
        copy
        / "fedark"
        / "foundation"
        / "__pycache__"
        / f"errors.{sys.implementation.cache_tag}.pyc"
    )
    cached.parent.mkdir(exist_ok=True)
    poison = (
        "import importlib._bootstrap_external as e, os, sys\ns = os.stat(sys.argv[1])\ncode ="
        " compile('POISON = True', sys.argv[1], 'exec')\nopen(sys.argv[2],"
        " 'wb').write(e._code_to_timestamp_pyc(code, int(s.st_mtime), s.st_size))\n"
    )
    subprocess.run([sys.executable, "-c", poison, str(source), str(cached)], check=True)
    search = [*map(str, aggregator.search_path[:-1]), str(copy)]
    script = (
        f"import sys; sys.path[:] = {search!r}; import fedark.foundation.errors;"
        " print(hasattr(fedark.foundation.errors, 'POISON'))"
    )
    outcome = {}
    for flags in (
        ("-I", "-S", "-B"),
        ("-I", "-S", "-B", "-X", f"pycache_prefix={tmp_path / 'private'}"),
    ):
        done = subprocess.run(
            [str(aggregator.python), *flags, "-c", script],
            capture_output=True,
            text=True,
            check=True,
        )
        outcome[len(flags)] = done.stdout.strip()
    assert outcome == {3: "True", 5: "False"}


@pytest.mark.slow
def test_measuring_a_torch_install_again_reads_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/benchmarks.md has the times of both. What changed a moment ago is read again, which is
    little of this.
    """
    whole = measure_enclave("trainer")
    read: list[str] = []
    monkeypatch.setattr(
        tree,
        "_hash",
        lambda path, status, real=tree._hash: (read.append(path), real(path, status))[1],
    )
    assert measure_enclave("trainer").registers == whole.registers
    assert len(read) < sum(map(len, whole.entries.values())) / 100
    read.clear()
    assert measure_enclave("trainer", cached=False).registers == whole.registers
    assert len(read) > sum(map(len, whole.entries.values())) / 2


def test_run_config_register_is_the_sha384_of_the_bytes() -> None:
    assert run_config_register(b"").hex().startswith("38b060a751ac9638")


@pytest.mark.parametrize("role", ["", "janitor", "../trainer", "trainer/../aggregator", "provider"])
def test_there_is_no_enclave_of_another_role(role: str) -> None:
    with pytest.raises(InputError):
        enclave_dir(role)


@pytest.mark.parametrize("role", ROLES)
def test_the_manifests_are_valid(role: str) -> None:
    manifest = EnclaveManifest.load(enclave_dir(role) / "enclave.toml")
    assert manifest.role == role
    assert all((package_dir() / part).exists() for part in manifest.launcher.paths)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('role = "aggregator"', 'role = "janitor"', "role: is not one of"),
        ('entry = "main.py"', 'entry = "../main.py"', "entry: "),
        ('entry = "main.py"', 'entry = "/bin/sh"', "entry: "),
        ('python = ">=3.11"', 'python = ">=99"', "python: asks for >=99"),
        ('python = ">=3.11"', 'python = "new"', "python: is not a version specifier"),
        ('python = ">=3.11"', 'python = ">=3.11"\nsurprise = 1', "surprise: unknown key"),
        ("[launcher]", "[launched]", "launcher: missing"),
    ],
)
def test_a_bad_manifest_is_refused_with_its_key(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    text = (enclave_dir("aggregator") / "enclave.toml").read_text()
    path = tmp_path / "enclave.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ContractError) as caught:
        EnclaveManifest.load(path)
    assert any(line.startswith(problem) for line in caught.value.problems)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"role = ", b"x" * 70_000])
def test_a_manifest_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "enclave.toml"
    path.write_bytes(content)
    with pytest.raises(FedarkError):
        EnclaveManifest.load(path)


def test_measure_prints_registers_and_diff_names_files(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "package_dir", lambda: copy / "fedark")
    monkeypatch.setattr(measure, "enclave_dir", lambda role: copy / "enclaves" / role)
    aggregator = measure_enclave("aggregator")
    run = CliRunner()
    shown = run.invoke(app, ["measure", "aggregator"])
    assert shown.exit_code == 0, shown.output
    for name, value in aggregator.registers.items():
        assert f"{name:<12} {value.hex()}" in shown.output
    whole = run.invoke(app, ["measure", "aggregator", "--json"])
    value = json.loads(whole.output)
    (tmp_path / "a.json").write_text(whole.output)
    same = run.invoke(app, ["diff", str(tmp_path / "a.json"), "aggregator"])
    assert (same.exit_code, same.output) == (0, "Nothing differs.\n")
    del value["files"]["runtime"]["stdlib/os.py"]
    (tmp_path / "b.json").write_text(json.dumps(value))
    differs = run.invoke(app, ["diff", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert (differs.exit_code, differs.output) == (1, "runtime: stdlib/os.py was removed\n")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": 5}', '{"files": {"runtime": {"x": [1]}}}']
)
def test_diff_refuses_what_is_no_measurement(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    result = CliRunner().invoke(app, ["diff", str(tmp_path / "x.json"), "aggregator"])
    assert isinstance(result.exception, InputError)
