"""The documented nginx configuration, with nginx where it is installed: what it passes, the front
still judges.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fronted import Running, front_before_a_recorder
from routes import flower_routes
from world import free_port, until

from fedark.links.flower.provision import provision, provision_node_key
from fedark.operate.host.front import FLEET_ROUTES
from fedark.operate.host.visitors import Limits

KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
CONFIGURATION = Path(__file__).resolve().parents[3] / "examples" / "deploy" / "nginx.conf"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """As clients see it through nginx, with the proxy's own certificate."""
    nginx = shutil.which("nginx")
    if nginx is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    public = provision(folder / "public")
    port = free_port()
    with front_before_a_recorder(folder / "front", Limits()) as behind:
        text = CONFIGURATION.read_text()
        for old, new in (
            (
                "    access_log off;",
                "".join(f"    {kind}_temp_path {kind};\n" for kind in KINDS)
                + "    access_log off;",
            ),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("127.0.0.1:8443", f"127.0.0.1:{behind.address[1]}"),
            ("/etc/nginx/agg.example.pem", str(public.certificate)),
            ("/etc/nginx/agg.example.key", str(public.key)),
            ("/var/lib/fedark/host/keys/ca.pem", str(behind.ca)),
        ):
            assert old in text
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        directives = f"daemon off; master_process off; pid {folder / 'pid'};"
        command = [
            nginx,
            "-p",
            str(folder),
            "-e",
            "stderr",
            "-c",
            str(folder / "nginx.conf"),
            "-g",
            directives,
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:

            def listens() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            until(listens, "nginx listens")
            yield replace(behind, address=("127.0.0.1", port), ca=public.ca)
        finally:
            process.terminate()
            process.wait(60)


def test_through_nginx_too_only_the_node_api_is_passed_on(proxied: Running) -> None:
    proxied.seen.clear()
    for path in sorted({path for _, path in flower_routes()}):
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            status = proxied.request(method, path)
            if method == "POST" and path in FLEET_ROUTES:
                assert status == 200, path
            else:
                assert status in (400, 403, 404, 405), (method, path, status)
    assert {(method, target) for method, target, _ in proxied.seen} == {
        ("POST", path) for path in FLEET_ROUTES
    }


def test_nginx_lets_go_of_an_idle_connection_before_the_front_does() -> None:
    """Otherwise a request now and then meets a connection that the front is closing, and nginx
    answers it with a 502.
    """
    idle = re.search(r"upstream front \{[^}]*keepalive_timeout (\d+)s;", CONFIGURATION.read_text())
    assert idle is not None
    assert int(idle[1]) < Limits().head


def test_bodies_and_keys_pass_through_unchanged(proxied: Running, tmp_path: Path) -> None:
    proxied.seen.clear()
    body = bytes(range(256)) * 3000
    assert proxied.request("POST", "/v1/fleet/push-object", body) == 200
    assert proxied.seen[-1][2] == body
    stranger = provision_node_key(tmp_path, "stranger")[1]
    assert proxied.request("POST", "/v1/fleet/push-object", body, key=stranger) == 401
    assert proxied.request("GET", "/v1/fedark/hello", key=b"") == 200
    assert len(proxied.seen) == 1


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet//pull-messages",
        "/v1/fedark/../control/list-nodes",
        "/v1/fedark/../fleet/pull-messages",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull%2dmessages",
    ],
)
def test_what_nginx_and_the_front_spell_differently_reaches_nothing(
    proxied: Running, target: str
) -> None:
    proxied.seen.clear()
    assert proxied.request("POST", target) in (200, 400, 403, 404)
    assert proxied.seen == []
