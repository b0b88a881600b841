"""A whole job in a few seconds: a tiny real BERT, three customers, and every way to stand between
them.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fedark.bench._small import make_base
from fedark.foundation.errors import FedarkError
from fedark.links.link import InProcessLink
from fedark.simulation import Simulation

CUSTOMERS = ("north", "east", "south")
LABELS = ("open", "close", "shed")
_TEXT = (
    "open close shed line bus breaker north east south hot cold now the a of load is at five six"
    " seven"
)
_WORDS = _TEXT.split()
SECRET_WORDS = ["quartz", "falcon", "meridian", "lantern", "cobalt", "orchid"]


def write_job(
    folder: Path,
    *,
    rounds: int = 2,
    records: int = 40,
    minimum: int = 2,
    extra: str = "",
    customers: tuple[str, ...] = CUSTOMERS,
    curve: str = "every = 0",
) -> Path:
    """A job file with its base model and records; each customer's records hold words of its own.

    Without a learning curve, so that a round is one stage, and two or three under masks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(folder / "base")
    generator = random.Random(3)
    for index, name in enumerate(customers):
        secret = SECRET_WORDS[2 * index : 2 * index + 2]
        _write_records(folder / f"{name}.csv", name, secret, records, generator)
    _write_records(folder / "acceptance.csv", "north", [], 12, generator)
    _write_records(folder / "replay.csv", "south", [], 12, generator)
    tables = "".join(f'[[customers]]\nname = "{name}"\ndata = "{name}.csv"\n' for name in customers)
    text = f"""
[job]
name = "small"
seed = 3
rounds = {rounds}
[provider]
name = "maker"
[aggregator]
name = "pool"
{tables}
[data]
prompt = "{{desk}}: {{message}}"
answer = "action"
labels = ["open", "close", "shed"]
test_fraction = 0.25
group = "desk"
[provider_data]
replay = "replay.csv"
acceptance = "acceptance.csv"
[[models]]
name = "tiny"
source = "dir:base"
task = "classification"
[models.adapter]
rank = 2
targets = ["query", "value"]
[models.training]
epochs = 1
batch_size = 8
max_length = 16
replay = 0.2
baseline_epochs = 1
[curve]
{curve}
[protection]
minimum_cohort = {minimum}
{extra}
"""
    path = folder / "job.toml"
    path.write_text(text)
    return path


def _write_model(folder: Path) -> None:
    if folder.exists():
        return
    torch.manual_seed(11)
    make_base(folder, [*_WORDS, *SECRET_WORDS, ":"], layers=2)


def _write_records(
    path: Path, desk: str, secret: list[str], count: int, generator: random.Random
) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["desk", "message", "action"])
        for _ in range(count):
            action = generator.choice(LABELS)
            words = [action, *secret, *generator.sample(_WORDS, 4)]
            generator.shuffle(words)
            writer.writerow([desk, " ".join(words), action])


Alter = Callable[[str, bytes, bool], bytes]
"""(party, message, is a reply) -> what arrives."""


class HostileRelay(InProcessLink):
    """A link whose aggregator may alter, swap, repeat or drop every message."""

    def __init__(self, simulation: Simulation, alter: Alter) -> None:
        def through(name: str, handle: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
            return lambda request: alter(name, handle(alter(name, request, False)), True)

        super().__init__(
            {name: through(name, node.handle) for name, node in simulation.nodes.items()},
            parallel=1,
        )


def why(error: FedarkError, passed_over: Mapping[str, str] | None = None) -> str:
    """All that is said about a failure."""
    return error.what + " ".join((passed_over or {}).values())
