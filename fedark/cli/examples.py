"""The examples that ship with fedark: `examples/` of a checkout, `fedark/_examples` of an installed
wheel.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from fedark.foundation.errors import InputError

__all__ = ["example_dir", "write_example"]

_PACKAGE = Path(__file__).resolve().parents[1]


def example_dir(name: str) -> Path:
    """The folder of an example.

    Raises:
        InputError: there is none of that name.
    """
    for folder in (_PACKAGE.parent / "examples", _PACKAGE / "_examples"):
        if name.isidentifier() and (folder / name / "make.py").is_file():
            return folder / name
    raise InputError(f"There is no example {name!r}.", fix="Try: fedark example grid")


def write_example(name: str, out: Path, *, seed: int, progress: Callable[[str], None]) -> Path:
    """Write an example's job file, records and base models to `out`; returns the job file."""
    module = _load(example_dir(name) / "make.py")
    path: Path = module.write_job(out, seed=seed, progress=progress)
    return path


def _load(path: Path) -> ModuleType:
    """The module of a script, with its own folder importable, as when it is run."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"fedark_example_{path.parent.name}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
