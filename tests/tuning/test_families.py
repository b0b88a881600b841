"""Every architecture of a list: sealed, opened, tuned, exported, and loaded in another process by
the folder's own README, with nothing of fedark: the same logits, merged too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, Family, table
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fedark.contract.contract import AdapterTerms, ModelTerms, ServerTerms, TrainingTerms
from fedark.foundation.keys import SigningKey
from fedark.records.reading import Record
from fedark.tuning.export import export_peft
from fedark.tuning.layout import base_shapes
from fedark.tuning.task import TaskModel
from fedark.vault.bundle import SealedBundle, seal
from fedark.vault.manifest import ModelCard, ReleasePolicy
from fedark.vault.opener import open_to_memory

LABELS = ("leak", "spark", "noise")
TEXTS = ["the pump leaks", "cable sparks", "motor hums a b c is loud not old", "valve wet the pump"]
DOC = Path(__file__).parents[2] / "docs/models.md"
OUTSIDE = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from transformers.utils import logging
logging.set_verbosity(50)
logging.disable_progress_bar()
torch.set_num_threads(1)
assert not any("fedark" in name for name in sys.modules)
for case in json.load(open(sys.argv[1])):
    folder, base, texts, ids = case["folder"], case["base"], case["texts"], case["ids"]
    code = re.search(r"```python\\n(.*)```", open(f"{folder}/README.md").read(), re.DOTALL)[1]
    merged = code.replace("(model, folder)", "(model, folder).merge_and_unload()")
    for name, text in {"loaded": code, "merged": merged}.items():
        scope = {"base": base, "folder": folder, "texts": texts}
        try:
            exec(text, scope)
            if "answer" in scope:
                assert isinstance(scope["answer"](texts[0], longest=3), str)
                with torch.no_grad():
                    parts = [scope["model"](input_ids=torch.tensor([one])).logits[0] for one in ids]
                logits = torch.cat(parts)
            else:
                assert set(scope["answers"]) <= set(scope["labels"])
                assert [row[:sum(m)] for row, m in zip(
                    scope["batch"]["input_ids"].tolist(), scope["batch"]["attention_mask"].tolist()
                )] == ids, "other ids"
                logits = scope["logits"]
            np.save(f"{folder}/{name}.npy", logits.numpy())
        except Exception as error:
            open(f"{folder}/{name}.txt", "w").write(f"{type(error).__name__}: {error}")
"""


@dataclass
class Case:
    """One adapter of one family, and what came of it."""

    family: str
    task: Any
    method: str
    last_only: bool
    folder: Path
    base: Path
    inside: torch.Tensor
    before: torch.Tensor
    ids: list[list[int]] = field(default_factory=list)
    cached: bool = False
    taken: str = ""

    @property
    def key(self) -> str:
        return f"{self.family}, {self.task}, {self.method}{', last layer' * self.last_only}"


def sealed(folder: Path, out: Path) -> dict[str, bytearray]:
    """The files as an enclave gets them."""
    provider = SigningKey()
    manifest, key = seal(
        folder,
        out,
        provider=provider,
        card=ModelCard(name="m", title="m", licence="MIT", task="classification"),
        policy=ReleasePolicy(
            expires=(datetime.now(UTC) + timedelta(days=1)).isoformat(),
            platforms=("simulated",),
            minimum_cohort=2,
        ),
    )
    bundle = SealedBundle.load(out, provider.public)
    files, _ = open_to_memory(manifest, key, bundle.payload())
    return dict(files)


def logits(task: TaskModel, examples: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        if task._causal:
            return torch.cat([task._run([example.ids])[0] for example in examples])
        return task._run([example.ids for example in examples])


def tuned(name: str, family: Family, root: Path, task: Any, method: str, last_only: bool) -> Case:
    base = root / name.replace(", ", "-")
    out = root / f"{base.name}-{task}-{method}-{last_only}"
    if not base.exists():
        family.save(base)
    files = sealed(base, root / f"{out.name}.fedark")
    adapter = AdapterTerms(
        method=method,
        rank=2,
        alpha=4.0,
        seed=3,
        targets=() if method == "head" else family.targets,
        layers=(0 if name == "albert" else 1,) if last_only else (),  # ALBERT's layers are one
    )
    labels = LABELS if task == "classification" else ()
    shapes = base_shapes(base, task, labels, "auto")
    terms = ModelTerms(
        name="m",
        task=task,
        bundle="0" * 96,
        weights="0" * 96,
        prompt="{text}",
        labels=labels,
        adapter=adapter,
        training=TrainingTerms(
            batch_size=2, learning_rate=5e-2, head_learning_rate=5e-2, max_length=12
        ),
        server=ServerTerms(),
        pooling=shapes.pooling,
        layout=shapes.layout(adapter),
    )
    records = [Record(text, LABELS[i % 3] if labels else "is wet") for i, text in enumerate(TEXTS)]
    vectors = []
    for cached in (True, False) if last_only else (True,):
        model = TaskModel.load({key: bytearray(data) for key, data in files.items()}, terms)
        if not cached:
            model._trunk = model._features = None
        examples = model._encoded(records)
        before = logits(model, examples)
        model.train(records, epochs=1, seed=1)
        vectors.append(model.get_flat())
        if cached:
            kept = model
    if len(vectors) == 2:
        np.testing.assert_allclose(
            *vectors, atol=1e-3, err_msg=f"{name}: the cache changes training"
        )
    export_peft(terms, kept.get_flat(), out)
    cached = bool(kept._trunk and kept._trunk._states) or bool(
        kept._features and kept._features._places
    )
    ids = [list(example.ids) for example in examples]
    return Case(
        name,
        task,
        method,
        last_only,
        out,
        base,
        logits(kept, examples),
        before,
        ids,
        cached,
        terms.taken,
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    root = tmp_path_factory.mktemp("families")
    torch.set_num_threads(1)
    made = []
    for name, family in FAMILIES.items():
        if getattr(transformers, family.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            made.append(tuned(name, family, root, "classification", "lora", False))
            made.append(tuned(name, family, root, "classification", "ffa-lora", True))
            if family.kind != "decoder":  # all of these have the same head
                made.append(tuned(name, family, root, "classification", "head", False))
        if family.kind == "decoder":
            made.append(tuned(name, family, root, "instruction", "lora", False))
    listed = [
        {"folder": str(c.folder), "base": str(c.base), "texts": TEXTS, "ids": c.ids} for c in made
    ]
    (root / "cases.json").write_text(json.dumps(listed))
    subprocess.run(
        [sys.executable, "-c", OUTSIDE, str(root / "cases.json")], check=True, timeout=300, cwd=root
    )
    return made


def test_the_docs_name_the_architectures_of_this_list() -> None:
    assert len({name.partition(",")[0] for name in FAMILIES}) >= 40
    text, _, listed = DOC.read_text("utf-8").partition("| architecture |")
    if f"| architecture |{listed}" != table():
        DOC.write_text(text + table(), "utf-8")
        pytest.fail("docs/models.md was not that of the list; it is written anew")


@pytest.mark.slow
def test_an_adapter_loads_outside_by_its_readme_with_the_same_logits_merged_too(
    cases: list[Case],
) -> None:
    wrong = []
    for case in cases:
        for name in ("loaded", "merged"):
            failed = case.folder / f"{name}.txt"
            if failed.exists():
                wrong.append(f"{case.key}, {name}: {failed.read_text()[:200]}")
                continue
            outside = torch.from_numpy(np.load(case.folder / f"{name}.npy"))
            apart = (
                float((outside - case.inside).abs().max())
                if outside.shape == case.inside.shape
                else -1
            )
            if not 0 <= apart <= 1e-5 * max(1.0, float(case.inside.abs().max())):
                wrong.append(f"{case.key}, {name}: {apart:.2g} apart")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_training_moved_every_adapter(cases: list[Case]) -> None:
    still = [c.key for c in cases if float((c.inside - c.before).abs().max()) < 1e-3]
    assert not still, still
