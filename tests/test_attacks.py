"""Every attack of the list has a test, and the table says truthfully what happened."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import attacks
import pytest
from attacks import ATTACKS, marks, probed

from fedark.errors import EvidenceRefused, ProtocolError

TESTS = Path(__file__).parent


def test_every_attack_of_the_list_has_a_test_and_no_test_is_of_an_attack_that_is_not_listed() -> None:
    listed = [name for names in ATTACKS.values() for name in names]
    assert len(set(listed)) == len(listed)
    assert set(marks(TESTS)) == set(listed)


def test_every_attack_on_the_sandbox_is_tried_in_each_mode() -> None:
    found = marks(TESTS)
    for name in ATTACKS["sandbox"]:
        assert any(_in_each_mode(place) for place in found[name]), name


def _in_each_mode(place: str) -> bool:
    path, _, function = place.partition("::")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    (node,) = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef) and one.name == function]
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return "inmate" in [arg.arg for arg in node.args.args] or "parametrize('mode', MODES" in decorators


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[attacks.Row, bool]]:
    rows: dict[attacks.Row, bool] = {}
    monkeypatch.setattr(attacks, "_rows", rows)
    monkeypatch.setattr(attacks, "_active", [])
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
    attacks.pytest_runtest_logreport(type("Report", (), {"when": "call", "user_properties": item.user_properties})())


def refuse() -> None:
    with pytest.raises(EvidenceRefused):
        raise EvidenceRefused("x", ["its nonce was used before"])
    ProtocolError("a later error that is no refusal")


def test_a_row_says_the_refusal_that_was_raised(clean: dict[attacks.Row, bool]) -> None:
    run(_Item(pytest.mark.attack("replayed nonce").mark), refuse)
    assert clean == {("replayed nonce", "", "EvidenceRefused: its nonce was used before"): True}
    assert "| replayed nonce | - | EvidenceRefused: its nonce was used before |" in attacks.table()


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
