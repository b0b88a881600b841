"""Every top folder of the package is one idea: lower never imports upper, and none of them holds a
quarter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fedark"


def _lines(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def test_no_folder_holds_a_quarter_of_the_code() -> None:
    folders = {
        path.name: _lines(path) for path in PACKAGE.iterdir() if (path / "__init__.py").exists()
    }
    total = sum(folders.values())
    assert {name: lines for name, lines in folders.items() if 4 * lines >= total} == {}


def test_every_package_says_what_is_here() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("__init__.py")
        if path.parent.name != "v1" and not path.read_text().startswith('"""')
    ]
    assert silent == []


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "cli.aggregator",
        "cli.node",
        "links.flower.client_app",
        "links.flower.server_app",
        "links.flower.supernode",
        "operate.broker.server",
        "operate.daemon",
        "operate.host.front",
        "operate.host.supervisor",
        "operate.host.work",
        "operate.node.serve",
        "operate.node.supervisor",
        "simulation.machine",
    ],
)
def test_what_relays_or_supervises_loads_no_model_library(module: str) -> None:
    """Each would take 400 MB and many seconds to start."""
    script = (
        f"import sys, fedark.{module};"
        "heavy = ('torch', 'transformers', 'peft', 'opacus');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
