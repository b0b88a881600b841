"""Which models a server has: names, owners, adapters, and the engines below them.

A name is "NAME", which every key may ask, or "OWNER/NAME", which only that owner's keys may. To
whoever may not ask it, a model does not exist. Adapters of one form share an engine, so that their
base is in memory once and their rows stand in one batch; bases with the same bytes are read once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedark.contract.contract import ModelTerms
from fedark.foundation.errors import FedarkError, InputError, printable
from fedark.serving.engine import ClearEngine, Engine, LeasedEngine, alike
from fedark.serving.keys import ApiKey
from fedark.serving.leased import Leased
from fedark.serving.model import read_base
from fedark.serving.worker import Worker
from fedark.tuning.adapter import Adapter, read_adapter
from fedark.tuning.task import TaskModel

__all__ = ["Bases", "Clear", "Model", "Models", "Sealed", "named", "read_list"]

_NAME = re.compile(r"([a-z0-9][a-z0-9-]{0,47}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_MAX_LIST = 1 << 20


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is served.

    Attributes:
        name: as requests have it.
        terms: of its adapter.
        worker: of the engine that answers.
    """

    name: str
    terms: ModelTerms
    worker: Worker

    @property
    def owner(self) -> str:
        return self.name.rpartition("/")[0]

    def may_be_asked(self, key: ApiKey) -> bool:
        return self.owner in ("", key.owner)


class Bases(Protocol):
    """Where engines come from."""

    def engine(self, terms: ModelTerms) -> Engine:
        """An engine for adapters of these terms.

        Raises:
            FedarkError: there is no base for them, or it cannot be used.
        """
        ...


class Clear:
    """A base in clear: a folder, or a source as `fedark.tuning.sources.resolve` takes it."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._files: dict[str, dict[str, bytearray]] = {}

    def engine(self, terms: ModelTerms) -> Engine:
        if terms.weights not in self._files:
            self._files[terms.weights] = read_base(terms, self._base)[1]
        return ClearEngine(TaskModel.load(self._files[terms.weights], terms))


class Sealed:
    """A sealed base under a lease: one enclave."""

    def __init__(self, leased: Leased) -> None:
        self._leased: Leased | None = leased

    def engine(self, terms: ModelTerms) -> Engine:
        if self._leased is None:
            raise InputError(
                "A lease is for adapters of one job: these differ in their terms.",
                safe="Nothing was asked.",
                fix="Start a server for each lease.",
            )
        leased, self._leased = self._leased, None
        return LeasedEngine(leased)


class Models:
    """The models of a server. Changed by one thread, read by any.

    Args:
        say: told what was loaded and unloaded, and why not.
    """

    def __init__(
        self, bases: Bases, *, waiting: int = 256, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._bases, self._most, self._say = bases, waiting, say
        self._workers: list[Worker] = []
        self._models: dict[str, Model] = {}

    def __iter__(self) -> Iterator[Model]:
        return iter(sorted(self._models.values(), key=lambda model: model.name))

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    def find(self, name: str, key: ApiKey) -> Model | None:
        """The model of that name, if this key may ask it."""
        found = self._models.get(name)
        return found if found is not None and found.may_be_asked(key) else None

    def load(self, name: str, adapter: Adapter) -> None:
        """Serve an adapter, in the place of one of that name.

        Raises:
            InputError: a malformed name; ModelError: no usable adapter, or of another base.
            FedarkError: the enclave's, or the provider's, why not.
        """
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{printable(name, 100)!r} is no name of a model: NAME, or OWNER/NAME."
            )
        worker = self._worker(adapter.terms)
        self.unload(name, unless=worker)
        worker.put(name, adapter)
        self._models[name] = Model(name, adapter.terms, worker)
        self._say(f"serving {name}")

    def unload(self, name: str, *, unless: Worker | None = None) -> None:
        """Serve it no more; no harm if it is not served."""
        model = self._models.get(name)
        if model is not None and model.worker is not unless:
            del self._models[name]
            model.worker.drop(name)
            self._say(f"no longer serving {name}")

    def follow(self, folders: Mapping[str, Path]) -> None:
        """Serve exactly these adapters; say which of them cannot be loaded, and why."""
        for name in [name for name in self._models if name not in folders]:
            self.unload(name)
        for name, folder in folders.items():
            try:
                self.load(name, read_adapter(folder))
            except FedarkError as error:
                self._say(f"{name} is not served: {error.told}")

    def stop(self) -> None:
        """End every engine."""
        for worker in self._workers:
            worker.stop()

    def _worker(self, terms: ModelTerms) -> Worker:
        for worker in self._workers:
            if alike(terms, worker.engine.terms) == worker.engine.terms:
                return worker
        worker = Worker(self._bases.engine(terms), most=self._most)
        self._workers.append(worker)
        return worker


def named(texts: list[str]) -> dict[str, Path]:
    """The adapters that a command line names: FOLDER, served by the folder's name without
    "adapter-", or NAME=FOLDER.

    Raises:
        InputError: a name stands twice.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.resolve().name.removeprefix("adapter-")
        if name in found:
            raise InputError(
                f"Two adapters are named {printable(name, 100)}.", fix="Use NAME=FOLDER."
            )
        found[name] = path
    return found


def read_list(path: Path) -> dict[str, Path]:
    """The adapters of a TOML file: under [models], "NAME" = "FOLDER", from the file's own folder.

    Raises:
        InputError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            value = tomllib.loads(file.read(_MAX_LIST).decode())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"{path} is not TOML in UTF-8.") from None
    match value:
        case {"models": dict(models)} if len(value) == 1:
            if all(isinstance(folder, str) for folder in models.values()):
                return {name: path.parent / folder for name, folder in models.items()}
    raise InputError(f'{path} is to have one table, [models], with lines like "name" = "folder".')
