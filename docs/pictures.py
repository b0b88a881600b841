"""`make pictures`: the pictures of the report page in the documentation, from a run that is made
for them: docs/report-phone.png, docs/report-dark.png and docs/live.svg.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("report", "stages")]

from browser import browser  # noqa: E402
from small import write_job  # noqa: E402

from fedark.cli.live import View  # noqa: E402
from fedark.contract.job import Job  # noqa: E402
from fedark.report.writing import write_page  # noqa: E402
from fedark.simulation import simulate  # noqa: E402
from fedark.stages.dossier import OWN  # noqa: E402


def main() -> None:
    docs = ROOT / "docs"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = Job.load(write_job(folder / "job", rounds=4, minimum=3, curve="every = 1"))
        view, drawn = View(Console(), quiet=True), list[str]()

        def say(text: str) -> None:
            view(text)
            if "loss" in text and view.progress.round == 3 and not drawn:
                console = Console(record=True, width=100, file=io.StringIO())
                console.print(view.drawn())
                drawn.append(console.export_svg(title="fedark simulate", unique_id="fedark"))

        with simulate(job, folder / "work", say=say) as running:
            running.run()
            run = running.federation.folder("north") / "runs" / running.run_id
        (docs / "live.svg").write_text(drawn[0], encoding="utf-8")
        page = write_page(run / OWN, folder / "page.html")
        with browser(folder / "chromium") as chromium:
            for width, dark, out in ((390, False, "phone"), (1280, True, "dark")):
                chromium.open(page, width=width, dark=dark)
                (docs / f"report-{out}.png").write_bytes(chromium.picture(height=1500))


if __name__ == "__main__":
    main()
