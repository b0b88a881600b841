"""The attacks that a reviewer asks for, by name, and a table of what refused each of them when the
tests ran.

A test says which attack it is: `@pytest.mark.attack("replayed nonce")`, or, where its parameters
are several attacks, `@pytest.mark.attack({"mount": "mount"}, param="name")`. What refused it is
recorded from what happened: the last refusal that was raised (`fedark.foundation.errors`), what a
probe inside the sandbox got, or what the test tells the fixture `refusal`. Where a test also has a
control, or several acts, each act stands in a `with refusing():`, and only what is raised inside
counts. When all marked tests ran, build/attacks.md has the table; docs/attacks.md is a copy of it.
`test_attacks.py` compares the marks with `ATTACKS` and with that copy: an attack whose test is gone
fails the suite.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedark.foundation.errors import FedarkError, Refused

ATTACKS = {
    "sandbox": (
        "TCP socket", "UDP socket", "unix socket", "vsock socket", "netlink socket",
        "reading passwd", "reading home",
        "reading another customer's data", "writing outside scratch", "exec",
        "fork, and with it a fork bomb", "ptrace",
        "process_vm_readv out of the enclave", "process_vm_readv into the enclave", "kill",
        "unshare", "mount", "io_uring", "bpf",
        "keyctl", "shm", "memfd", "raising rlimits", "memory bomb", "full scratch",
        "inherited descriptors", "clone3",
        "namespaces by clone", "x32 calls", "mode downgrade", "another filter",
        "a process of the same user reading memory",
        "names of threads as a way out", "the command line as a way out",
        "evicted pages of a shared file as a way out",
        "waking a waiter on a shared file as a way out", "the umask as a way out",
    ),
    "evidence": (
        "wrong nonce", "replayed nonce", "expired nonce", "swapped keys", "algorithm substitution",
        "algorithm none",
        "bad length of r and s", "unprotected algorithm", "wrong root", "expired certificate",
        "revoked certificate",
        "intermediate with CA:false", "debug mode", "low security version", "wrong role",
        "duplicate CBOR key", "trailing bytes",
        "oversized", "nested too deep", "clock skew", "hardware below the contract's terms",
        "an enclave that its party did not start",
    ),
    "release": (
        "second enclave", "second run", "each field altered by the relay", "before the log append",
        "chunk truncation",
        "chunks reordered", "chunk repeated or left out", "substituted weights", "KEM downgrade",
        "concurrent use of a nonce",
        "verifier crash and restart", "filling the provider's log", "a signing key of small order",
    ),
    "host": (
        "slow connections from one address", "half-sent requests from many addresses",
        "a request that drips", "a large body before authentication", "request smuggling",
        "another account of the machine at sockets, files and processes",
    ),
    "lease": (
        "expired lease", "clock set back", "clock stopped", "clock before the grant",
        "lease of another model", "token budget replayed after a restart", "replayed lease grant",
        "a trainer's grant for inference", "a lease's grant for training",
        "a trainer that asks for a lease", "an inference enclave that trains",
        "another owner's adapter", "a lease against the release policy", "revoked lease",
        "an enclave that is not the leased one",
    ),
    "adapters": (
        "a start of numbers that harm", "a start of another shape or base",
        "a start with links or pickles", "another start in the bundle than in the contract",
        "personal adapters without the delivery that they were made from",
        "the size of messages as a sign of which adapter was chosen",
        "a scaled update of a broken enclave", "a scaled update against a robust mean",
        "a backdoor's trigger, scaled", "flipped labels of one customer in eight",
        "a withdrawal that left the customer in", "a forged statement of a withdrawal",
    ),
    "serving": ("another owner's adapter asked for",),
    "taster": (
        "reading a customer's moments on their way", "a taster's round under a mechanism",
        "moments as an update, and an update as moments", "moments that no records have",
        "a second taster's round",
    ),
}  # fmt: skip

_BY = {
    "EPERM": "system call filter (EPERM)",
    "ENOSYS": "system call filter (ENOSYS)",
    "EACCES": "landlock (EACCES)",
    "ENOENT": "not in the private root (ENOENT)",
    "EROFS": "read-only root, or no scratch (EROFS)",
    "PermissionError": "no capability (EPERM)",
    "ValueError": "hard limit (EINVAL)",
}
_WIDTH = 300
_INMATES = (
    "landlock, ordinary user",
    "landlock, own user",
    "namespaces, ordinary user",
    "namespaces, own user",
)
_MODES = ("landlock", "namespaces")

Row = tuple[str, str, str]  # attack, mode, refused by

_rows: dict[Row, bool] = {}
_active: list[_Recorder] = []
_ran: set[str] = set()


class _Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.raised: list[FedarkError] = []
        self.acts: list[str] = []

    def text(self) -> str:
        if self.acts:
            return "; ".join(dict.fromkeys(self.acts)) if all(self.acts) else ""
        return "; ".join(dict.fromkeys(self.told)) or self.said(0)

    def said(self, since: int) -> str:
        """The last refusal among what was raised, the first `since` left out."""
        raised = self.raised[since:]
        refusals = [error for error in raised if isinstance(error, Refused)] or raised
        if not refusals:
            return ""
        error = refusals[-1]
        reasons = getattr(error, "reasons", ())
        head, *rest = error.what.splitlines()
        said = str(
            reasons[0]
            if reasons
            else f"{head} {rest[0].strip(' -')}"
            if rest and head.endswith(":")
            else head
        )
        return f"{type(error).__name__}: {said}"


def probed(result: object) -> None:
    """What a probe inside the sandbox got."""
    if _active and isinstance(result, str) and result in _BY:
        _active[-1].told.append(_BY[result])


@contextmanager
def refusing() -> Iterator[None]:
    """Around an act of a marked test: what is raised outside of all of them is of the set-up, or of
    a control.
    """
    if not _active:
        yield
        return
    recorder = _active[-1]
    since = len(recorder.raised)
    yield
    recorder.acts.append(recorder.said(since))


@pytest.fixture
def refusal() -> Callable[[str], None]:
    """Tells the table what refused an attack that ends in no error; to be called after the test has
    seen it happen.
    """
    return lambda text: _active[-1].told.append(text) if _active else None


def names_of(item: pytest.Item) -> list[str]:
    """The attacks that a test is, with its parameters."""
    found = []
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("attack"):
        (what,) = mark.args
        if isinstance(what, str):
            found.append(what)
        elif not mark.kwargs.get("where", {}).items() <= params.items():
            continue
        elif params.get(mark.kwargs["param"]) in what:
            found.append(what[params[mark.kwargs["param"]]])
    return found


def _mode(item: pytest.Item) -> str:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "inmate" in params:
        mode, _, user = params["inmate"].partition("-")
        return f"{mode}, {'ordinary user' if user == 'nobody' else 'own user'}"
    for mark in item.iter_markers("attack"):
        if "mode" in mark.kwargs:
            return str(mark.kwargs["mode"])
    return params["mode"] if isinstance(params.get("mode"), str) else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record what refuses a marked test's attack."""
    names = names_of(item)
    if not names:
        return (yield)
    recorder, made = _Recorder(), FedarkError.__init__

    def watched(self: FedarkError, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        recorder.raised.append(self)

    _active.append(recorder)
    FedarkError.__init__ = watched  # type: ignore[method-assign]
    good = False
    try:
        result = yield
        good = True
        return result
    except pytest.skip.Exception:
        names = []
        raise
    finally:
        FedarkError.__init__ = made  # type: ignore[method-assign]
        _active.remove(recorder)
        text = recorder.text()
        for name in names:
            row = [name, _mode(item), text if good and text else "NOT REFUSED"]
            item.user_properties.append(("attack", [row, good and bool(text)]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what was recorded, from other processes too."""
    _ran.add(report.nodeid.removeprefix("tests/").partition("[")[0])
    if report.when == "call":
        for kind, value in report.user_properties:
            if kind == "attack":
                row, good = value
                _rows[tuple(row)] = _rows.get(tuple(row), True) and good


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the table and say where it is."""
    if not _rows:
        return
    every = [name for names in ATTACKS.values() for name in names]
    seen = {name for name, _, _ in _rows}
    bad = sorted({name for (name, _, _), good in _rows.items() if not good})
    path = config.rootpath / "build" / "attacks.md"
    said = f"table in {path.relative_to(config.rootpath)}"
    if marked(config.rootpath / "tests") <= _ran:
        path.parent.mkdir(exist_ok=True)
        path.write_text(table(), encoding="utf-8")
    else:
        said = "not all their tests ran, so no table was written"
    line = f"attacks: {len(seen)} of {len(every)} tried, {len(seen) - len(bad)} refused; {said}"
    terminalreporter.write_line(
        f"{line}; NOT REFUSED: {', '.join(bad)}" if bad else line, red=bool(bad)
    )


def table() -> str:
    """The table of what has been tried so far, in Markdown."""
    lines = [
        "# Attacks, and what refused them",
        "",
        "Written by the tests (`tests/attacks.py`).",
        "",
    ]
    for group, names in ATTACKS.items():
        lines += [f"## {group.capitalize()}", "", "| attack | mode | refused by |", "|---|---|---|"]
        for name in names:
            by_mode: dict[str, list[str]] = {}
            for attack, mode, text in _rows:
                if attack == name:
                    by_mode.setdefault(mode, []).append(text)
            for mode, texts in sorted(by_mode.items()):
                shown = "; ".join(
                    dict.fromkeys(part for text in texts[:4] for part in text.split("; "))
                )
                more = f" (and {len(texts) - 4} more)" if len(texts) > 4 else ""
                lines.append(f"| {name} | {mode or '-'} | {_plain(shown)}{more} |")
            if not by_mode:
                lines.append(f"| {name} | - | not tried in this run |")
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    text = re.sub(r"(/[\w.-]+){3,}", "...", text)  # folders of the machine that ran the tests
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def marks(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Attack -> (mode, "file::function") of its marked tests, read from their sources."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.attack" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            for decorator in getattr(node, "decorator_list", []):
                if (
                    isinstance(decorator, ast.Call)
                    and ast.unparse(decorator.func) == "pytest.mark.attack"
                ):
                    what = ast.literal_eval(decorator.args[0])
                    for name in [what] if isinstance(what, str) else what.values():
                        place = f"{path.relative_to(folder)}::{node.name}"
                        found.setdefault(name, []).extend(
                            (mode, place) for mode in _modes(node, decorator)
                        )
    return found


def marked(folder: Path) -> set[str]:
    """Every marked test, as "file::function"."""
    return {place for places in marks(folder).values() for _, place in places}


def _modes(node: Any, mark: ast.Call) -> tuple[str, ...]:
    """Those of a marked test, as `_mode` finds them in its parameters when it runs."""
    if "inmate" in [argument.arg for argument in node.args.args]:
        return _INMATES
    for keyword in mark.keywords:
        if keyword.arg == "mode":
            return (ast.literal_eval(keyword.value),)
    each = any(
        ast.unparse(decorator).startswith("pytest.mark.parametrize('mode', MODES")
        for decorator in node.decorator_list
    )
    return _MODES if each else ("",)
