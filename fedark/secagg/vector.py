"""The vector path: clip, round, pack, mask; and back. Cache-sized blocks, no temporaries, several
threads where that pays.

It pays for keystreams, whose calls are long; numpy's are so short that two threads would mostly
wait for the interpreter lock. So one thread rounds and packs, and what it has packed is masked by
the others, in the end by all of them.

A value is scaled, clamped to the grid, rounded at random to an integer with the same expectation,
noised, and packed several to a 64-bit word; whole words are masked. The last words are lanes of
their
own: the weight and the figures. Precision and packing are worked out in
docs/design/secure-aggregation.md, "From a vector to masked words".
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import InputError, Refused
from fedark.secagg.stream import BLOCK, SPARE, Keystream, Masks, aligned, block_of
from fedark.secagg.terms import Layout

__all__ = [
    "AGAIN",
    "MOST_STREAMS",
    "Contribution",
    "MaskedSum",
    "Noise",
    "RoundSum",
    "apply_masks",
    "l2_norm",
    "mask",
    "threads_available",
]

_PIECE_BYTES = 1 << 18  # of values that are rounded at a time, at least
_NORM_DRAWS = 64
AGAIN = "Begin a new round with the next model; a fedark job is submitted again."
"""What to do after a round that gave no sum: members release once for a model."""
MOST_STREAMS = 512
"""Keystreams that are open at a time."""
Words = NDArray[np.uint64]
Stream = tuple[bytes, bool]
"""A mask: its 32-byte key, and whether it is added (or subtracted)."""


class Noise(Protocol):
    """Integer noise of a privacy mechanism, in grid steps."""

    def __call__(self, start: int, out: NDArray[np.int32]) -> None:
        """Fill `out` with the noise of the values start, start + 1, ...; called once for each
        value, from any thread.
        """


@dataclass(frozen=True)
class Contribution:
    """What one client adds to a sum.

    Attributes:
        vector: float32, [layout.length].
        weight: 1..layout.max_weight.
        metrics: a value for every metric of the layout.
    """

    vector: NDArray[np.float32]
    weight: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)

    def check(self, layout: Layout) -> tuple[float, list[int]]:
        """The L2 norm of the vector, and the values of the lanes.

        Raises:
            InputError: it does not fit the layout, or holds something that is not a finite number.
        """
        if (
            self.vector.dtype != np.float32
            or self.vector.shape != (layout.length,)
            or not self.vector.flags.c_contiguous
        ):
            raise InputError(
                f"The vector for {layout.name} is not {layout.length} float32 values in a row.",
                safe="Nothing was uploaded.",
            )
        if type(self.weight) is not int or not 1 <= self.weight <= layout.max_weight:
            raise InputError(
                f"The weight for {layout.name} is not in 1..{layout.max_weight}.",
                safe="Nothing was uploaded.",
            )
        if set(self.metrics) != {m.name for m in layout.metrics}:
            raise InputError(
                f"The lanes for {layout.name} are not the layout's.", safe="Nothing was uploaded."
            )
        norm = l2_norm(self.vector)
        if not math.isfinite(norm):
            raise InputError(
                f"The vector for {layout.name} holds a value that is not finite.",
                safe="Nothing was uploaded.",
            )
        lanes = [self.weight]
        for metric in layout.metrics:
            value = self.metrics[metric.name]
            if not (math.isfinite(value) and abs(value) <= metric.limit):
                raise InputError(
                    f"Lane {metric.name!r} is not within +-{metric.limit}.",
                    safe="Nothing was uploaded.",
                )
            lanes.append(round(value / metric.resolution) + metric.bound)
        return norm, lanes


def l2_norm(vector: NDArray[np.float32]) -> float:
    """The L2 norm, block by block; not finite where a value is not.

    In single precision where that is enough. Its squares overflow from 2^64 on, and below 2^-63
    they lose up to 2^-126 each: where that could be more than 2^-26 of the whole, they are added in
    double precision, which holds all of them.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        square = _square_norm(vector, np.float32)
        if not vector.size * 2.0**-100 <= square < math.inf:
            square = _square_norm(vector, np.float64)
    return math.sqrt(square)


def _square_norm(vector: NDArray[np.float32], kind: type[np.float32] | type[np.float64]) -> float:
    pieces = (vector[at:end].astype(kind, copy=False) for at, end in _pieces(0, vector.size, BLOCK))
    return math.fsum(float(np.dot(piece, piece)) for piece in pieces)


def threads_available() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def mask(
    out: Words,
    layout: Layout,
    cohort: int,
    contribution: Contribution,
    streams: Sequence[Stream],
    *,
    noise: Noise | None = None,
    threads: int | None = None,
    rounding_seed: bytes | None = None,
) -> None:
    """Write the masked words of `contribution` into `out` ([layout.words(cohort)], contiguous).

    Args:
        streams: every mask of this client.
        noise: required if and only if the layout has a noise bound.
        threads: None: one for each core.
        rounding_seed: 32 bytes, for a repeatable rounding in tests.

    Raises:
        InputError: the contribution does not fit the layout.
        Refused: noise beyond its bound, or no rounding within the norm bound; `out` holds nothing
            of use then.
    """
    if (noise is None) != (layout.noise_bound == 0):
        kind = "with" if layout.noise_bound else "without"
        raise InputError(f"{layout.name} is summed {kind} noise.", safe="Nothing was uploaded.")
    norm, lanes = contribution.check(layout)
    scale = (
        min(1.0, layout.clip_norm / norm if norm > 0 else 1.0)
        * contribution.weight
        / layout.max_weight
        / layout.step
    )
    packer = partial(_Packer, layout, cohort, contribution.vector, scale)
    seed = rounding_seed or os.urandom(32)
    if noise is not None:
        seed = _bounded_rounding(packer, layout, seed)
    out[layout.vector_words(cohort) :] = np.array(lanes, np.uint64)
    _pack_and_mask(partial(packer, seed), out, noise, streams, threads or threads_available())


def _pack_and_mask(
    packer: Callable[[], _Packer],
    out: Words,
    noise: Noise | None,
    streams: Sequence[Stream],
    threads: int,
) -> None:
    """One thread packs; what it has packed is masked by helpers, in the end by all. A helper waits
    for nobody: it ends when there is nothing to mask, and another is called with the next piece.
    The packer's buffers are gone before this thread takes some to mask.
    """
    packed: deque[tuple[int, int]] = deque()
    helpers: list[Future[None]] = []

    def work() -> None:
        block = block_of(out.size)
        masks = Masks(streams, min(block, out.size), alone=threads == 1)
        while True:
            try:
                span = packed.popleft()
            except IndexError:
                return  # no masking error is taken for this: what could not be masked is not sent
            for at, end in _pieces(*span, block):
                masks.apply(out[at:end], at // block)

    try:
        begin = 0
        for end in packer().pack(out, noise):
            packed.append((begin, end))
            begin = end
            if sum(not helper.done() for helper in helpers) < threads - 1:
                helpers.append(_pool().submit(work))
        packed.append((begin, out.size))
        work()
    finally:
        packed.clear()
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


def _bounded_rounding(packer: Callable[[bytes], _Packer], layout: Layout, seed: bytes) -> bytes:
    """The first seed, from `seed` on, whose rounding keeps the norm bound."""
    for _ in range(_NORM_DRAWS):
        if packer(seed).square_norm() <= layout.integer_norm**2:
            return seed
        seed = os.urandom(32)
    raise Refused(
        "No rounding of the vector stays within its norm bound.", safe="Nothing was uploaded."
    )


def apply_masks(
    total: Words,
    streams: Sequence[Stream],
    threads: int | None = None,
    uploads: Sequence[Words] = (),
) -> None:
    """Add masked vectors to their sum and apply `streams` to it, in place: each block is finished
    while it is in the cache.
    """

    block = block_of(total.size)

    def work(span: tuple[int, int]) -> None:
        alone = span == (0, total.size)
        for first in range(0, max(len(streams), 1), MOST_STREAMS):
            masks = Masks(
                streams[first : first + MOST_STREAMS], min(block, total.size), alone=alone
            )
            for at, end in _pieces(*span, block):
                target = total[at:end]
                for upload in uploads if first == 0 else ():
                    np.add(target, upload[at:end], out=target)
                masks.apply(target, at // block)

    _each(work, total.size, threads, block)


class _Packer:
    """Rounds one client's vector and packs it into words, in buffers of its own."""

    def __init__(
        self, layout: Layout, cohort: int, vector: NDArray[np.float32], scale: float, seed: bytes
    ) -> None:
        single = layout.bits <= 16 and scale < 2.0**100  # beyond, single precision could overflow
        self._float: Any = np.float32 if single else np.float64
        self._whole: Any = np.int32 if single else np.int64
        self._draw: Any = np.uint16 if single else np.uint32
        self._places = 16 if single else 32
        self._layout, self._width = layout, layout.width(cohort)
        self._words, self._planes = layout.vector_words(cohort), layout.per_word(cohort)
        # A clamped value with the largest draw is the largest integer of its type, or below it.
        self._limit = self._float(layout.magnitude << self._places)
        self._vector, self._scale = (
            vector,
            self._float(min(scale * (1 << self._places), float(np.finfo(self._float).max))),
        )
        self._offset = np.uint64(
            sum(layout.offset << plane * self._width for plane in range(self._planes))
        )
        self._stream = Keystream(seed)
        item = np.dtype(self._float).itemsize
        self._piece = max(_PIECE_BYTES // item, block_of(layout.words(cohort)))
        size = min(self._piece, self._words)
        # The buffers of one step lie where those of an earlier one are not needed any more:
        # together they fill the cache.
        self._integers = np.empty(size, self._whole)
        values = -(-size * item // 8)
        scratch = aligned(8 * max(size, values + -(-size * item // 16) + SPARE)).view(np.uint64)
        self._values, self._draws, self._lifted = (
            scratch[:values].view(self._float)[:size],
            scratch[values:],
            scratch[:size],
        )
        self._noise = np.empty(size if layout.noise_bound else 0, np.int32)

    def square_norm(self) -> float:
        """Squared L2 norm of the rounded integers."""
        return sum(
            float(np.dot(values, values))
            for at, end in _pieces(0, self._words, self._piece)
            for values in (rounded.astype(np.float64) for _, _, rounded in self._rounded(at, end))
        )

    def pack(self, out: Words, noise: Noise | None) -> Iterator[int]:
        """Write the fields of all words but the lanes, piece by piece; yields where each but the
        last ends: a block's edge.
        """
        for begin, end in _pieces(0, self._words, self._piece):
            self._pack(out, begin, end, noise)
            if end < self._words:
                yield end

    def _pack(self, out: Words, begin: int, end: int, noise: Noise | None) -> None:
        layout = self._layout
        for plane, first, integers in self._rounded(begin, end):
            count = integers.size
            target = out[begin : begin + count]
            if noise is not None:
                extra = self._noise[:count]
                noise(first, extra)
                if extra.min() < -layout.noise_bound or extra.max() > layout.noise_bound:
                    raise Refused("The noise exceeds its bound.", safe="Nothing was uploaded.")
                np.add(integers, extra, out=integers)
            # Signed fields are added to words that hold every field's offset: modulo 2**64 the
            # borrows cancel.
            lifted = self._lifted[:count]
            np.copyto(lifted.view(np.int64), integers)
            if plane == 0:
                np.add(lifted, self._offset, out=target)
            else:
                np.left_shift(lifted, plane * self._width, out=lifted)
                np.add(target, lifted, out=target)

    def _rounded(self, at: int, end: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
        """For each plane: its number, the position of the first value, and the values rounded to
        [-M, M].
        """
        for plane in range(self._planes):
            first = plane * self._words + at
            count = min(plane * self._words + min(end, self._words), self._layout.length) - first
            if count > 0:
                yield plane, first, self._round((plane << 32) + at // self._piece, first, count)

    def _round(self, block: int, first: int, count: int) -> NDArray[Any]:
        values, integers = self._values[:count], self._integers[:count]
        words = self._stream.block(block, self._draws, -(-count * self._places // 64))
        np.multiply(self._vector[first : first + count], self._scale, out=values, dtype=self._float)
        values.clip(-self._limit, self._limit, out=values)
        np.copyto(integers, values, casting="unsafe")
        np.add(integers, words.view(self._draw)[:count], out=integers)
        np.right_shift(integers, self._places, out=integers)
        return integers


class MaskedSum:
    """Uploads and the masks of their sum, not added up yet: a reader needs one block at a time. It
    is neither copied nor stored.

    Args:
        uploads: [words] each, at least one; they must not change.
        streams: all that is to be applied to the sum of `uploads`.
    """

    def __init__(self, uploads: Sequence[Words], streams: Sequence[Stream]) -> None:
        self._uploads, self._streams, self._size = uploads, streams, uploads[0].size

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MaskedSum holds keys of masks: it is neither copied nor stored")

    def words(self, threads: int | None = None) -> Words:
        """The whole sum."""
        total = np.zeros(self._size, np.uint64)
        apply_masks(total, self._streams, threads, self._uploads)
        return total

    def reader(self, *, alone: bool) -> Callable[[int, int], Words]:
        """For one thread: gives the words from a block's edge to another, or to the end, to write
        on until the next call.

        Args:
            alone: no other thread reads meanwhile.
        """
        block = block_of(self._size)
        size = min(block, self._size)
        masks, buffer = Masks(self._streams, size, alone=alone), aligned(8 * size).view(np.uint64)

        def read(at: int, end: int) -> Words:
            target = buffer[: end - at]
            first = self._uploads[0][at:end]
            for upload in self._uploads[1:]:
                first = np.add(first, upload[at:end], out=target)
            if first is not target:
                np.copyto(target, first)
            masks.apply(target, at // block)
            return target

        return read


@dataclass(frozen=True)
class RoundSum:
    """The sum of the survivors' contributions.

    Attributes:
        layout: what was summed.
        survivors: the parties in the sum, sorted.
        cohort: number of participants that the field width was made for.
        packed: the sum; it is opened where it is read.
    """

    layout: Layout
    survivors: tuple[str, ...]
    cohort: int
    packed: Words | MaskedSum

    @cached_property
    def words(self) -> Words:
        """The unmasked sum, packed."""
        return self.packed.words() if isinstance(self.packed, MaskedSum) else self.packed

    @cached_property
    def _lanes(self) -> list[int]:
        """The sums of weights and metrics."""
        size, first = self.layout.words(self.cohort), self.layout.vector_words(self.cohort)
        read, block, found = self._reader(alone=True), block_of(size), list[int]()
        for at, end in _pieces(first // block * block, size, block):
            found += read(at, end)[max(first - at, 0) :].tolist()
        return found

    def _reader(self, *, alone: bool) -> Callable[[int, int], Words]:
        """See `MaskedSum.reader`."""
        if isinstance(self.packed, MaskedSum):
            return self.packed.reader(alone=alone)
        words = self.packed
        return lambda at, end: words[at:end].copy()

    def check(self) -> None:
        """Refuse a sum that no honest clients can have: masks that do not cancel leave uniform
        lanes.

        Raises:
            Refused: a client uploaded rubbish, or clients and server disagree on the round.
        """
        layout, count, lanes = self.layout, len(self.survivors), self._lanes
        limits = [2 * metric.bound for metric in layout.metrics]
        if not count <= lanes[0] <= count * layout.max_weight or any(
            lane > count * limit for lane, limit in zip(lanes[1:], limits, strict=True)
        ):
            raise Refused("The unmasked sum is impossible.", safe="It was not used.", fix=AGAIN)

    @property
    def weight(self) -> int:
        """Sum of the weights."""
        return self._lanes[0]

    @property
    def metrics(self) -> dict[str, float]:
        """Sums of the metrics."""
        count = len(self.survivors)
        return {
            metric.name: (lane - count * metric.bound) * metric.resolution
            for lane, metric in zip(self._lanes[1:], self.layout.metrics, strict=True)
        }

    def total(self, threads: int | None = None) -> NDArray[np.float32]:
        """Sum of weight / max_weight * vector (clipped, rounded, noised), float32 [length]."""
        return self._decode(self.layout.step, threads)

    def mean(
        self, threads: int | None = None, buffer: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Weighted mean of the vectors: float32, [layout.length].

        Args:
            buffer: the result of an earlier round of this layout, which is overwritten: new memory
                costs a tenth of the time.

        Raises:
            InputError: the buffer is none of this layout.
        """
        return self._decode(
            self.layout.step * self.layout.max_weight / self.weight, threads, buffer
        )

    def integers(self) -> NDArray[np.int64]:
        """The exact sum in grid steps: int64, [layout.length]."""
        words, width = self.layout.vector_words(self.cohort), self.layout.width(self.cohort)
        low = np.uint64((1 << width) - 1)
        planes = [
            (self.words[:words] >> np.uint64(p * width)) & low
            for p in range(self.layout.per_word(self.cohort))
        ]
        fields = np.concatenate(planes)[: self.layout.length].astype(np.int64)
        result: NDArray[np.int64] = fields - len(self.survivors) * self.layout.offset
        return result

    def _decode(
        self, factor: float, threads: int | None, buffer: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        layout, words = self.layout, self.layout.vector_words(self.cohort)
        width, planes, block = (
            layout.width(self.cohort),
            layout.per_word(self.cohort),
            block_of(layout.words(self.cohort)),
        )
        result = np.empty(layout.length, np.float32) if buffer is None else buffer
        if result.shape != (layout.length,) or result.dtype != np.float32:
            raise InputError(
                f"The buffer for {layout.name} is not {layout.length} float32 values.",
                safe="Nothing was unmasked.",
            )
        # Processors convert 32-bit integers by the vector, wider ones one by one.
        whole: Any = np.int32 if width < 32 else np.int64
        kind: Any = np.float32 if width <= 24 else np.float64
        low, offset = whole((1 << width) - 1), whole(len(self.survivors) * layout.offset)

        def work(span: tuple[int, int]) -> None:
            read, fields = (
                self._reader(alone=span == (0, words)),
                np.empty(min(block, span[1] - span[0]), whole),
            )
            for at, end in _pieces(*span, block):
                shifted, integers = read(at, end), fields[: end - at]
                for plane in range(planes):
                    if plane:
                        np.right_shift(shifted, width, out=shifted)
                    np.copyto(integers, shifted, casting="unsafe")
                    np.bitwise_and(integers, low, out=integers)
                    np.subtract(integers, offset, out=integers)
                    target = result[
                        plane * words + at : plane * words + end
                    ]  # the last plane may end before
                    np.multiply(
                        integers[: target.size],
                        kind(factor),
                        out=target,
                        dtype=kind,
                        casting="unsafe",
                    )

        _each(work, words, threads, block)
        return result


def _pieces(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, size):
        yield at, min(at + size, end)


def _each(
    call: Callable[[tuple[int, int]], None], words: int, threads: int | None, block: int
) -> None:
    """Call for at most `threads` ranges of `words` that begin at block boundaries: one here, the
    others in the pool.
    """
    blocks = -(-words // block)
    count = max(1, min(threads or threads_available(), blocks))
    edges = [blocks * i // count * block for i in range(count)] + [words]
    first, *others = pairwise(edges)
    helpers = [_pool().submit(call, span) for span in others]
    try:
        call(first)
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads_available(), thread_name_prefix="secagg")


# A forked child has the pool object but none of its threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
