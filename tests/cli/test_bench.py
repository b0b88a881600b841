"""`fedark bench`: one JSON object or one table, and no benchmark that does not exist."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

import fedark.bench
from fedark.bench import Row
from fedark.cli import bench as command
from fedark.foundation.errors import InputError

app = typer.Typer()
app.command()(command.bench)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A benchmark named `quick`, found as the others are."""

    def rows() -> Iterator[Row]:
        yield Row("a case", 4.0, 5.0, "GB/s", 0.8, ">= 0.60", True)
        yield Row("without a peer", 1.5, None, "s")
        yield Row("missed", 1.0, 5.0, "GB/s", 0.2, ">= 0.60", False)

    (tmp_path / "quick.py").touch()
    module = ModuleType("fedark.bench.quick")
    module.rows = rows  # type: ignore[attr-defined]
    monkeypatch.setattr(fedark.bench, "__path__", [*fedark.bench.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "fedark.bench.quick", module)


@pytest.mark.usefixtures("quick")
def test_json_is_one_object_with_machine_and_rows() -> None:
    result = json.loads(CliRunner().invoke(app, ["quick", "--json"]).output)
    assert set(result) == {"bench", "machine", "rows"}
    assert set(result["rows"][0]) == {"case", "ours", "peer", "unit", "ratio", "goal", "ok"}
    assert (result["rows"][1]["peer"], result["rows"][1]["ok"]) == (None, None)


@pytest.mark.usefixtures("quick")
def test_the_table_says_which_goals_were_met() -> None:
    lines = CliRunner().invoke(app, ["quick"]).output.splitlines()
    assert lines[2].endswith(">= 0.60  met")
    assert lines[4].endswith("MISSED")
    assert len(lines) == 5


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    result = CliRunner().invoke(app, ["os"])
    assert isinstance(result.exception, InputError)
    assert "seal" in result.exception.fix
