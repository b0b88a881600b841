"""Hosts and nodes make the page of each run that ended, once, and outlive whatever comes of it."""

from __future__ import annotations

import time
from pathlib import Path

from fedark.operate.pages import PAGE, Pages
from fedark.stages.dossier import DOSSIER, OWN


def _look(pages: Pages, said: list[str]) -> None:
    deadline = time.monotonic() + 120
    while not said and time.monotonic() < deadline:
        pages.look()
        time.sleep(0.05)


def test_a_dossier_that_does_not_hold_gives_no_page_and_is_said_once(tmp_path: Path) -> None:
    run, said = tmp_path / "runs" / "one", list[str]()
    run.mkdir(parents=True)
    (run / DOSSIER).write_bytes(b"no dossier")
    with Pages(tmp_path / "runs", tmp_path, said.append) as pages:
        pages.look()  # the run is not over: its report is missing
        (run / "report.json").write_text("{}")
        _look(pages, said)
        assert "no report page was written" in said[0]
        assert "dossier does not hold" in said[0]
        for _ in range(3):
            pages.look()
        assert len(said) == 1
    assert not (run / PAGE).exists()


def test_a_customers_page_waits_for_its_own_dossier(tmp_path: Path) -> None:
    run, said = tmp_path / "runs" / "one", list[str]()
    run.mkdir(parents=True)
    for name in (DOSSIER, "report.json"):
        (run / name).write_text("no dossier")
    with Pages(tmp_path / "runs", tmp_path, said.append, own=True) as pages:
        pages.look()
        assert pages._child is None
        (run / OWN).write_bytes(b"no dossier")
        _look(pages, said)
    assert "no report page was written" in said[0]


def test_a_page_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    run, said = tmp_path / "runs" / "one", list[str]()
    run.mkdir(parents=True)
    for name in (DOSSIER, "report.json", PAGE):
        (run / name).write_text("mine")
    with Pages(tmp_path / "runs", tmp_path, said.append) as pages:
        pages.look()
        pages.look()
    assert said == []
    assert (run / PAGE).read_text() == "mine"
