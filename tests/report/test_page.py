"""The page of a run: whole, without script or network, and no text of a party is markup."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small import write_job
from typer.testing import CliRunner

from fedark.cli import app
from fedark.contract.job import Job
from fedark.report.outcome import local_reports
from fedark.report.page import interval, page
from fedark.report.verify import Proven, Verified, verify_dossier
from fedark.simulation import simulate
from fedark.stages.dossier import DOSSIER

_EMPTY = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "circle"}


class _Page(HTMLParser):
    """Collects elements, and fails on one that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _read(text: str) -> _Page:
    parser = _Page()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verified]:
    folder = tmp_path_factory.mktemp("page")
    job = Job.load(write_job(folder / "job", minimum=3), ('protection.mode="masked"',))
    with simulate(job, folder / "work") as running:
        running.run()
        path = running.federation.folder("maker") / "runs" / running.run_id / DOSSIER
    return path, verify_dossier(path.read_bytes())


def test_a_page_tells_the_figures_of_the_dossier(run: tuple[Path, Verified]) -> None:
    verified = run[1]
    text = page(verified)
    shown = _read(text)
    metrics = verified.report["models"]["tiny"]["metrics"]
    for when in ("before", "local", "federated"):
        entry = metrics[f"{when}/acceptance/north"]
        assert f"{100 * entry['correct'] / entry['total']:.1f}" in shown.text
    for proven in verified.proven:
        assert proven.what in shown.text
    for line in verified.trusted:
        assert line in shown.text
    assert page(verified) == text


def test_a_page_loads_nothing_and_is_told_to_those_who_do_not_see_it(
    run: tuple[Path, Verified],
) -> None:
    text = page(run[1])
    shown = _read(text)
    names = [tag for tag, _ in shown.tags]
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(names)
    outward = re.findall(r'(?:src|href|xlink:href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert all(target.startswith("#") for target in outward), outward
    assert not [name for _, attrs in shown.tags for name in attrs if name.startswith("on")]
    pictures = [attrs for tag, attrs in shown.tags if tag == "svg"]
    assert pictures
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for attrs in pictures)
    headings = [int(name[1]) for name in names if re.fullmatch(r"h[1-6]", name)]
    assert headings[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(headings))
    assert "<html lang=" in text


def test_ids_of_several_pictures_do_not_meet(run: tuple[Path, Verified]) -> None:
    shown = _read(page(run[1]))
    ids = [attrs["id"] for _, attrs in shown.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_no_text_of_a_party_is_markup(run: tuple[Path, Verified]) -> None:
    """Names of models and labels, and what customers failed at, come from strangers."""
    verified = run[1]
    evil = '"><script>alert(1)</script>$x^2$ &amp; <svg onload=x>'
    report = dict(verified.report)
    model = dict(report["models"]["tiny"])
    model |= {"taken": evil, "alone": evil, "task": evil}
    judged = model["judged"]["federated"]
    labels = [evil, *judged["labels"][1:]]
    model["judged"] = {"federated": judged | {"labels": labels}}
    model["metrics"] = {
        key.replace("/north", f"/{evil}"): value for key, value in model["metrics"].items()
    } | {"before/acceptance/b": {"correct": 1, "total": 2, "loss": 0.0}}
    report |= {"models": {evil: model}, "passed_over": {evil: evil}}
    changed = Verified(
        verified.contract, report, verified.proven, verified.trusted, verified.adapters
    )
    shown = _read(page(changed, {evil: {evil: {"before/own": [1, 2, 0.1]}}}))
    assert not {"script"} & {tag for tag, _ in shown.tags}
    assert not [name for _, attrs in shown.tags for name in attrs if name.startswith("on")]


def test_candidates_are_compared_where_there_are_several_and_refusals_are_told(
    run: tuple[Path, Verified],
) -> None:
    verified = run[1]
    model = verified.report["models"]["tiny"]
    report = dict(verified.report) | {"models": {"one": model, "two": model}}
    proven = (*verified.proven, Proven("the enclave of west was refused", "maker"))
    shown = _read(page(Verified(verified.contract, report, proven, verified.trusted, {}))).text
    assert "The candidates" in shown
    assert "one, classification" in shown
    assert "the enclave of west was refused; the provider's log says so" in shown
    assert "1 refusals, in the provider's log" in shown
    alone = _read(page(verified)).text
    assert "The candidates" not in alone
    assert "was refused" not in alone


def test_a_candidate_is_shown_by_all_groups_of_the_acceptance_set(
    run: tuple[Path, Verified],
) -> None:
    verified = run[1]
    counts = {"a": {"correct": 10, "total": 10}, "b": {"correct": 1, "total": 30}}
    model = dict(verified.report["models"]["tiny"]) | {
        "metrics": {f"before/acceptance/{group}": found for group, found in counts.items()}
    }
    report = dict(verified.report) | {"models": {"one": model, "two": model}, "curve": {}}
    made = page(Verified(verified.contract, report, verified.proven, verified.trusted, {}))
    (row,) = re.findall(r'<tr><th scope="row">one, .*?</tr>', made)
    assert "27.5 " in row  # 11 of 40
    assert "acceptance: all" in _read(made).text


def test_a_page_without_figures_says_so(run: tuple[Path, Verified]) -> None:
    verified = run[1]
    model = dict(verified.report["models"]["tiny"]) | {
        "metrics": {},
        "judged": {},
        "train_loss": [],
    }
    report = dict(verified.report) | {"models": {"tiny": model}}
    shown = _read(page(Verified(verified.contract, report, verified.proven, verified.trusted, {})))
    assert "it has no figures" in shown.text


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0), (50, 100, 40.4, 59.6)],
)
def test_intervals_are_wilsons(right: float, total: float, low: float, high: float) -> None:
    """Figures: Newcombe, Statistics in Medicine 17 (1998), and R's prop.test(correct=FALSE)."""
    assert interval(right, total) == pytest.approx((low, high), abs=0.06)


def test_the_command_writes_the_page_of_a_dossier_that_holds(
    run: tuple[Path, Verified], tmp_path: Path
) -> None:
    out, runner = tmp_path / "a page.html", CliRunner()
    told = runner.invoke(app, ["report", str(run[0]), "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert _read(out.read_text()).text
    lie = tmp_path / "lie.fedark"
    lie.write_bytes(run[0].read_bytes()[:-1] + b"x")
    refused = runner.invoke(app, ["report", str(lie)])
    assert refused.exception is not None
    assert not (tmp_path / "report.html").exists()


def test_a_simulation_shows_own_figures_too(run: tuple[Path, Verified]) -> None:
    path, verified = run
    work = path.parents[4]
    local = local_reports(verified.contract, work, verified.report["run_id"])
    text = _read(page(verified, local)).text
    assert {"north", "east", "south"} == set(re.findall(r"own records of ([a-z]+)", text))
