"""The deployment files say what the code does; they are checked by the tools that are here, and say
that they were not run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedark.cli import app
from fedark.operate.host.front import FLEET_ROUTES

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
COMMANDS = {"aggregator": {"up", "init"}, "node": {"up", "join"}}


def known_commands() -> dict[str, set[str]]:
    import typer

    group = typer.main.get_command(app)
    return {name: set(getattr(command, "commands", {})) for name, command in group.commands.items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fedark-aggregator.service", "fedark-node@.service"])
def test_systemd_finds_nothing_wrong_with_the_units(name: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / name.replace("@", "@x" if "@" in name else "")
    unit.write_text(
        (DEPLOY / "systemd" / name).read_text().replace("/opt/fedark/bin/fedark", "/bin/true")
    )
    found = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    if "Failed to initialize manager" in found.stderr or "Failed to connect" in found.stderr:
        pytest.skip("systemd-analyze cannot work here")
    assert unit.name not in found.stderr, found.stderr


def test_every_fedark_command_in_the_deployment_files_exists() -> None:
    known = known_commands()
    text = "\n".join(path.read_text() for path in DEPLOY.rglob("*") if path.is_file())
    used = set(re.findall(r"fedark (aggregator|node) ([a-z]+)", text))
    used |= set(re.findall(r'\["(aggregator|node)", "([a-z]+)"', text))
    assert {("aggregator", "up"), ("node", "up"), ("aggregator", "init"), ("node", "join")} <= used
    assert [(group, command) for group, command in used if command not in known[group]] == []


def test_what_was_neither_built_nor_run_says_so() -> None:
    def said(path: Path) -> str:
        return " ".join(line.strip("# ") for line in path.read_text().splitlines())

    for name in ("Containerfile", "compose.yaml"):
        assert "neither built nor run where it was written" in said(DEPLOY / name)[:300]
    for path in (DEPLOY / "systemd").iterdir():
        assert "not run where it was written" in said(path)


def test_the_compose_file_is_well_formed_and_gives_no_container_more_than_it_needs() -> None:
    yaml = pytest.importorskip("yaml", reason="no YAML parser here")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"aggregator", "node"}
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
    assert "ports" not in services["node"]


def test_nginx_passes_the_fronts_own_list_and_nothing_else() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    found = re.search(r"location ~ \^/v1/fleet/\(([a-z|-]+)\)\$", text)
    assert found is not None
    assert {f"/v1/fleet/{name}" for name in found.group(1).split("|")} == FLEET_ROUTES
    assert re.findall(r"location (\S+ )?(\S+) \{", text)[0] == ("", "/")
    assert "location / { return 404; }" in text
    assert text.count("proxy_pass https://front;") == 2
