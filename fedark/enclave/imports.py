"""Python code runs in an enclave only if its bytes are those that were measured.

The launcher hands over the SHA-384 of every measured module and of every bytecode file that it
compiled itself. This loader reads a file once, compares, and executes what it read: an edit between
hashing and import, also one long after the start, stops the import. Files that are not in the list,
and bytecode without source, are not imported at all. What Python and the entry point imported
before must come from listed files too.

Shared objects are loaded by the system's loader, which this cannot bracket: the launcher compares
the identity of all measured files once they are loaded, before it quotes
(`fedark.enclave.launcher`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from types import ModuleType

from fedark.foundation.errors import Refused

__all__ = ["install"]


def install(digests: Mapping[str, bytes]) -> None:
    """From here on import only what `digests` (absolute path -> SHA-384) lists, along the present
    `sys.path`.

    Raises:
        Refused: a module was imported before from a file that is not listed; names it.
    """
    _check_imported(digests)

    class MeasuredLoader(SourceFileLoader):
        """Loads source, or the launcher's bytecode for it."""

        def get_data(self, path: str) -> bytes:
            data = super().get_data(path)
            known = digests.get(path)
            if known is None or hashlib.sha384(data).digest() != known:
                if path.endswith(".pyc"):
                    raise OSError(
                        f"{path} is not the bytecode that was compiled"
                    )  # the source is tried instead
                raise ImportError(f"{path} is not the file that was measured", path=path)
            return data

    class MeasuredFinder(FileFinder):
        """Sees measured modules only: what else lies in a folder that may be listed is as good as
        absent.
        """

        def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
            spec = super().find_spec(fullname, target)
            known = spec is None or not spec.has_location or spec.origin in digests
            return spec if known else None

    hook = MeasuredFinder.path_hook(
        (ExtensionFileLoader, EXTENSION_SUFFIXES), (MeasuredLoader, SOURCE_SUFFIXES)
    )
    sys.path_hooks[:] = [hook]
    sys.path_importer_cache.clear()
    for folder in sys.path:
        # Lists the folder while it can be listed: a landlock domain may later forbid that for
        # fedark's own parent.
        finder = hook(folder)
        finder.find_spec("fedark_lists_this_folder")
        sys.path_importer_cache[folder] = finder


def _check_imported(digests: Mapping[str, bytes]) -> None:
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is not None and os.path.realpath(path) not in digests:
            raise Refused(
                f"The module {name} was imported from {path}, which is not measured.",
                safe="The enclave never had a key.",
                fix="Find out who put it there, and remove it.",
            )
