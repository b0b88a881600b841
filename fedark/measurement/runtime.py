"""What an enclave runs on: the interpreter, the standard library, the distributions it needs, and
the system's libraries.

Rules that make two installs of the same wheels equal:
- Distributions are found along `sys.path` as an import would find them, with all that they require
  here (PEP 508 markers). Only what they own is measured; a top-level folder is measured whole, with
  whatever else lies in it, unless a distribution that the enclave does not need owns a part of it
  (namespace packages), or the manifest excludes one: then only the needed parts are, and only they
  are visible to the enclave.
- Of `*.dist-info` four files count, which are the same in every install of a wheel. RECORD,
  INSTALLER, REQUESTED and direct_url.json are not; they, scripts and `.pth` files are not part of
  an enclave, and need not be visible to it.
- A system library is measured under its soname, and must be the only one that the loader could take
  for it.
"""

from __future__ import annotations

import csv
import fnmatch
import os
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from fedark.foundation.errors import InputError, Refused
from fedark.measurement.cache import DigestCache, FileFacts
from fedark.measurement.loader import cached_libraries, variants
from fedark.measurement.tree import MeasuredPath, TreeEntry, facts_of

__all__ = [
    "Distribution",
    "distribution_roots",
    "distributions",
    "library_entries",
    "python_binary",
    "stdlib_roots",
]

_INFO_FILES = ("METADATA", "WHEEL", "entry_points.txt", "top_level.txt")
_INFO = ".dist-info"


@dataclass(frozen=True)
class Distribution:
    """An installed wheel: normalised name, version as its folder says, site folder, `*.dist-info`
    folder.
    """

    name: str
    version: str
    site: str
    info: str


def python_binary() -> Path:
    """The interpreter itself, not a virtual environment's link to it."""
    return Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))


def stdlib_roots(exclude: Sequence[str]) -> tuple[list[MeasuredPath], list[Path]]:
    """The parts of the standard library, and the folders that must be on `sys.path` for it."""
    base = {"installed_platbase": sys.base_exec_prefix, "platbase": sys.base_exec_prefix}
    library = os.path.realpath(sysconfig.get_path("stdlib"))
    dynload = os.path.realpath(
        os.path.join(sysconfig.get_path("platstdlib", vars=base), "lib-dynload")
    )
    roots = [
        MeasuredPath(os.path.join(library, name), f"stdlib/{name}")
        for name in sorted(os.listdir(library))
        if name != "__pycache__"
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if os.path.dirname(dynload) != library and os.path.isdir(dynload):
        roots.append(MeasuredPath(dynload, "stdlib/lib-dynload"))
    return roots, [Path(library), Path(dynload)]


def distributions(names: Iterable[str]) -> tuple[list[Distribution], list[Distribution]]:
    """The installed distributions `names` with all that they require, and all other installed ones.

    Raises:
        InputError: one is not installed, or not as a wheel.
    """
    installed = _installed()
    wanted: dict[str, set[str]] = {}
    queue = [(_normal(name), frozenset[str](), "the manifest") for name in names]
    while queue:
        name, extras, by = queue.pop()
        new = extras - wanted[name] if name in wanted else extras
        if name in wanted and not new:
            continue
        first = name not in wanted
        wanted.setdefault(name, set()).update(extras)
        if name not in installed:
            raise InputError(
                f"The distribution {name}, which {by} needs, is not installed as a wheel.",
                fix=f"Run: pip install {name}",
            )
        queue += [
            (_normal(requirement.name), frozenset(requirement.extras), name)
            for requirement in _requirements(installed[name], extras=bool(new))
            if _applies(requirement, new, always=first)
        ]
    needed = sorted((installed[name] for name in wanted), key=lambda item: item.name)
    return needed, [item for item in installed.values() if item.name not in wanted]


def distribution_roots(
    needed: Sequence[Distribution], others: Sequence[Distribution], exclude: Sequence[str] = ()
) -> list[MeasuredPath]:
    """What `needed` own, as whole folders where nothing in them belongs to `others` or is excluded.

    Args:
        exclude: folders below the site folder that are left out.

    Raises:
        InputError: one was installed in editable form, or has no RECORD.
    """
    roots: list[MeasuredPath] = []
    by_site: dict[str, list[Distribution]] = defaultdict(list)
    for item in needed:
        by_site[item.site].append(item)
        for name in _INFO_FILES:
            path = os.path.join(item.info, name)
            if os.path.isfile(path):
                roots.append(MeasuredPath(path, f"site/{os.path.basename(item.info)}/{name}"))
    for site, items in by_site.items():
        left_out = tuple(f"{folder}/" for folder in exclude)
        owned = {path for item in items for path in _record(item, must=True, left_out=left_out)}
        tops = {path.split("/", 1)[0] for path in owned}
        foreign = {
            path
            for item in others
            if item.site == site
            for path in _record(item, must=False)
            if path.split("/", 1)[0] in tops
        }
        foreign |= set(exclude)
        for path in _cover(
            [path.split("/") for path in owned], [path.split("/") for path in foreign], 0
        ):
            full = os.path.join(site, path)
            if os.path.lexists(full):
                roots.append(MeasuredPath(full, f"site/{path}"))
    return roots


def library_entries(
    entries: Sequence[TreeEntry], extra: Sequence[str], cache: DigestCache
) -> list[TreeEntry]:
    """The system libraries that measured ELF files load, directly or through one another, and the
    loader itself.

    A soname that a measured file provides, or that is not on this system, is left out: what is not
    there cannot be loaded.

    Raises:
        InputError: the loader's cache cannot be read.
        Refused: the loader could take another file for one; names both.
    """
    linked = [
        entry for entry in entries if entry.facts is not None and entry.facts.linkage is not None
    ]
    provided = {os.path.basename(entry.path) for entry in linked}
    folders = _loader_folders()
    cached = cached_libraries()
    found: dict[str, TreeEntry] = {}
    queue = [(name, list[str]()) for name in extra]
    for entry in linked:
        queue += _asks(entry)
    while queue:
        name, own = queue.pop()
        label = f"lib/{os.path.basename(name)}"
        if label in found or os.path.basename(name) in provided:
            continue
        places = [os.path.join(folder, name) for folder in (*own, *folders)]
        path = next(
            (path for path in (*places, *cached.get(name, ())) if os.path.isfile(path)), None
        )
        if path is None:
            continue
        status = os.stat(path)
        (facts,) = facts_of([(os.path.realpath(path), status)], cache)
        searched = places[: places.index(path) + 1] if path in places else places
        rivals = [rival for place in searched for rival in variants(*os.path.split(place))]
        if os.path.dirname(path) not in own:
            rivals += cached.get(name, ())
        _check_alone(path, facts, rivals, cache)
        found[label] = TreeEntry(
            label, "f", bool(status.st_mode & 0o100), facts.digest, path, facts=facts
        )
        queue += _asks(found[label])
    return sorted(found.values(), key=lambda entry: entry.label)


def _check_alone(path: str, facts: FileFacts, rivals: Iterable[str], cache: DigestCache) -> None:
    for rival in {os.path.realpath(rival) for rival in rivals if os.path.isfile(rival)} - {
        os.path.realpath(path)
    }:
        (other,) = facts_of([(rival, os.stat(rival))], cache)
        if other.digest != facts.digest:
            raise Refused(
                f"The loader may take {rival} for {path}, which is the one that is measured.",
                safe="Nothing was started.",
                fix="Remove it, or its folder from /etc/ld.so.conf, and run ldconfig.",
            )


def _asks(entry: TreeEntry) -> list[tuple[str, list[str]]]:
    """What it needs, and the folders that it names itself."""
    linked = entry.facts.linkage if entry.facts is not None else None
    if linked is None:
        return []
    origin = os.path.dirname(os.path.realpath(entry.path))
    own = [part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for part in linked.search]
    names = [*linked.needed, *([linked.interpreter] if linked.interpreter else [])]
    return [(name, own) for name in names]


def _loader_folders() -> list[str]:
    """Where glibc looks without a cache file, and where this interpreter keeps its own shared
    library.
    """
    multiarch = sysconfig.get_config_var("MULTIARCH")
    here = [f"{base}/{multiarch}" for base in ("/lib", "/usr/lib") if multiarch]
    library = sysconfig.get_config_var("LIBDIR")
    return [*here, "/lib64", "/usr/lib64", "/lib", "/usr/lib", *([library] if library else [])]


def _installed() -> dict[str, Distribution]:
    installed: dict[str, Distribution] = {}
    for folder in dict.fromkeys(os.path.realpath(path or ".") for path in sys.path):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.endswith(_INFO):
                project, _, version = name.removesuffix(_INFO).partition("-")
                item = Distribution(_normal(project), version, folder, os.path.join(folder, name))
                installed.setdefault(item.name, item)
    return installed


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirements(item: Distribution, *, extras: bool) -> Iterator[Requirement]:
    # The header of METADATA alone: parsing whole descriptions as e-mail takes longer than all the
    # rest of a measurement.
    for line in _read(item, "METADATA").split("\n\n", 1)[0].splitlines():
        # Most requirements of the large ones are for extras that nobody asked for, and parsing is
        # slow.
        if line.startswith("Requires-Dist:") and (
            extras or "extra ==" not in line or " or " in line
        ):
            try:
                yield Requirement(line.partition(":")[2].strip())
            except InvalidRequirement:
                raise InputError(f"{item.info}/METADATA has a malformed requirement.") from None


def _applies(requirement: Requirement, extras: Iterable[str], *, always: bool) -> bool:
    if requirement.marker is None:
        return always
    environments = [*([""] if always else []), *extras]
    return any(requirement.marker.evaluate({"extra": extra}) for extra in environments)


def _record(item: Distribution, *, must: bool, left_out: tuple[str, ...] = ()) -> Iterator[str]:
    """The paths in the site folder that `item` owns, without bytecode, its own `*.dist-info`, and
    those that begin as `left_out`.
    """
    try:
        text = _read(item, "RECORD")
    except InputError:
        if must:
            raise
        return
    passed = ("/", f"{os.path.basename(item.info)}/", *left_out)
    # Tens of thousands of lines, of which many go at once.
    for line in text.splitlines():
        if "__pycache__/" in line or line.startswith(passed):
            continue
        path = line.partition(",")[0]
        if line.startswith('"'):
            path = next(csv.reader([line]))[0]
            if path.startswith(passed):
                continue
        if not path or "../" in path:
            continue
        if must and "/" not in path and path.startswith("__editable__"):
            raise InputError(
                f"{item.name} is installed in editable form, and cannot be measured.",
                fix=f"Install {item.name} as a wheel.",
            )
        yield path


def _read(item: Distribution, name: str) -> str:
    try:
        with open(os.path.join(item.info, name), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{item.info}/{name} cannot be read, so {item.name} cannot be measured."
        ) from None


def _cover(
    owned: Sequence[Sequence[str]], foreign: Sequence[Sequence[str]], depth: int
) -> Iterator[str]:
    """The fewest paths that hold all of `owned` and nothing of `foreign`; all of them agree in
    their first `depth` parts.
    """
    groups: dict[str, list[Sequence[str]]] = defaultdict(list)
    strangers: dict[str, list[Sequence[str]]] = defaultdict(list)
    for parts in owned:
        groups[parts[depth]].append(parts)
    for parts in foreign:
        if len(parts) > depth:
            strangers[parts[depth]].append(parts)
    for name in sorted(groups):
        paths = groups[name]
        if name not in strangers or any(len(parts) == depth + 1 for parts in paths):
            yield "/".join(paths[0][: depth + 1])
        else:
            yield from _cover(paths, strangers[name], depth + 1)
