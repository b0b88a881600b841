"""What the documentation says stands on something: its links lead somewhere, and its generated
pages are built from today's code.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    targets = (name for name in LINK.findall(page.read_text()) if "://" not in name)
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_the_reference_says_what_every_key_of_a_job_file_means() -> None:
    specification = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert specification is not None
    assert specification.loader is not None
    site = importlib.util.module_from_spec(specification)
    pytest.importorskip("mkdocs")
    specification.loader.exec_module(site)
    rows = [line for line in site.job_file().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert [line for line in rows if line.endswith("|  |")] == []
