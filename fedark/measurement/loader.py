"""Where the dynamic loader finds a library besides the folders that it always searches (ld.so(8),
glibc).

Its cache comes before the standard folders, and below each folder it prefers builds for newer
processors. Either could lead to another file than the one that is measured, before an enclave is
confined; so whoever measures must know of both.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fedark.foundation.errors import InputError

__all__ = ["CACHE", "cached_libraries", "variants"]

CACHE = "/etc/ld.so.cache"

_MAGIC = b"glibc-ld.so.cache1.1"
_HEADER = struct.Struct("<20sII20x")
_ENTRY = struct.Struct("<iIIIQ")
_X86_64 = 0x0303
_BUILDS = ("glibc-hwcaps", "tls", "haswell", "avx512_1", "x86_64")
"""Folders of such builds; all but the first up to glibc 2.36."""


def cached_libraries() -> Mapping[str, Sequence[str]]:
    """Name of a library -> where the loader's cache has it, builds for newer processors among them;
    empty without a cache.

    Raises:
        InputError: the cache is not as glibc writes it.
    """
    found: dict[str, list[str]] = defaultdict(list)
    try:
        with open(CACHE, "rb") as file:
            data = file.read()
        # An older format may stand before it; offsets count from the magic.
        data = data[data.index(_MAGIC) :]
        _, count, _ = _HEADER.unpack_from(data)
        entries = data[_HEADER.size : _HEADER.size + count * _ENTRY.size]
        for flags, name, path, _, _ in _ENTRY.iter_unpack(entries):
            if flags & 0xFFFF == _X86_64:
                found[_text(data, name)].append(_text(data, path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, struct.error) as error:
        raise InputError(
            f"The loader's cache {CACHE} cannot be read ({type(error).__name__}).",
            fix="Run ldconfig as root.",
        ) from None
    return found


def variants(folder: str, name: str) -> list[str]:
    """Builds of the library `name` below `folder` that the loader may prefer to the one in it."""
    tops = [os.path.join(folder, build) for build in _BUILDS]
    walked = (
        os.path.join(where, name)
        for top in tops
        if os.path.isdir(top)
        for where, _, _ in os.walk(top)
    )
    return [path for path in walked if os.path.lexists(path)]


def _text(data: bytes, at: int) -> str:
    return os.fsdecode(data[at : data.index(b"\0", at)])
