"""One base model with one adapter, trained and evaluated on records: what runs inside a trainer
enclave.

Everything comes from memory and everything is a function of (files, terms, vector, records, seed):
the base's dropout is off, shuffling and the LoRA matrices' dropout have a generator of their own, A
matrices and fresh heads come from the contract's
seed. The base stays frozen. All trainable tensors are those of `nn.Linear` layers (LoRA's A and B,
heads), one loss per record is formed before the mean, and a record is one row of a batch, so
per-example gradients by hooks apply unchanged.

Classification scores a text by a softmax over the labels. Instruction tuning trains on the answer's
tokens alone and is evaluated by exact match of greedy decoding, or, where the contract lists
labels, by the one of these that is most likely a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fedark.contract.contract import ModelTerms, TrainingTerms
from fedark.foundation.errors import DataError, FedarkError, InputError, ModelError
from fedark.records.reading import Record
from fedark.tuning import loads
from fedark.tuning.base import PREFIX, Base, load_base
from fedark.tuning.batches import Example, by_length, drawn, padded, shuffled
from fedark.tuning.decoding import Decoder
from fedark.tuning.features import Features
from fedark.tuning.layout import Flat, flatten, seeded_tensor, unflatten
from fedark.tuning.mixed import Mixed
from fedark.tuning.per_example import Norms, PerExample
from fedark.tuning.schedule import rate_factor
from fedark.tuning.scorer import Scorer, by_layout, dropping, with_adapter
from fedark.tuning.separable import ModelState
from fedark.tuning.tokens import TextEncoder
from fedark.tuning.trunk import Trunk
from fedark.tuning.weights import Files

__all__ = ["Evaluation", "OnStep", "TaskModel", "TrainStats"]

OnStep = Callable[[int, int, float], None]

_EVALUATION_BATCH = 64
_WRITTEN = 64
_KEPT_EXAMPLES = 1 << 18
_FEATURE_BATCH = 1024
_PADDING = 16  # tokens; what a record is padded to under a mechanism is a multiple of it


@dataclass(frozen=True)
class TrainStats:
    """What one call of `TaskModel.train` did.

    Attributes:
        loss: mean cross-entropy over the records of the last epoch, in nats, each measured before
            its own step.
        examples: the customer's own records, replay not counted: the weight of an average.
        steps: optimiser steps.
    """

    loss: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """A measurement on `total` records: how many were answered right, and the sum of their
    cross-entropies in nats.

    For instruction tuning a record's cross-entropy is the mean over the tokens of its answer.

    Attributes:
        said: (index of the right label, index of the label that was given) -> records; empty for
            free text.
        right: whether each record was answered right, in their order.
    """

    correct: int
    total: int
    loss_sum: float
    said: Mapping[tuple[int, int], int] = field(default_factory=dict)
    right: tuple[bool, ...] = ()


class TaskModel:
    """A base model with an adapter. `load` makes one.

    Attributes:
        terms: the contract's.
        scorer: the module that training steps on.
        trained: its parameters that travel, in the order of the flat vector.
        config: the base's configuration.
    """

    def __init__(self, base: Base, terms: ModelTerms, encoder: TextEncoder) -> None:
        self.terms = terms
        self._encoder = encoder
        self._label_index = {label: index for index, label in enumerate(terms.labels)}
        self._causal = base.kind == "causal"
        head = None
        if base.kind == "pooled":
            width = next(spec.shape[1] for spec in terms.layout if spec.name == "head.weight")
            bias = any(spec.name == "head.bias" for spec in terms.layout)
            head = nn.Linear(width, len(terms.labels), bias=bias)
        self.scorer = Scorer(with_adapter(base, terms), head, first=base.pooling == "cls").eval()
        self._tensors = by_layout(self.scorer, terms.layout)
        self.trained = [self._tensors[spec.name] for spec in terms.layout if spec.travels]
        self._features = (
            Features.before(self.scorer, self._run) if terms.adapter.method == "head" else None
        )
        self._trunk = (
            Trunk.below(self.scorer.body, self._trained_names(), self._run)
            if self._features is None
            else None
        )
        self.config: dict[str, Any] = base.model.config.to_dict()  # type: ignore[operator,union-attr]
        self._held: ModelState | None = None
        self._held_since: int | None = None
        self._known: dict[Record, Example] = {}
        self._decoder = Decoder(self.scorer.body, base.model, encoder)
        self._initial = self._initialise(base)

    @classmethod
    def load(cls, files: Files, terms: ModelTerms) -> TaskModel:
        """Build the model from the bytes of its files; nothing touches disk or network.

        Args:
            files: file name -> content, those of `sources.model_files`. A writable content
                (bytearray) is aliased by the weights, so that they exist once: leave it unchanged
                while the model lives.
            terms: the contract's, whose layout must be this model's own.

        Raises:
            ModelError: the files are not a usable model, or not the one that `terms` describe, or
                it fails on a text.
        """
        with loads.loading():
            return cls._load(files, terms)

    @classmethod
    def _load(cls, files: Files, terms: ModelTerms) -> TaskModel:
        base = load_base(files, terms.task, terms.labels, pooling=terms.pooling)
        if base.layout(terms.adapter) != terms.layout:
            raise ModelError(
                f"The adapter layout in the contract is not that of the model {terms.name}.",
                safe="Nothing was trained.",
                fix="Make the contract from this base model.",
            )
        config: Any = base.model.config
        length = terms.training.max_length
        encoder = TextEncoder(
            files,
            max_length=length,
            pad_id=_id(config, "pad_token_id"),
            eos_id=_id(config, "eos_token_id"),
        )
        limit = base.longest
        if limit is not None and length > limit:
            raise ModelError(
                f"max_length {length} is more than the {limit} tokens that the model {terms.name}"
                " can read.",
                safe="Nothing was trained.",
                fix=f"Set max_length to at most {limit}.",
            )
        known = _whole(config, "vocab_size")
        if known is not None and encoder.vocabulary_size > known:
            raise ModelError(
                f"The tokenizer of {terms.name} has more tokens than the model.",
                safe="Nothing was trained.",
                fix="Check that tokenizer and weights belong together.",
            )
        try:
            config.pad_token_id = encoder.pad_id
            task = cls(base, terms, encoder)
            task._try_out()
        except FedarkError:
            raise
        except (
            Exception
        ) as error:  # from the library, at a configuration that its weights happen to fit
            raise ModelError(
                f"The model {terms.name} fails on a text ({type(error).__name__}).",
                safe="It has seen no record.",
                fix="Check that config.json, tokenizer and weights belong together.",
            ) from None
        return task

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self._causal

    def mixed(self) -> Mixed:
        """This base for many adapters of these terms at once, none of them loaded yet."""
        return Mixed(self, self._encoder, self._decoder, self._tensors)

    @torch.no_grad()
    def share_frozen(self, other: TaskModel) -> None:
        """Take over those frozen tensors of `other` that are equal to this model's own: two models
        of the same base then hold it in memory once. What either of them answers stays the same.
        """
        theirs = dict(other.scorer.named_parameters())
        travelling = {id(tensor) for tensor in self._tensors.values()}
        for name, tensor in self.scorer.named_parameters():
            twin = theirs.get(name)
            if id(tensor) not in travelling and twin is not None and torch.equal(tensor, twin):
                tensor.data = twin.data

    def initial(self) -> Flat:
        """The vector before any training, float32 [travelling]: the base's own behaviour, and a
        head that knows the labels.
        """
        return self._initial.copy()

    def get_flat(self) -> Flat:
        """The vector of the present adapter, float32 [travelling]."""
        return flatten(
            self.terms.layout,
            {name: tensor.detach().numpy() for name, tensor in self._tensors.items()},
        )

    def set_flat(self, flat: Flat) -> None:
        """Take over a vector.

        Raises:
            ProtocolError: wrong length or type, or not finite; the adapter is as before.
        """
        named = unflatten(self.terms.layout, flat, self.terms.adapter.seed)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(torch.from_numpy(named[name].copy()))

    def train(
        self,
        records: Sequence[Record],
        replay: Sequence[Record] = (),
        *,
        epochs: int,
        seed: int,
        progress: OnStep | None = None,
        settings: TrainingTerms | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> TrainStats:
        """Train the adapter, from where it is, with a fresh optimiser.

        Args:
            records: the customer's own, at least one.
            replay: the provider's; each epoch mixes in a fresh sample as large as
                `terms.training.replay` times `records`.
            epochs: passes over `records`.
            seed: of the order of records and the choice of replay.
            progress: called after every step with steps done, steps in all, and the step's loss.
            settings: optimiser, rates and batch size, if not the contract's.
            part: where in the whole job this training begins and ends, from 0 to 1: the schedule of
                the rates goes by it.

        Raises:
            DataError: no records, or an answer that is not among the labels.
            InputError: the loss left the finite numbers; the adapter is then of no use.
        """
        if not records:
            raise DataError(
                "records",
                None,
                "there are none to train on.",
                fix="Give the customer's training records.",
            )
        terms = settings or self.terms.training
        own, extra = self._examples(records), self._examples(replay)
        extra_count = round(terms.replay * len(own)) if extra else 0
        steps = epochs * -(-(len(own) + extra_count) // terms.batch_size)
        generator = torch.Generator().manual_seed(seed)
        optimizer = self._optimizer(terms)
        rates = [group["lr"] for group in optimizer.param_groups]
        done, loss_sum, seen = 0, 0.0, 0
        for _ in range(epochs):
            loss_sum, seen = 0.0, 0
            chosen = own + [extra[index] for index in drawn(len(extra), extra_count, generator)]
            for batch in shuffled(chosen, terms.batch_size, generator):
                at = part[0] + (part[1] - part[0]) * (done + 0.5) / steps
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * rate_factor(terms, at)
                with dropping(self.scorer, generator):
                    losses, _ = self._score(batch)
                loss = losses.mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done, seen, value = done + 1, seen + len(batch), float(loss.detach())
                loss_sum += value * len(batch)
                if not np.isfinite(value):
                    raise InputError(
                        f"Training diverged in step {done} of {steps}.",
                        safe="No update was made from it.",
                        fix="Lower the learning rates.",
                    )
                if progress is not None:
                    progress(done, steps, value)
        optimizer.zero_grad(set_to_none=True)
        return TrainStats(loss_sum / seen, len(records), done)

    def losses(self, records: Sequence[Record]) -> torch.Tensor:
        """Every record's cross-entropy in nats [records], computed in one batch, with its graph
        unless under `no_grad`.

        Raises:
            DataError: an answer that is not among the labels.
        """
        return self._score(self._examples(records))[0]

    def features(self, records: Sequence[Record]) -> torch.Tensor:
        """What the body puts before the last linear layer under the present adapter, [records,
        width]: kept from earlier calls where that layer is all that is trained.

        Raises:
            DataError: an answer that is not among the labels.
            ModelError: the model has no linear head, or what stands before it is not a constant of
                the text.
        """
        texts = [example.ids for example in self._examples(records)]
        rows = self._features.rows(texts) if self._features is not None else None
        if rows is None and (head := self._last_linear()) is not None:
            fresh = Features(head, self._run)
            fresh.fill(texts)
            rows = fresh.rows(texts)
        if rows is None:
            raise ModelError(
                "This model has no features of its own before a linear head.",
                safe="Nothing was made of it.",
                fix="Taste another model, or tune this one without the taster.",
            )
        return rows

    def _last_linear(self) -> nn.Linear | None:
        """The linear layer whose weight the taster's head replaces."""
        names = {id(tensor) for tensor in self.trained}
        found = [
            module
            for module in self.scorer.modules()
            if type(module) is nn.Linear
            and module.out_features == len(self.terms.labels)
            and id(module.weight) in names
        ]
        return found[-1] if found else None

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """While open, nothing that was kept from earlier batches is used: the whole model is
        computed.
        """
        kept = self._features, self._trunk
        self._features = self._trunk = None
        try:
            yield
        finally:
            self._features, self._trunk = kept

    def gradient_sum(self, records: Sequence[Record], *, clip_norm: float) -> tuple[Flat, Norms]:
        """The sum of the records' gradients, each clipped: what one record adds has an L2 norm of
        at most `clip_norm`.

        The gradient is that of the record's loss in nats with respect to the whole travelling
        vector. Records are taken in batches of at most `terms.training.batch_size`, so that memory
        is bounded, and each is padded to a length that depends on itself alone. For a separable
        model (`fedark.tuning.separable`) nothing else in a batch changes a record's part by more
        than float32 rounding, about 1e-6 of `clip_norm`. There is no noise in it: sum and norms are
        as private as the records.

        Args:
            records: any number; none give zeros.
            clip_norm: positive, in nats per unit of the vector.

        Returns:
            The sum, float32 [travelling], and every record's norm before clipping, float32
            [records].

        Raises:
            DataError: an answer that is not among the labels.
            ModelError: the model has something that would make the gradients inexact, or it changed
                itself, now or since they were first asked for.
        """
        if not (clip_norm > 0 and np.isfinite(clip_norm)):
            raise ValueError("clip_norm must be positive and finite")
        watch = PerExample(self.scorer, self.trained)
        examples = self._examples(records)
        total = np.zeros(self.terms.travelling, np.float64)
        norms = np.zeros(len(examples), np.float32)
        # In a simulation other trainers load models meanwhile, which may change classes of the
        # library; in an enclave nothing is loaded between two sums.
        before = loads.mark()
        if self._held is None or before is None or self._held_since != before:
            if self._held is not None:
                self._held.require_unchanged(classes=False)
            self._held, self._held_since = ModelState(self.scorer, self._tensors.values()), before
        for length, part in self._alike(examples):
            with watch.batch(len(part)) as pending:
                pending.backward(self._score([examples[index] for index in part], length)[0])
            summed, norms[part] = pending.clipped_sum(clip_norm)
            total += summed.numpy()
        self._held.require_unchanged(classes=before is not None and loads.mark() == before)
        return total.astype(np.float32), norms

    def stepper(self) -> Callable[[Flat], None]:
        """Steps of a fresh optimiser by gradients that come from outside: noised ones of local
        DP-SGD (arXiv:1607.00133).

        Returns:
            Takes a mean gradient, float32 [travelling], and moves the adapter. It raises InputError
            where the adapter leaves the finite numbers, which is known from the gradients alone.
        """
        optimizer = self._optimizer(self.terms.training)

        def step(gradient: Flat) -> None:
            offset = 0
            for tensor in self.trained:
                tensor.grad = torch.from_numpy(
                    gradient[offset : offset + tensor.numel()].copy()
                ).view_as(tensor)
                offset += tensor.numel()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if not np.isfinite(self.get_flat()).all():
                raise InputError(
                    "Training diverged.",
                    safe="No update was made from it.",
                    fix="Lower the learning rates.",
                )

        return step

    @torch.no_grad()
    def evaluate(self, records: Sequence[Record]) -> Evaluation:
        """Measure the present adapter; no records give zeros.

        Raises:
            DataError: an answer that is not among the labels.
        """
        if self._causal and self.terms.labels:
            return self._rank(records)
        examples = self._examples(records)
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
        right = [False] * len(examples)
        loss_sum, said = 0.0, Counter[tuple[int, int]]()
        for start in range(0, len(order), _EVALUATION_BATCH):
            places = order[start : start + _EVALUATION_BATCH]
            batch = [examples[index] for index in places]
            losses, answered = self._score(batch)
            loss_sum += float(losses.sum(dtype=torch.float64))
            given = answered.tolist()
            if not self._causal:
                gold = [example.target for example in batch]
                said.update(zip(gold, given, strict=True))
                given = [one == other for one, other in zip(gold, given, strict=True)]
            for index, hit in zip(places, given, strict=True):
                right[index] = hit
        return Evaluation(sum(right), len(examples), loss_sum, said, tuple(right))

    @torch.no_grad()
    def probabilities(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """How likely every label is after each prompt, float32 [prompts, labels]; nothing of the
        prompts is kept.

        Of a classifier its softmax. Of a language model, whose admissible answers are ranked by
        their mean log-likelihood a token as in `evaluate`, the softmax of these: it orders answers,
        and is no calibrated probability.

        Raises:
            ModelError: the model has no labels, or its tokenizer fails on a prompt.
        """
        if not self.terms.labels:
            raise ModelError(
                "This model writes free text: it has no labels.", fix="Ask it for answers."
            )
        if self._causal:
            scores = self._decoder.rank(prompts, self.terms.labels)
        else:
            scores = torch.zeros(len(prompts), len(self.terms.labels))
            ids = [tuple(one) for one in self._encoder.texts(prompts)]
            order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
            with self.uncached():
                for start in range(0, len(order), _EVALUATION_BATCH):
                    part = order[start : start + _EVALUATION_BATCH]
                    scores[part] = self._run([ids[index] for index in part])
        likely: npt.NDArray[np.float32] = scores.softmax(1).numpy()
        return likely

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[str], *, longest: int | None = None, stop: Sequence[str] = ()
    ) -> list[str]:
        """What a language model writes after each prompt by greedy decoding, up to its end token,
        the first of the texts `stop`, or `longest` tokens.

        Args:
            longest: half of `max_length`, at most 64, if it is not given; a prompt that leaves less
                than that of `max_length` loses its start.

        Raises:
            InputError: `longest` leaves no room for a prompt.
        """
        limit = longest or min(_WRITTEN, self.terms.training.max_length // 2)
        if not 0 < limit < self.terms.training.max_length:
            raise InputError(
                f"An answer may have 1 to {self.terms.training.max_length - 1} tokens here:"
                f" prompt and answer share the {self.terms.training.max_length} tokens that the"
                " adapter was trained on.",
                safe="Nothing was written.",
            )
        return self._decoder.write(prompts, limit, stop)

    def read_tokens(self, prompts: Sequence[str]) -> int:
        """How many tokens of these prompts the model reads, special ones included."""
        if not self._causal:
            return sum(map(len, self._encoder.texts(prompts)))
        return sum(map(len, self._encoder.prompts(prompts, [1] * len(prompts))))

    def most_written(self, prompts: int, longest: int | None = None) -> int:
        """How many tokens the model writes at most for so many prompts; none if it has labels."""
        limit = longest or min(_WRITTEN, self.terms.training.max_length // 2)
        return 0 if self.terms.labels else prompts * limit

    def written_tokens(self, answers: Sequence[str]) -> int:
        """The tokens of written answers, the token that ends each included."""
        return sum(map(len, self._encoder.answers(answers)))

    def _examples(self, records: Sequence[Record]) -> list[Example]:
        self._check(records)
        if len(self._known) > _KEPT_EXAMPLES:
            self._known.clear()
        fresh = [record for record in records if record not in self._known]
        self._known |= zip(fresh, self._encoded(fresh), strict=True)
        examples = [self._known[record] for record in records]
        cache = self._features or self._trunk
        if cache is not None:
            cache.fill([example.ids for example in examples])
        return examples

    def _alike(self, examples: Sequence[Example]) -> Iterator[tuple[int, list[int]]]:
        """Batches of examples that are padded to the same length, each with that length: the next
        multiple of `_PADDING`, which no other record has a part in.
        """
        if self._features is not None:  # rows that are as long as any other
            for start in range(0, len(examples), _FEATURE_BATCH):
                yield 0, list(range(start, min(start + _FEATURE_BATCH, len(examples))))
            return
        most = self.terms.training.max_length
        lengths = [len(example.ids) for example in examples]
        rounded = [max(n, min(-(-n // _PADDING) * _PADDING, most)) for n in lengths]
        yield from by_length(rounded, self.terms.training.batch_size)

    def _encoded(self, records: Sequence[Record]) -> list[Example]:
        prompts, answers = (
            [record.prompt for record in records],
            [record.answer for record in records],
        )
        if self._causal:
            tails = self._encoder.answers(answers)
            heads = self._encoder.prompts(prompts, [len(tail) for tail in tails])
            return [
                Example((*head, *tail), len(head)) for head, tail in zip(heads, tails, strict=True)
            ]
        texts = self._encoder.texts(prompts)
        return [
            Example(tuple(ids), self._label_index[a]) for ids, a in zip(texts, answers, strict=True)
        ]

    def _score(
        self, batch: Sequence[Example], length: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, and the label that was given or whether greedy decoding gives the answer, each
        [batch]; padded to `length` at least.
        """
        texts = [example.ids for example in batch]
        targets = torch.tensor([example.target for example in batch])
        logits = self._features.logits(texts) if self._features is not None else None
        if logits is None:
            trunk = self._trunk
            with trunk.replaying(texts, length) if trunk is not None else nullcontext():
                logits = self._run(texts, length)
        if not self._causal:
            return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1)
        # Position i predicts token i + 1. Greedy decoding gives the answer exactly if every token
        # of it is the most likely one after those before it: if the first that differs is the i-th,
        # decoding left the answer there.
        ids, mask = self._padded(texts, length)
        place = torch.arange(1, ids.shape[1]).unsqueeze(0)
        answer = (place >= targets.unsqueeze(1)) & (mask[:, 1:] > 0)
        token_losses = functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        losses = (token_losses * answer).sum(1) / answer.sum(1).clamp(min=1)
        right = (logits[:, :-1].argmax(-1) == ids[:, 1:]) | ~answer
        return losses, right.all(1)

    def _rank(self, records: Sequence[Record]) -> Evaluation:
        """Compare the likelihoods of all labels after each prompt."""
        self._check(records)
        wanted = torch.tensor(
            [self._label_index[record.answer] for record in records], dtype=torch.long
        )
        scores = self._decoder.rank([record.prompt for record in records], self.terms.labels)
        given = scores.argmax(1)
        said = Counter(zip(wanted.tolist(), given.tolist(), strict=True))
        loss_sum = -float(scores.gather(1, wanted.unsqueeze(1)).sum(dtype=torch.float64))
        right = tuple((wanted == given).tolist())
        return Evaluation(sum(right), len(records), loss_sum, said, right)

    def _check(self, records: Sequence[Record]) -> None:
        for number, record in enumerate(records, 1):
            if self._label_index and record.answer not in self._label_index:
                raise DataError(
                    "records",
                    number,
                    "the answer is none of the labels.",
                    fix="Use the contract's labels.",
                )

    def _run(self, texts: Sequence[Sequence[int]], length: int = 0) -> torch.Tensor:
        logits: torch.Tensor = self.scorer(*self._padded(texts, length))
        return logits

    def _padded(
        self, texts: Sequence[Sequence[int]], length: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return padded(texts, self._encoder.pad_id, length)

    def _trained_names(self) -> list[str]:
        """Names, inside the body, of everything that differs or may differ from the base."""
        ours = {id(tensor) for tensor in self._tensors.values()}
        return [
            name for name, parameter in self.scorer.body.named_parameters() if id(parameter) in ours
        ]

    def _optimizer(self, terms: TrainingTerms) -> torch.optim.Optimizer:
        lora = [t for name, t in self._tensors.items() if ".lora_" in name and t.requires_grad]
        head = [t for name, t in self._tensors.items() if ".lora_" not in name and t.requires_grad]
        groups = [
            {"params": lora, "lr": terms.learning_rate},
            {"params": head, "lr": terms.head_learning_rate},
        ]
        used = [group for group in groups if group["params"]]
        return (
            torch.optim.SGD(used, weight_decay=terms.weight_decay)
            if terms.optimizer == "sgd"
            else torch.optim.AdamW(used, weight_decay=terms.weight_decay)
        )

    @torch.no_grad()
    def _try_out(self) -> None:
        """Run the model on texts that are nobody's, one of them padded."""
        answer = self.terms.labels[0] if self.terms.labels else "a"
        self._score(self._encoded([Record("a", answer), Record("a b c", answer)]))

    @torch.no_grad()
    def _initialise(self, base: Base) -> Flat:
        """Put the initial adapter in place and return its vector."""
        seed = self.terms.adapter.seed
        for spec in self.terms.layout:
            tensor = self._tensors[spec.name]
            if ".lora_B." in spec.name or spec.name == "head.bias":
                tensor.zero_()
            elif ".lora_A." in spec.name:
                tensor.copy_(torch.from_numpy(seeded_tensor(seed, spec)))
            elif spec.name.removeprefix(PREFIX) in base.missing:
                (
                    tensor.zero_()
                    if len(spec.shape) == 1
                    else tensor.copy_(torch.from_numpy(seeded_tensor(seed, spec)))
                )
        if self.scorer.head is not None:
            # A head that starts from what the base knows of the labels' names uses no private data.
            ids = self._encoder.texts([label.replace("_", " ") for label in self.terms.labels])
            for start in range(0, len(ids), _EVALUATION_BATCH):
                rows = self.scorer.embed(*self._padded(ids[start : start + _EVALUATION_BATCH]))
                self.scorer.head.weight[start : start + len(rows)] = (
                    self.terms.adapter.head_scale * rows
                )
        return self.get_flat()


def _id(config: Any, name: str) -> int | None:
    """A special token's id in a configuration: the first where it lists several; some write -1 for
    none.
    """
    value = getattr(config, name, None)
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value >= 0 else None


def _whole(config: Any, name: str) -> int | None:
    """A number in a configuration that says how many there are of something, or None."""
    value = getattr(config, name, None)
    return value if type(value) is int else None
