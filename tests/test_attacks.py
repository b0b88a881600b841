"""Every attack of the list has a test, and the table says truthfully what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attacks
import pytest
from attacks import ATTACKS, marks, probed, refusing

from fedark.foundation.errors import EvidenceRefused, ProtocolError

TESTS = Path(__file__).parent


def test_every_attack_of_the_list_has_a_test_and_no_test_is_of_an_attack_that_is_not_listed() -> (
    None
):
    listed = [name for names in ATTACKS.values() for name in names]
    assert len(set(listed)) == len(listed)
    assert set(marks(TESTS)) == set(listed)


def test_every_attack_on_the_sandbox_is_tried_in_each_mode() -> None:
    found = marks(TESTS)
    for name in ATTACKS["sandbox"]:
        assert {mode.partition(",")[0] for mode, _ in found[name]} == {"landlock", "namespaces"}, (
            name
        )


def test_the_table_in_the_documentation_has_each_attack_in_each_mode_and_each_was_refused() -> None:
    text = (TESTS.parent / "docs" / "attacks.md").read_text(encoding="utf-8")
    cells = [
        [cell.strip() for cell in line.split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    shown = [
        (row[0].removeprefix("| "), row[1].replace("-", "") if row[1] == "-" else row[1])
        for row in cells
    ]
    expected = {(name, mode) for name, places in marks(TESTS).items() for mode, _ in places}
    assert {row for row in shown if row[0] != "attack"} == expected, (
        "copy build/attacks.md to docs/ after a whole run"
    )
    assert "NOT REFUSED" not in text
    assert "not tried" not in text


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[attacks.Row, bool]]:
    rows: dict[attacks.Row, bool] = {}
    monkeypatch.setattr(attacks, "_rows", rows)
    monkeypatch.setattr(attacks, "_active", [])
    monkeypatch.setattr(attacks, "_ran", set())
    return rows


class _Item:
    def __init__(self, *marked: pytest.Mark, **params: object) -> None:
        self._marked = marked
        self.user_properties: list[tuple[str, object]] = []
        self.callspec = type("Spec", (), {"params": params})()

    def iter_markers(self, name: str) -> Iterator[pytest.Mark]:
        return iter(self._marked)


def run(item: _Item, act: object) -> None:
    hook = attacks.pytest_runtest_call(item)  # type: ignore[arg-type]
    next(hook)
    try:
        act()  # type: ignore[operator]
    except Exception as error:
        with pytest.raises(type(error)):
            hook.throw(error)
    else:
        with pytest.raises(StopIteration):
            hook.send(None)
    report = {
        "when": "call",
        "user_properties": item.user_properties,
        "nodeid": "tests/test_x.py::test_y[z]",
    }
    attacks.pytest_runtest_logreport(type("Report", (), report)())


def refuse() -> None:
    with pytest.raises(EvidenceRefused):
        raise EvidenceRefused("x", ["its nonce was used before"])
    ProtocolError("a later error that is no refusal")


def test_a_row_says_the_refusal_that_was_raised(clean: dict[attacks.Row, bool]) -> None:
    run(_Item(pytest.mark.attack("replayed nonce").mark), refuse)
    assert clean == {("replayed nonce", "", "EvidenceRefused: its nonce was used before"): True}
    assert "| replayed nonce | - | EvidenceRefused: its nonce was used before |" in attacks.table()


def test_of_a_test_with_a_control_a_row_says_what_refused_the_acts(
    clean: dict[attacks.Row, bool],
) -> None:
    def act() -> None:
        with refusing():
            refuse()
        for _ in range(2):
            with refusing(), pytest.raises(EvidenceRefused):
                raise EvidenceRefused("x", ["it is another"])
        with pytest.raises(EvidenceRefused):
            raise EvidenceRefused("x", ["the control"])

    run(_Item(pytest.mark.attack("replayed nonce").mark), act)
    said = "EvidenceRefused: its nonce was used before; EvidenceRefused: it is another"
    assert clean == {("replayed nonce", "", said): True}


def test_an_act_that_nothing_refused_is_said_to_be_not_refused(
    clean: dict[attacks.Row, bool],
) -> None:
    def act() -> None:
        with refusing():
            refuse()
        with refusing():
            pass

    run(_Item(pytest.mark.attack("exec").mark), act)
    assert clean == {("exec", "", "NOT REFUSED"): False}


def test_a_run_of_some_of_the_tests_leaves_the_table_of_all(
    clean: dict[attacks.Row, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        attacks, "marked", lambda folder: {"test_x.py::test_y", "test_x.py::test_z"}
    )
    lines: list[str] = []
    reporter = type("Reporter", (), {"write_line": lambda self, line, red: lines.append(line)})()
    config: Any = type("Config", (), {"rootpath": tmp_path})()
    table = tmp_path / "build" / "attacks.md"
    table.parent.mkdir()
    table.write_text("whole")
    run(_Item(pytest.mark.attack("replayed nonce").mark), refuse)
    attacks.pytest_terminal_summary(reporter, config)
    assert table.read_text() == "whole"
    every = sum(map(len, ATTACKS.values()))
    assert lines == [
        f"attacks: 1 of {every} tried, 1 refused; not all their tests ran, so no table was written"
    ]
    attacks._ran.add("test_x.py::test_z")
    attacks.pytest_terminal_summary(reporter, config)
    assert (
        "| replayed nonce | - | EvidenceRefused: its nonce was used before |" in table.read_text()
    )


def test_a_row_says_what_a_probe_got_and_in_which_mode(clean: dict[attacks.Row, bool]) -> None:
    mark = pytest.mark.attack({"mount": "mount"}, param="name").mark
    run(_Item(mark, name="mount", inmate="landlock-nobody"), lambda: probed("EPERM"))
    run(_Item(mark, name="reboot", inmate="landlock-nobody"), lambda: probed("EPERM"))
    assert clean == {("mount", "landlock, ordinary user", "system call filter (EPERM)"): True}


@pytest.mark.parametrize("act", [lambda: None, lambda: probed("ok"), lambda: [][0]])
def test_an_attack_that_nothing_refused_or_whose_test_failed_is_said_to_be_not_refused(
    clean: dict[attacks.Row, bool], act: object
) -> None:
    run(_Item(pytest.mark.attack("exec").mark), act)
    assert clean == {("exec", "", "NOT REFUSED"): False}
