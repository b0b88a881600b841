"""The page as people see it: in Chromium on a phone and a desk, light and dark, on paper, without
styles. Skipped where Chromium is not installed; axe-core's rules where it is not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, find
from small import write_job

from fedark.contract.job import Job
from fedark.report.writing import write_page
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER, OWN

pytestmark = pytest.mark.skipif(find() is None, reason="Chromium is not installed")
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run: the shared one, and a customer's own."""
    folder = tmp_path_factory.mktemp("pages")
    path = write_job(folder / "job", minimum=3, curve="every = 1")
    with simulate(Job.load(path), folder / "work") as running:
        running.run()
        run = running.federation.folder("north") / "runs" / running.run_id
    return {
        name: write_page(run / source, folder / f"{name}.html")
        for name, source in (("shared", DOSSIER), ("own", OWN))
    }


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_and_says_nothing_to_the_console(
    chromium: Browser, pages: dict[str, Path], width: int, dark: bool
) -> None:
    for page in pages.values():
        chromium.said.clear()
        chromium.open(page, width=width, dark=dark)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        assert chromium.run("document.body.scrollWidth") <= width
        assert chromium.said == []
        paper = chromium.run("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") != dark


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not installed (AXE_CORE names its file)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_breaks_no_rule_of_accessibility(
    chromium: Browser, pages: dict[str, Path], width: int, dark: bool
) -> None:
    """Contrast, text alternatives, headings, names of regions: axe-core's rules, all of them."""
    for page in pages.values():
        chromium.open(page, width=width, dark=dark)
        chromium.run(AXE.read_text("utf-8"))
        found = json.loads(
            chromium.run(
                "axe.run(document).then(found => JSON.stringify(found.violations.map("
                "one => [one.id, one.nodes.map(node => node.html.slice(0, 200))])))"
            )
        )
        assert found == []


def test_the_rules_find_a_page_that_breaks_them(chromium: Browser, tmp_path: Path) -> None:
    """The control: what the tests above ask would see it."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><html><title>x</title><body style='color:#999'>"
        "<div style='width:2000px'>wide</div><script>missing()</script></body></html>"
    )
    chromium.said.clear()
    chromium.open(broken, width=390)
    assert chromium.run("document.documentElement.scrollWidth") > 390
    assert chromium.said
    if AXE.is_file():
        chromium.run(AXE.read_text("utf-8"))
        found = chromium.run("axe.run(document).then(found => found.violations.map(one => one.id))")
        assert {"color-contrast", "html-has-lang"} <= set(found)


def test_a_page_is_read_without_styles(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["shared"], width=390, styles=False)
    text = chromium.run("document.body.innerText")
    parts = (
        "tuned tiny together",
        "Learning curve",
        "Privacy",
        "Who released what to whom",
        "Time and bytes",
        "What is proven",
        "What rests on trust",
        "Check it yourself",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_a_page_prints_on_a4(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["shared"], width=1280, dark=True)
    printed = chromium.pdf()
    sizes = {
        tuple(round(float(number)) for number in found.split())
        for found in re.findall(rb"/MediaBox\s*\[([^\]]+)\]", printed)
    }
    assert sizes == {(0, 0, 595, 842)}  # points
    assert 1 < printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 8


def test_an_own_page_shows_what_concerns_this_customer_alone(pages: dict[str, Path]) -> None:
    shared, own = (pages[name].read_text("utf-8") for name in ("shared", "own"))
    assert "own records of north" in own
    assert "own records of north" not in shared
    assert "own records of east" not in own
    assert "the own figures of north" in own
