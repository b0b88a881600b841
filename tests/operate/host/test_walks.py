"""The manual's own walks, run as they are written: every command of a page's `console` blocks, from
first to last, in one folder.

What people add is added here: the port is a free one, a fingerprint is the one that `node join`
showed, a digest the one that `jobs submit` showed; and where a sentence of the page says that
something happens next (a node brings its offer, a contract reaches a node), that is awaited. The
grid example is made small: the same files and names, a tiny model and one round.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import write_job
from typer.testing import CliRunner
from world import COMMAND, free_port, until

from fedark.cli import app
from fedark.operate.processes import child_environment

DOCS = Path(__file__).parents[3] / "docs"
PROMPT = "{desk} desk: {message}."

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Walker:
    """Runs a page's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[str] = []
        self._port, self._digest = free_port(), ""
        self._fingerprints: dict[str, str] = {}
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def walk(self, page: Path) -> None:
        text = page.read_text()
        for name, content in re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, re.DOTALL):
            (self.folder / name).write_text(content)
        for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                assert line.startswith("$ "), line
                command = re.sub(r"\s+#.*", "", line[2:])
                if command.startswith("fedark broker"):
                    continue  # for certificates of one's own
                self._one(command)
                self.ran.append(command)

    def _one(self, command: str) -> None:
        words = command.split()
        real = command.replace("127.0.0.1:8443", f"127.0.0.1:{self._port}")
        real = real.replace("DIGEST", self._digest[:16])
        if words[:3] == ["fedark", "aggregator", "approve"]:
            asked = f"{words[4]} asks to join as"
            until(lambda: asked in self._log("HOST/supervisor/logs/front.log"), asked, 120)
            real = real.replace("...", self._fingerprints[words[4]])
        if words[:4] == ["fedark", "aggregator", "jobs", "submit"] and not self._digest:
            until(lambda: "the offer for job" in self._logs(), "the offer is brought", 120)
        if "DIGEST" in command and words[1] == "node":
            kept = f"{words[3]}/consent/{self._digest}.contract"
            until(lambda: (self.folder / kept).is_file(), "the contract comes", 120)
        if words[:3] == ["fedark", "node", "jobs"] and len(words) == 5:
            until(lambda: list(self.folder.glob(f"{words[3]}/consent/*.contract")), "it comes", 120)
        if words[:3] == ["fedark", "aggregator", "status"]:
            until(lambda: self._run(real)[0] == 0, "everything runs", 120)
        if words[1:3] == ["node", "doctor"]:
            until(lambda: "approved" in self._run(real)[1], "it has joined", 120)
        if words[-1] == "&":
            self._start(real.removesuffix("&"), words[3])
            return
        if words[1] == "example":
            _small_grid(self.folder / words[-1])
            return
        code, said = self._run(real)
        assert code == 0, (command, said, self._logs()[-6000:])
        if words[1:3] == ["node", "join"]:
            name = Path(words[3]).stem
            told = re.search(rf"{name} \(you tell them\): (.+)", said)
            assert told is not None, said
            self._fingerprints[name] = told[1].strip()
        if words[1:4] == ["aggregator", "jobs", "submit"]:
            self._digest = said.split()[-1]

    def _run(self, command: str) -> tuple[int, str]:
        """In this process: under load a fresh one takes longer to load than to work."""
        name, *arguments = shlex.split(command)
        assert name == "fedark"
        result = CliRunner().invoke(app, arguments)
        trouble = "" if isinstance(result.exception, SystemExit | None) else str(result.exception)
        return result.exit_code, result.output + trouble

    def _start(self, command: str, name: str) -> None:
        log = (self.folder / f"{name}.up.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, *shlex.split(command)[1:]],
            cwd=self.folder,
            env=child_environment({"OMP_NUM_THREADS": "1"}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self._running.append((name, process))

    def _log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.is_file() else ""

    def _logs(self) -> str:
        return "\n".join(self._log(path.name) for path in self.folder.glob("*.up.log"))

    def close(self) -> None:
        for _, process in reversed(self._running):
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        for _, process in self._running:
            process.wait(60)

    def errors(self) -> list[str]:
        """Lines of level ERROR, in any log of fedark."""
        paths = [*self.folder.glob("*.up.log"), *self.folder.rglob("logs/*.log")]
        lines = [line for path in paths for line in path.read_text().splitlines()]
        return [line for line in lines if '"level": "ERROR"' in line or "Traceback" in line]


def _small_grid(out: Path) -> None:
    customers = ("north-east", "north-west", "south")
    job = write_job(out, rounds=1, minimum=3, customers=customers)
    (out / "data").mkdir()
    for name in customers:
        (out / f"{name}.csv").rename(out / "data" / f"{name}.csv")
    text = job.read_text().replace('data = "', 'data = "data/')
    for old, new in (
        ('"small"', '"grid-dispatch"'),
        ('"maker"', '"gridworks"'),
        ('"pool"', '"dispatch-pool"'),
        ("{desk}: {message}", PROMPT),
    ):
        assert old in text
        text = text.replace(old, new)
    job.write_text(text)


@pytest.fixture
def walker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walker]:
    monkeypatch.chdir(tmp_path)
    made = Walker(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_the_manuals_walk_runs_as_it_is_written(walker: Walker) -> None:
    walker.walk(DOCS / "operate.md")
    assert len(walker.ran) >= 40
    found = list(walker.folder.glob("NORTH-EAST/runs/*/adapter-tiny/adapter_model.safetensors"))
    assert len(found) == 1
    assert str(found[0].parent) in walker._run("fedark node jobs NORTH-EAST")[1]
    walker.close()
    told = [line for line in walker.errors() if "The host has revoked south." not in line]
    assert told == [], "an orderly stop is no error"


def test_the_walk_of_two_companies_runs_as_it_is_written(walker: Walker) -> None:
    write_job(walker.folder / "made")
    (walker.folder / "made" / "base").rename(walker.folder / "base")
    walker.walk(DOCS / "tutorials" / "two-companies.md")
    for name in ("ACME", "VOLT"):
        assert list(walker.folder.glob(f"{name}/runs/*/adapter-encoder/adapter_config.json"))


def test_the_manuals_prompt_is_the_examples_own() -> None:
    examples = Path(__file__).parents[3] / "examples" / "grid"
    assert f'PROMPT = "{PROMPT}"' in (examples / "bases.py").read_text()
    assert (DOCS / "operate.md").read_text().count(f"--prompt '{PROMPT}'") == 3
