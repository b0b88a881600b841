"""Each thing that can be wrong with a node's machine is found, with how to mend it."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from direct import admitted, make_host, make_node
from world import free_port

from fedark.contract.contract import fingerprint, now
from fedark.foundation.errors import InputError
from fedark.foundation.proxies import proxy_for
from fedark.operate.host.admission import approve, file_request
from fedark.operate.host.folder import HostFolder, init_host
from fedark.operate.host.front import Front, server_context
from fedark.operate.host.service import HostService
from fedark.operate.joining import dump
from fedark.operate.node import doctor
from fedark.operate.node.doctor import Finding, examine
from fedark.operate.node.folder import NodeFolder
from fedark.sandbox.survey import Support


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostFolder]:
    """A host whose front answers, without a SuperLink behind it."""
    address = f"127.0.0.1:{free_port()}"
    folder = tmp_path_factory.mktemp("host")
    host = init_host(
        folder / "host", name="pool", listen=address, address=address, sandbox="landlock"
    )
    loop, ready = asyncio.new_event_loop(), threading.Event()

    fronts: list[Front] = []

    async def serve() -> None:
        front = Front(
            tls=server_context(host.path / host.config.certificate, host.path / host.config.key),
            upstream=host.path / "none.sock",
            admits=host.store.admits,
            service=HostService(host),
        )
        await front.start(address)
        fronts.append(front)
        ready.set()

    thread = threading.Thread(
        target=lambda: (loop.run_until_complete(serve()), loop.run_forever()), daemon=True
    )
    thread.start()
    assert ready.wait(60)
    yield host
    asyncio.run_coroutine_threadsafe(fronts[0].close(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)


@pytest.fixture
def node(served: HostFolder, tmp_path: Path) -> NodeFolder:
    name = f"n{abs(hash(str(tmp_path))) % 10**12}"
    node = make_node(served, tmp_path / name, name, "customer")
    file_request(served, (node.path / "request.json").read_bytes())
    node.install(dump(approve(served, name, fingerprint(node.request.party))))
    return node


def bad(node: NodeFolder, *, level: str = "bad") -> list[Finding]:
    return [finding for finding in examine(node) if finding.level == level]


def only(node: NodeFolder, check: str, *, level: str = "bad") -> Finding:
    found = bad(node, level=level)
    assert [finding.check for finding in found] == [check], found
    assert found[0].fix
    return found[0]


@pytest.mark.usefixtures("dead_proxy")
def test_a_node_in_order_has_nothing_to_mend_but_that_it_does_not_run(node: NodeFolder) -> None:
    assert bad(node) == []
    found = examine(node)
    checks = {finding.check for finding in found}
    assert {
        "files",
        "sandbox",
        "disk",
        "data",
        "rules",
        "host",
        "clock",
        "standing",
        "certificates",
        "daemon",
    } <= checks
    assert [finding.check for finding in found if finding.level == "warning"] == ["daemon"]


def test_a_key_that_others_can_read(node: NodeFolder) -> None:
    (node.path / "transport.key").chmod(0o640)
    found = bad(node)
    assert {finding.check for finding in found} == {"files", "host"}
    assert all("chmod 600" in finding.fix for finding in found)


def test_a_kernel_that_cannot_confine(node: NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "survey", lambda: Support("unshare was refused", 0, True))
    assert "landlock" in only(node, "sandbox").what


def test_a_sandbox_that_is_weaker_than_the_node_asks_for(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "survey", lambda: Support("unshare was refused", 5, True))
    assert bad(node) == []
    text = (
        (node.path / "party.toml")
        .read_text()
        .replace('sandbox = "landlock"', 'sandbox = "namespaces"')
    )
    (node.path / "party.toml").write_text(text)
    assert "unprivileged_userns_clone" in only(NodeFolder(node.path), "sandbox").fix


@pytest.mark.parametrize(("shift", "words"), [(30, "30 s ahead of"), (-90, "90 s behind")])
def test_a_clock_that_is_off(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch, shift: int, words: str
) -> None:
    monkeypatch.setattr(
        "fedark.operate.node.hostclient.now", lambda: now() + timedelta(seconds=shift)
    )
    found = only(node, "clock")
    assert words in found.what
    assert "set-ntp" in found.fix


def test_a_full_disk(node: NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "less than" in only(node, "disk").what


def test_a_data_file_that_does_not_fit_is_named_by_line_and_not_shown(node: NodeFolder) -> None:
    assert node.config.data is not None
    file = Path(node.config.data.file)
    file.write_text("desk,message,action\nnorth,a secret word,\n")
    found = bad(node)
    assert [finding.check for finding in found] == ["data"]
    assert "line 2" in found[0].what
    assert "secret word" not in found[0].what + found[0].fix
    file.unlink()
    assert [finding.check for finding in bad(node)] == ["data"]


def test_rules_that_are_malformed(node: NodeFolder) -> None:
    (node.path / "rules.toml").write_text("version = 1\n[[allow]]\nname = 'x'\n")
    found = bad(node)
    assert [finding.check for finding in found] == ["rules"]
    assert "missing" in found[0].what


def test_a_certificate_of_another_authority(node: NodeFolder, tmp_path: Path) -> None:
    stranger = make_host(tmp_path / "stranger")
    (node.path / "ca.pem").write_bytes(stranger.ca)
    found = only(node, "host")
    assert (
        "not good here: self-signed certificate" in found.what
        or "not good here: unable to get" in found.what
    )
    assert "invitation" in found.fix


def test_certificates_that_ended(node: NodeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "now", lambda: now() + timedelta(days=100))
    found = [finding.what for finding in bad(node) if finding.check == "certificates"]
    assert any("this device's" in what for what in found)
    assert any("revocation list" in what for what in found)
    assert not any("authority" in what for what in found)


def test_a_host_that_does_not_answer(served: HostFolder, tmp_path: Path) -> None:
    host = init_host(
        tmp_path / "host",
        name="pool",
        listen=f"127.0.0.1:{(port := free_port())}",
        address=f"127.0.0.1:{port}",
        sandbox="landlock",
    )
    node = make_node(host, tmp_path / "north", "north", "customer")
    assert "cannot be reached" in only(node, "host").what


def test_a_request_that_waits(served: HostFolder, tmp_path: Path) -> None:
    node = make_node(served, tmp_path / "waiting", "waiting", "customer")
    file_request(served, (node.path / "request.json").read_bytes())
    found = bad(node, level="warning")
    assert [finding.check for finding in found] == ["standing", "daemon"]


def test_one_check_that_fails_costs_no_other(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(shutil, "disk_usage", broken)
    assert [finding.check for finding in bad(node)] == ["disk"]
    assert len(examine(node)) > 8


@pytest.mark.parametrize(
    "entries", ["::1", "[::1]", "fe80::/10,[2001:db8::1]:8443", "localhost, ::1,,.example", "*"]
)
def test_ipv6_in_no_proxy_is_no_trouble(
    node: NodeFolder, monkeypatch: pytest.MonkeyPatch, entries: str
) -> None:
    for name in ("https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", entries)
    assert bad(node) == []


def test_a_proxy_is_used_but_for_loopback_and_what_no_proxy_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_for("agg.example") == ""
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "other.example,[2001:db8::1],fe80::/10")
    assert proxy_for("agg.example") == "http://proxy.example:3128"
    for direct in ("127.0.0.1", "::1", "localhost", "a.other.example", "2001:db8::1"):
        assert proxy_for(direct) == ""
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy.example")
    with pytest.raises(InputError, match="cannot be used"):
        proxy_for("agg.example")


def test_commands_in_advice_can_be_pasted_where_a_folder_has_blanks(
    served: HostFolder, tmp_path: Path
) -> None:
    (tmp_path / "at the plant").mkdir()
    node = admitted(served, tmp_path / "at the plant" / "north's", "planted", "customer")
    (node.path / "transport.key").chmod(0o640)
    advice = {finding.check: finding.fix for finding in examine(node) if finding.fix}
    key = str(node.path / "transport.key")
    assert shlex.split(advice["files"].partition(";")[0]) == ["chmod", "600", key]
    assert shlex.split(advice["daemon"]) == ["fedark", "node", "up", str(node.path)]
