"""How noise and step size decide what a private head learns: the arithmetic of private.toml on
frozen features, without the protocol around it; the tables of docs/privacy.md, "Signal and noise".

    python examples/banking77/heads.py DATA

DATA has train.csv, test.csv and categories.json (see private.toml). Draws, clipping, the noise that
the accountant solves and the server's steps are those of a job; customers, masks and the integer
grid are left out, and the noise is a continuous Gaussian. One seed. The features take some minutes.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedark.contract.job import Job
from fedark.operate.offer import model_sources
from fedark.privacy.mechanisms import calibrated
from fedark.tuning.unsealed import unsealed_model

Array = npt.NDArray[np.float32]
CLIP, DELTA, NOISE = 0.4, 1e-5, 0.95


class Features:
    """Unit vectors of all texts, their labels, and the head before training (rows of length 4)."""

    def __init__(self, data: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(Path(__file__).parent / "private.toml", folder)
            (Path(folder) / "data").symlink_to(data.resolve())
            job = Job.load(Path(folder) / "private.toml")
            ((spec, source),) = model_sources(job)[0]
            self._task = unsealed_model(job, spec, source)
            self.head = self._task.get_flat().reshape(len(job.labels), -1)
            parts = [
                job.data.read(Path(folder) / "data" / f"{n}.csv", job.labels)
                for n in ("train", "test")
            ]
        self.texts = [self._embedded([record.prompt for record in part]) for part in parts]
        self.labels = [np.array([job.labels.index(r.answer) for r in part]) for part in parts]

    @torch.no_grad()
    def _embedded(self, texts: list[str]) -> Array:
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        found = np.zeros((len(texts), self.head.shape[1]), np.float32)
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            ids = [row[:64] for row in self._task._encoder.texts([texts[at] for at in part])]
            found[part] = self._task.scorer.embed(*self._task._padded(ids)).numpy()
        return found


def trained(
    features: Features,
    *,
    rounds: int,
    rate: float,
    step: float,
    noise: float,
    records: int,
    scale: float = 4.0,
) -> float:
    """Test accuracy in percent after `rounds` steps; `noise` is a multiplier of the clip norm."""
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(features.labels[0]))[:records]
    texts, labels = features.texts[0][chosen], features.labels[0][chosen]
    head = features.head * np.float32(scale / 4)
    for _ in range(rounds):
        drawn = generator.random(records) < rate
        logits = texts[drawn] @ head.T
        error = np.exp(logits - logits.max(1, keepdims=True))
        error /= error.sum(1, keepdims=True)
        error[np.arange(len(error)), labels[drawn]] -= 1
        # The features are unit vectors, so this is the norm of the record's whole gradient.
        error *= np.minimum(1, CLIP / np.maximum(np.linalg.norm(error, axis=1), 1e-12))[:, None]
        summed = error.T @ texts[drawn] + generator.normal(size=head.shape) * noise * CLIP
        head = head - step * summed / (rate * records)
    return 100 * float((((features.texts[1] @ head.T).argmax(1)) == features.labels[1]).mean())


def main() -> None:
    """Print both tables."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("data", type=Path)
    features = Features(arguments.parse_args().data)
    size, everybody = features.head.size, len(features.labels[0])
    for records in (everybody, 2000, 1000, 500):
        noise = calibrated(3.0, DELTA, 0.5, 200)
        ratio = noise * math.sqrt(size) / (0.5 * records * math.sqrt(200))
        step = NOISE / ratio * math.sqrt(size) / (200 * CLIP)
        found = trained(features, rounds=200, rate=0.5, step=step, noise=noise, records=records)
        print(f"epsilon 3, {records} records: noise/signal {ratio:.3f}, accuracy {found:.1f}")
    for scale in (4.0, 30.0):
        for reach in (0.003, 0.03, 0.1, 0.3, 1.0, 3.0):
            step = reach * math.sqrt(size) / (5 * CLIP)
            found = trained(
                features, rounds=5, rate=0.1, step=step, noise=0.0, records=everybody, scale=scale
            )
            print(f"no noise, head scale {scale:g}, reach {reach:g}: accuracy {found:.1f}")


if __name__ == "__main__":
    main()
