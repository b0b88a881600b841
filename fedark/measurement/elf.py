"""What a shared object or program asks the dynamic loader for (System V ABI, ELF-64,
little-endian).

Enough of the format to follow `DT_NEEDED`: so that the system libraries which an enclave really
loads are measured, and only those need to be visible inside its sandbox.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

__all__ = ["Linkage", "linkage"]

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 15, 29
_MAX_TABLE = 16 << 20


@dataclass(frozen=True)
class Linkage:
    """The loader's instructions in one ELF file.

    Attributes:
        interpreter: absolute path of the loader; empty in a shared object.
        needed: sonames, in order.
        search: directories named by the file itself, `$ORIGIN` not yet replaced.
    """

    interpreter: str
    needed: tuple[str, ...]
    search: tuple[str, ...]


def linkage(descriptor: int) -> Linkage | None:
    """The linkage of an open file; None if it is not a 64-bit little-endian ELF file, or its tables
    are nonsense.
    """
    try:
        return _parse(descriptor)
    except (struct.error, ValueError, IndexError, OverflowError, StopIteration, OSError):
        return None


def _parse(descriptor: int) -> Linkage | None:
    header = os.pread(descriptor, 64, 0)
    if header[:6] != b"\x7fELF\x02\x01":
        return None
    (offset,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    table = os.pread(descriptor, size * count, offset)
    segments = [struct.unpack_from("<IIQQQQ", table, size * index) for index in range(count)]
    interpreter, dynamic = "", b""
    for kind, _, start, _, _, length in segments:
        if kind == _PT_INTERP:
            interpreter = os.pread(descriptor, min(length, 4096), start).rstrip(b"\0").decode()
        elif kind == _PT_DYNAMIC:
            dynamic = os.pread(descriptor, min(length, _MAX_TABLE), start)
    values: dict[int, list[int]] = {}
    for tag, value in struct.iter_unpack("<qQ", dynamic[: len(dynamic) // 16 * 16]):
        if tag == _DT_NULL:
            break
        values.setdefault(tag, []).append(value)
    if _DT_STRTAB not in values:
        return Linkage(interpreter, (), ())
    address = values[_DT_STRTAB][0]
    # DT_STRTAB is an address in memory: the loaded segment that holds it says where in the file it
    # is.
    place = next(
        a - v + address
        for kind, _, a, v, _, n in segments
        if kind == _PT_LOAD and v <= address < v + n
    )
    strings = os.pread(descriptor, min(values.get(_DT_STRSZ, [0])[0], _MAX_TABLE), place)

    def text(position: int) -> str:
        return strings[position : strings.index(b"\0", position)].decode()

    paths = [text(position) for tag in (_DT_RPATH, _DT_RUNPATH) for position in values.get(tag, [])]
    return Linkage(
        interpreter,
        tuple(text(position) for position in values.get(_DT_NEEDED, [])),
        tuple(part for path in paths for part in path.split(":") if part),
    )
