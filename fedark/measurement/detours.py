"""Files that would lead an enclave's interpreter past what is measured: an enclave starts only
where there are none of them.

Before the first line of an enclave runs, Python's start (CPython, Modules/getpath.py) and the
dynamic loader (ld.so(8)) have looked for these, and code from there would run under genuine
evidence:
- the standard library as an archive, in the prefix or in any folder above the interpreter: it comes
  first on `sys.path`;
- a standard library nearer to the interpreter than the one that is measured;
- `pyvenv.cfg`, `._pth`, and the marks of a build folder, each of which names another standard
  library;
- `/etc/ld.so.preload`, which loads shared objects into every process.
No installation of Python has them, so they are refused rather than measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedark.foundation.errors import Refused

__all__ = ["PRELOAD", "detours", "refuse_detours"]

PRELOAD = "/etc/ld.so.preload"


def detours(python: Path, library: Path) -> tuple[Path, ...]:
    """Where such files would be, whether or not they are there.

    Args:
        python: the interpreter that is executed.
        library: the folder of the standard library that is measured.
    """
    return (
        Path(PRELOAD),
        *dict.fromkeys(
            (*_archives(python, library), *_nearer(python, library), *_redirections(python))
        ),
    )


def refuse_detours(paths: Iterable[Path]) -> None:
    """Refuse what is there of `paths`; an `/etc/ld.so.preload` that names nothing does nothing.

    Raises:
        Refused: there is one; names it.
    """
    for path in paths:
        if os.path.lexists(path) and not (str(path) == PRELOAD and _blank(path)):
            raise Refused(
                f"{path} would put code into the enclave that is not measured.",
                safe="No evidence was made, and no enclave goes on.",
                fix="Find out who put it there, and remove it.",
            )


def _archives(python: Path, library: Path) -> Iterator[Path]:
    name = f"{library.name.replace('.', '')}.zip"
    yield library.parent / name
    for folder in (*python.parents, Path(sys.base_prefix), Path(sys.base_exec_prefix)):
        yield folder / sys.platlibdir / name


def _nearer(python: Path, library: Path) -> Iterator[Path]:
    for folder in python.parents:
        path = folder / sys.platlibdir / library.name
        if os.path.realpath(path) == str(library):
            return
        yield from (path / "os.py", path / "os.pyc", path / "lib-dynload")


def _redirections(python: Path) -> Iterator[Path]:
    folder = python.parent
    yield from (folder.parent / "pyvenv.cfg", folder / "pyvenv.cfg")
    yield from (
        Path(f"{python}._pth"),
        folder / "pybuilddir.txt",
        folder / "Modules" / "Setup.local",
    )


def _blank(path: Path) -> bool:
    try:
        return not path.read_bytes().strip()
    except OSError:
        return False
