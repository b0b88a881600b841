"""What privacy costs on Banking77: accuracy against epsilon, over the real protocol, three seeds
each; a table and a figure.

    python examples/banking77/utility.py DATA --out docs/privacy-utility

DATA has train.csv, test.csv and categories.json (see private.toml). Every run is a whole `fedark
simulate`: eight customers, masked sums, the noise and the draws of the enclaves. Results are kept
in OUT.json run by run, so that an interrupted series goes on where it was; OUT.svg and OUT.md are
made from it. Learning rates were chosen on a validation split of the training set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
RATES = {1: 34.0, 3: 85.0, 8: 170.0}
LOCAL = (
    'privacy.mechanism="example-local"',
    "privacy.local_steps=10",
    "job.rounds=10",
    "models.0.training.head_learning_rate=0.2",
    "models.0.server.learning_rate=1.0",
)
# FedSGD: one step of all records a round, so that customers with few labels do not drift apart.
NO_PRIVACY = (
    'privacy.mechanism="none"',
    "protection.colluders=1",
    "protection.max_records=2000",
    'models.0.training.optimizer="sgd"',
    "models.0.training.batch_size=4096",
    "models.0.training.head_learning_rate=340.0",
    "models.0.server.learning_rate=1.0",
)
TWO_GONE = {"bank-7": 50, "bank-8": 100}


def series() -> Iterator[tuple[str, tuple[str, ...], dict[str, int]]]:
    """Name, overrides of the job file, customers that drop."""
    for epsilon, rate in RATES.items():
        terms = (f"privacy.epsilon={epsilon}.0", f"models.0.server.learning_rate={rate}")
        yield f"example-distributed, epsilon {epsilon}", terms, {}
    yield "example-local, epsilon 3", ("privacy.epsilon=3.0", *LOCAL), {}
    yield "no privacy", NO_PRIVACY, {}
    for epsilon, rate in RATES.items():
        terms = (
            f"privacy.epsilon={epsilon}.0",
            f"models.0.server.learning_rate={rate}",
            "protection.minimum_cohort=6",
        )
        yield f"example-distributed, epsilon {epsilon}, 2 of 8 drop", terms, TWO_GONE


def run(data: Path, overrides: tuple[str, ...], seed: int, drop: dict[str, int]) -> float:
    """Accuracy in percent on the test set of one whole simulated job."""
    from fedark.contract.job import Job
    from fedark.simulation import simulate

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "private.toml", folder)
        (Path(folder) / "data").symlink_to(data.resolve())
        job = Job.load(Path(folder) / "private.toml", (f"job.seed={seed}", *overrides))
        with simulate(job, drop=drop) as running:
            report = running.run()
    metric = report["models"]["minilm"]["metrics"]["federated/acceptance/all"]
    return 100 * float(metric["accuracy"])


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: mean and spread of every series."""
    lines = ["| series | test accuracy, mean of the seeds | lowest to highest |", "|---|---|---|"]
    for name, found in results.items():
        values = list(found.values())
        lines.append(
            f"| {name} | {statistics.mean(values):.1f} | {min(values):.1f} to {max(values):.1f} |"
        )
    return "\n".join(lines) + "\n"


def figure(results: dict[str, dict[str, float]]) -> str:
    """An SVG of horizontal bars with the spread of the seeds."""
    left, width, height, low = 330, 420, 26, 55.0

    def x(value: float) -> float:
        return left + width * (value - low) / (100 - low)

    parts = []
    for row, (name, found) in enumerate(results.items()):
        values, y = list(found.values()), 40 + row * height
        colour = (
            "#888"
            if name == "no privacy"
            else "#c60"
            if "local" in name
            else "#69c"
            if "drop" in name
            else "#146"
        )
        mean = statistics.mean(values)
        parts += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{x(mean) - left:.1f}" height="18" fill="{colour}"/>',
            (
                f'<path d="M{x(min(values)):.1f} {y + 9}H{x(max(values)):.1f}" stroke="#000"'
                ' stroke-width="2"/>'
            ),
            f'<text x="{x(max(values)) + 6:.1f}" y="{y + 13}">{mean:.1f}</text>',
        ]
    bottom = 40 + len(results) * height
    for tick in range(60, 101, 10):
        parts.append(f'<path d="M{x(tick):.1f} 34V{bottom}" stroke="#ccc" stroke-dasharray="2 3"/>')
        parts.append(
            f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick} %</text>'
        )
    title = (
        "Banking77, 8 customers: accuracy on the test set (bars, from 55 %: mean of the seeds;"
        " line: their spread)"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{bottom + 30}"'
        ' font-family="sans-serif" font-size="13">'
    )
    return (
        f'{head}<rect width="100%" height="100%" fill="#fff"/><text x="12"'
        f' y="20">{title}</text>{"".join(parts)}</svg>\n'
    )


def main() -> None:
    """Run what is missing, then write table and figure."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--out", type=Path, default=Path("privacy-utility"))
    arguments.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    asked = arguments.parse_args()
    store = asked.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    for seed in asked.seeds:
        for name, overrides, drop in series():
            found = results.setdefault(name, {})
            if str(seed) not in found:
                found[str(seed)] = round(run(asked.data, overrides, seed, drop), 2)
                print(f"{name}, seed {seed}: {found[str(seed)]:.2f} %", flush=True)
                store.write_text(json.dumps(results, indent=2) + "\n")
    asked.out.with_suffix(".md").write_text(table(results))
    asked.out.with_suffix(".svg").write_text(figure(results))
    print(table(results))


if __name__ == "__main__":
    main()
