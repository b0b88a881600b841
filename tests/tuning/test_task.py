"""The task model against oracles that are written out plainly."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedark.foundation.errors import DataError, ModelError, ProtocolError
from fedark.records.reading import Record
from fedark.tuning.task import TaskModel

ALL = ["bert", "minilm", "gpt2", "llama"]
ANSWERS = ("open line", "close the breaker", "shed load now", "hold")
Make = Callable[[tuple[str, ...]], list[Record]]


def made_for(tiny: Any, records: Make) -> list[Record]:
    return records(tiny.labels or ANSWERS)


def logits(task: TaskModel, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return task.scorer(*task._padded(task._encoder.texts(texts)))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_fresh_adapter_leaves_the_logits_of_the_base_unchanged(
    zoo: Any, texts: list[str], name: str
) -> None:
    task = zoo[name].load()
    ids, mask = task._padded(task._encoder.texts(texts))
    base = AutoModelForCausalLM.from_pretrained(zoo[name].folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(task.scorer(ids, mask), base(input_ids=ids, attention_mask=mask).logits)


def test_a_fresh_classifier_is_the_base_with_the_seeded_head(zoo: Any, texts: list[str]) -> None:
    task = zoo["bert"].load()
    ids, mask = task._padded(task._encoder.texts(texts))
    base = AutoModelForSequenceClassification.from_pretrained(
        zoo["bert"].folder, num_labels=3
    ).eval()
    with torch.no_grad():
        base.classifier.weight.copy_(task._tensors["base_model.model.classifier.weight"])
        base.classifier.bias.zero_()
        assert torch.equal(task.scorer(ids, mask), base(input_ids=ids, attention_mask=mask).logits)


def test_a_fresh_mean_pool_head_knows_the_names_of_the_labels(zoo: Any) -> None:
    task = zoo["minilm"].load()
    names = [label.replace("_", " ") for label in task.terms.labels]
    measured = task.evaluate(
        [Record(name, label) for name, label in zip(names, task.terms.labels, strict=True)]
    )
    assert (measured.correct, measured.total) == (3, 3)


@pytest.mark.parametrize("method", ["ffa-lora", "lora"])
@pytest.mark.parametrize("name", ALL)
def test_training_lowers_the_loss_and_changes_only_what_travels(
    zoo: Any, records: Make, name: str, method: str
) -> None:
    tiny = zoo[name]
    task = tiny.load(tiny.terms(method=method))
    before = {key: value.clone() for key, value in task.scorer.state_dict().items()}
    data = made_for(tiny, records)
    first = task.evaluate(data)
    stats = task.train(data, epochs=8, seed=1)
    last = task.evaluate(data)
    assert last.loss_sum < 0.7 * first.loss_sum
    assert last.correct >= first.correct
    assert (stats.examples, stats.steps) == (24, 48)
    changed = {
        key
        for key, value in task.scorer.state_dict().items()
        if not torch.equal(value, before[key])
    }
    travels = {id(parameter) for parameter in task.scorer.parameters() if parameter.requires_grad}
    assert changed == {key for key, value in task.scorer.named_parameters() if id(value) in travels}
    assert (
        sum(p.numel() for p in task.scorer.parameters() if p.requires_grad) == task.terms.travelling
    )


@pytest.mark.parametrize("name", ALL)
def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = zoo[name]
    data = made_for(tiny, records)

    def trained(seed: int) -> np.ndarray:
        task = tiny.load()
        torch.rand(seed + 1)  # the global generator must not matter
        task.train(data, epochs=2, seed=seed)
        return task.get_flat()

    assert np.array_equal(trained(1), trained(1))
    assert not np.array_equal(trained(1), trained(2))


@pytest.mark.parametrize("name", ALL)
def test_a_vector_survives_set_and_get_and_a_bad_one_changes_nothing(zoo: Any, name: str) -> None:
    task = zoo[name].load()
    vector = np.random.default_rng(0).normal(size=task.terms.travelling).astype(np.float32)
    task.set_flat(vector)
    assert np.array_equal(task.get_flat(), vector)
    for bad in (vector[:-1], vector.astype(np.float64), np.full_like(vector, np.nan)):
        with pytest.raises(ProtocolError):
            task.set_flat(bad)
    assert np.array_equal(task.get_flat(), vector)
    task.set_flat(task.initial())
    assert np.array_equal(task.get_flat(), task.initial())


def effective(task: TaskModel, vector: np.ndarray) -> dict[str, np.ndarray]:
    """The change that an adapter makes to each base weight, B A alpha / r."""
    task.set_flat(vector)
    with torch.no_grad():
        return {
            name: module.get_delta_weight("default").numpy().astype(np.float64)
            for name, module in task.scorer.named_modules()
            if hasattr(module, "get_delta_weight")
        }


@pytest.mark.parametrize("name", ["bert", "minilm"])
def test_one_full_step_of_sgd_averages_to_the_step_of_all_records_together(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = zoo[name]
    training = {
        "optimizer": "sgd",
        "batch_size": 4096,
        "learning_rate": 0.5,
        "head_learning_rate": 2.0,
    }
    task = tiny.load(tiny.terms(training=training))
    data = made_for(tiny, records)

    def moved(part: list[Record]) -> np.ndarray:
        task.set_flat(task.initial())
        task.train(part, epochs=1, seed=1)
        return task.get_flat() - task.initial()

    together = moved(data)
    parts = (data[:5], data[5:])
    mean = sum(len(part) / len(data) * moved(part) for part in parts)
    assert np.abs(together).max() > 1e-3
    np.testing.assert_allclose(mean, together, atol=1e-5)


@pytest.mark.parametrize("method", ["ffa-lora", "lora"])
def test_the_mean_of_vectors_is_the_mean_of_models_for_ffa_and_not_for_lora(
    zoo: Any, records: Make, method: str
) -> None:
    task = zoo["llama"].load(zoo["llama"].terms(method=method))
    vectors = []
    for seed in range(3):
        task.set_flat(task.initial())
        task.train(records(ANSWERS)[seed::3], epochs=6, seed=seed)
        vectors.append(task.get_flat())
    deltas = [effective(task, vector) for vector in vectors]
    together = effective(task, np.mean(vectors, axis=0))
    worst = max(
        np.abs(together[name] - np.mean([d[name] for d in deltas], axis=0)).max()
        for name in together
    )
    scale = max(np.abs(delta).max() for delta in together.values())
    assert scale > 0.01
    assert (worst < 1e-6 * scale) == (method == "ffa-lora")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_loss_counts_the_tokens_of_the_answer_and_nothing_else(
    zoo: Any, records: Make, name: str
) -> None:
    task = zoo[name].load()
    data = records(ANSWERS)
    model = AutoModelForCausalLM.from_pretrained(zoo[name].folder).eval()
    expected, correct = 0.0, 0
    for record in data:
        prompt = task._encoder.texts([record.prompt])[0]
        answer = [*task._encoder.texts([record.answer])[0][1:], 3]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            generated = model.generate(
                torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False
            )[0, len(prompt) :]
        expected += float(functional.cross_entropy(out[len(prompt) - 1 : -1], torch.tensor(answer)))
        correct += generated.tolist() == answer
    measured = task.evaluate(data)
    assert measured.total == len(data)
    assert measured.loss_sum == pytest.approx(expected, rel=1e-5)
    assert measured.correct == correct


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_exact_match_is_what_greedy_decoding_gives_after_training(
    zoo: Any, records: Make, name: str
) -> None:
    task = zoo[name].load()
    data = records(ANSWERS)
    task.train(data, epochs=20, seed=0)
    body: Any = task.scorer.body
    correct = 0
    for record in data:
        prompt = task._encoder.texts([record.prompt])[0]
        answer = [*task._encoder.texts([record.answer])[0][1:], 3]
        with torch.no_grad():
            generated = body.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False
            )
        correct += generated[0, len(prompt) :].tolist() == answer
    assert 0 < correct < len(data)
    assert task.evaluate(data).correct == correct


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_listed_answers_are_ranked_by_their_mean_likelihood_a_token(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = zoo[name]
    task = tiny.load(tiny.terms(labels=ANSWERS))
    data = records(ANSWERS)
    task.train(data, epochs=2, seed=0)
    correct, loss_sum = 0, 0.0
    for record in data:
        prompt = task._encoder.texts([record.prompt])[0]
        scores = []
        for label in ANSWERS:
            answer = [*task._encoder.texts([label])[0][1:], 3]
            with torch.no_grad():
                out = task.scorer(
                    torch.tensor([prompt + answer]),
                    torch.ones(1, len(prompt + answer), dtype=torch.long),
                )[0]
            scores.append(
                -float(
                    functional.cross_entropy(
                        out[len(prompt) - 1 : -1], torch.tensor(answer), reduction="mean"
                    )
                )
            )
            if label == record.answer:
                loss_sum -= scores[-1]
        correct += ANSWERS[int(np.argmax(scores))] == record.answer
    measured = task.evaluate(data)
    assert (measured.correct, measured.total) == (correct, len(data))
    assert measured.loss_sum == pytest.approx(loss_sum, rel=1e-5)


def test_single_token_labels_are_ranked_too(zoo: Any) -> None:
    tiny = zoo["llama"]
    task = tiny.load(tiny.terms(labels=("open", "close")))
    data = [Record("line hot", "open"), Record("bus cold", "close")]
    task.train(data, epochs=20, seed=0)
    assert task.evaluate(data).correct == 2


@pytest.mark.parametrize("name", ALL)
def test_the_cached_trunk_changes_neither_training_nor_evaluation(
    zoo: Any, records: Make, name: str
) -> None:
    tiny = zoo[name]
    data = made_for(tiny, records)
    results = []
    for cached in (True, False):
        task = tiny.load(tiny.terms(layers=(2,)))
        assert task._trunk is not None
        if not cached:
            task._trunk = None
        before = task.evaluate(data)
        stats = task.train(data, epochs=3, seed=4)
        results.append((before, stats, task.get_flat(), task.evaluate(data)))
    (b1, s1, f1, e1), (b2, s2, f2, e2) = results
    assert b1.loss_sum == pytest.approx(b2.loss_sum, rel=1e-5)
    assert s1.loss == pytest.approx(s2.loss, rel=1e-5)
    np.testing.assert_allclose(f1, f2, atol=2e-5)
    assert (b1.correct, e1.correct) == (b2.correct, e2.correct)


def test_the_trunk_is_really_skipped_and_stays_within_its_layers(zoo: Any, records: Make) -> None:
    task = zoo["minilm"].load(zoo["minilm"].terms(layers=(2,)))
    data = made_for(zoo["minilm"], records)
    task.evaluate(data)
    layers = [
        m for n, m in task.scorer.named_modules() if n.endswith(("layer.0", "layer.1", "layer.2"))
    ]
    calls = [0, 0, 0]
    for index, layer in enumerate(layers):
        layer.attention.register_forward_hook(
            lambda *_, i=index: calls.__setitem__(i, calls[i] + 1)
        )
    task.evaluate(data)
    assert calls[0] == calls[1] == 0 < calls[2]


def test_without_frozen_layers_below_there_is_no_trunk(zoo: Any) -> None:
    assert zoo["minilm"].load()._trunk is None


def test_per_example_gradients_do_not_depend_on_the_rest_of_the_batch(
    zoo: Any, records: Make
) -> None:
    for name in ALL:
        task = zoo[name].load()
        examples = task._examples(made_for(zoo[name], records)[:5])
        losses, _ = task._score(examples)
        for example, loss in zip(examples, losses, strict=True):
            assert float(loss.detach()) == pytest.approx(
                float(task._score([example])[0][0].detach()), rel=1e-4
            )


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("layers", [(), (2,)])
@pytest.mark.parametrize("name", ALL)
def test_hooks_give_the_gradients_of_batches_of_one(
    zoo: Any, records: Make, name: str, layers: tuple[int, ...]
) -> None:
    """Opacus can watch the scorer as it is, with and without the cached trunk."""
    from opacus.grad_sample import GradSampleModule

    tiny = zoo[name]
    task = tiny.load(tiny.terms(method="lora", layers=layers))
    task.set_flat(
        task.initial()
        + 0.1 * np.random.default_rng(0).normal(size=task.terms.travelling).astype(np.float32)
    )
    examples = task._examples(made_for(tiny, records)[:6])
    parameters = [parameter for parameter in task.scorer.parameters() if parameter.requires_grad]
    alone = [
        torch.autograd.grad(task._score([example])[0].mean(), parameters) for example in examples
    ]
    task.scorer = GradSampleModule(task.scorer, batch_first=True, loss_reduction="mean")  # type: ignore[assignment]
    task._score(examples)[0].mean().backward()
    for index, parameter in enumerate(parameters):
        expected = torch.stack([gradients[index] for gradients in alone])
        torch.testing.assert_close(parameter.grad_sample, expected, atol=1e-5, rtol=1e-4)


def test_every_trained_tensor_belongs_to_a_linear_layer(zoo: Any) -> None:
    for name in ALL:
        for module in zoo[name].load().scorer.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                assert type(module) is torch.nn.Linear


def test_replay_is_mixed_in_by_its_fraction_and_keeps_what_was_known(
    zoo: Any, records: Make
) -> None:
    tiny = zoo["minilm"]
    own = [record for record in made_for(tiny, records) if record.answer == tiny.labels[0]]
    replay = [record for record in made_for(tiny, records) if record.answer == tiny.labels[1]]
    results = {}
    for fraction in (0.0, 1.0):
        task = tiny.load(tiny.terms(training={"replay": fraction}))
        stats = task.train(own, replay, epochs=10, seed=0)
        assert stats.examples == len(own)
        assert stats.steps == 10 * -(-round(len(own) * (1 + fraction)) // 4)
        results[fraction] = task.evaluate(replay).correct
    assert results[1.0] > results[0.0]


def test_progress_reports_every_step(zoo: Any, records: Make) -> None:
    seen: list[tuple[int, int, float]] = []
    zoo["minilm"].load().train(
        made_for(zoo["minilm"], records), epochs=2, seed=0, progress=lambda *step: seen.append(step)
    )
    assert [(done, total) for done, total, _ in seen] == [(step, 12) for step in range(1, 13)]


def test_no_records_and_unknown_answers_are_refused(zoo: Any) -> None:
    task = zoo["minilm"].load()
    assert task.evaluate([]).total == 0
    with pytest.raises(DataError):
        task.train([], epochs=1, seed=0)
    for call in (lambda r: task.train(r, epochs=1, seed=0), task.evaluate):
        with pytest.raises(DataError) as caught:
            call([Record("open", "open_line"), Record("zanzibar", "zanzibar")])
        assert caught.value.line == 2
        assert "zanzibar" not in str(caught.value)


def test_a_model_that_is_not_the_contracts_is_refused(zoo: Any) -> None:
    with pytest.raises(ModelError, match="layout"):
        zoo["minilm"].load(zoo["bert"].terms().model_copy(update={"pooling": "mean"}))
    with pytest.raises(ModelError, match="max_length"):
        zoo["minilm"].load(zoo["minilm"].terms(training={"max_length": 65}))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama", "model.layers.1.mlp.up_proj.weight"), ("bert", "encoder.layer.1.output.dense.bias")],
)
def test_weights_that_are_missing_are_not_replaced_by_random_ones(
    zoo: Any, name: str, tensor: str
) -> None:
    tiny = zoo[name]
    state = load(bytes(tiny.files()["model.safetensors"]))
    del state[tensor]
    with pytest.raises(ModelError, match="lack"):
        TaskModel.load({**tiny.files(), "model.safetensors": save(state)}, tiny.terms())


def test_a_base_that_was_a_classifier_of_other_labels_gets_a_fresh_head(
    zoo: Any, tmp_path: Path
) -> None:
    tiny = zoo["bert"]
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "base"))
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5).save_pretrained(folder)
    other = replace(tiny, folder=folder)
    assert other.terms().layout == tiny.terms().layout
    assert np.array_equal(other.load().initial(), tiny.load().initial())


def test_a_model_that_runs_a_frozen_layer_twice_is_computed_in_full(
    zoo: Any, records: Make
) -> None:
    tiny = zoo["minilm"]
    task = tiny.load(tiny.terms(layers=(2,)))
    layers = task.scorer.get_submodule("body.base_model.model.encoder.layer")
    twice = layers[2].forward
    layers[2].forward = lambda hidden, *rest, **named: twice(
        layers[1](hidden, *rest, **named), *rest, **named
    )
    task._trunk.fill([example.ids for example in task._examples(made_for(tiny, records))])
    assert not task._trunk._states


class Changed(nn.Module):
    """A layer whose input or answer has another form."""

    def __init__(self, inner: nn.Module, before: Any, after: Any) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, hidden: Any, *rest: Any, **named: Any) -> Any:
        return self.after(self.inner(self.before(hidden), *rest, **named))


def changed(tiny: Any, answer: Any, take: Any) -> TaskModel:
    """A task whose last frozen layer gives `answer` of its states; the next takes it back."""
    task: TaskModel = tiny.load(tiny.terms(layers=(2,)))
    layers = task.scorer.get_submodule("body.base_model.model.encoder.layer")
    layers[1] = Changed(layers[1], lambda hidden: hidden, answer)
    layers[2] = Changed(layers[2], take, lambda hidden: hidden)
    task._trunk._layers = list(layers[:2])
    return task


def padded(hidden: torch.Tensor) -> torch.Tensor:
    return functional.pad(hidden, (0, 0, 0, 4))


@pytest.mark.parametrize(
    ("answer", "take"),
    [
        (padded, lambda hidden: hidden[:, :-4]),  # as in Longformer
        (lambda hidden: hidden[:, ::2], lambda hidden: hidden.repeat_interleave(2, 1)),  # Funnel
        (lambda hidden: (hidden, hidden.sum()), lambda pair: pair[0]),  # T5: a bias goes along
        (lambda hidden: {"states": hidden}, lambda found: found["states"]),
    ],
)
def test_a_body_that_answers_in_another_form_is_computed_in_full(
    zoo: Any, records: Make, answer: Any, take: Any
) -> None:
    data = made_for(zoo["minilm"], records)
    task = changed(zoo["minilm"], answer, take)
    even = [task._encoded([record])[0].ids for record in data]
    task._trunk.fill([ids for ids in even if len(ids) % 2 == 0])
    assert not task._trunk._states
    assert task._trunk._proven is False


def test_blocks_that_are_never_called_are_computed_in_full(zoo: Any, records: Make) -> None:
    task = zoo["minilm"].load(zoo["minilm"].terms(layers=(2,)))
    task._trunk._layers = [nn.ModuleList(task._trunk._layers)]
    assert task.evaluate(made_for(zoo["minilm"], records)).total == 24
    assert task._trunk._proven is False


def test_a_layer_that_answers_in_a_tuple_is_kept(zoo: Any, records: Make) -> None:
    results = []
    for cached in (True, False):
        task = changed(zoo["minilm"], lambda hidden: (hidden, None), lambda pair: pair[0])
        trunk = task._trunk
        if not cached:
            task._trunk = None
        task.train(made_for(zoo["minilm"], records), epochs=1, seed=1)
        results.append(task.get_flat())
        assert bool(trunk._states) == cached
    np.testing.assert_allclose(*results, atol=2e-5)


def test_loading_and_training_write_no_file_and_open_no_socket(zoo: Any) -> None:
    """Read-only access to the python installation is all that an enclave has left."""
    tiny = zoo["minilm"]
    program = textwrap.dedent("""
        import os, sys, pickle
        payload = pickle.load(sys.stdin.buffer)
        import torch, torch._dynamo
        from fedark.records.reading import Record
        from fedark.tuning.task import TaskModel
        seen = []
        def watch(event, args):
            mode = str(args[1]) if event == "open" and args[1] is not None else "w"
            flags = os.O_WRONLY | os.O_RDWR
            if event == "open" and (set(mode) & set("wax+") or (args[2] or 0) & flags):
                seen.append((event, args[0]))
            if event.startswith(("socket.", "os.mkdir", "os.rename", "os.remove", "subprocess",
                                 "os.exec", "os.fork", "pickle.")):
                seen.append((event,))
        sys.addaudithook(watch)
        task = TaskModel.load(*payload)
        records = [Record("open line", "open_line"), Record("close", "close_breaker")]
        task.train(records, epochs=1, seed=0)
        task.evaluate([Record("open line", "open_line")])
        print(seen)
        """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((tiny.files(), tiny.terms())),
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.decode().strip() == "[]", done.stdout.decode()
