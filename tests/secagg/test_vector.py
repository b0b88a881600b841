"""The vector path: no overflow, unbiased rounding, and the same words however the work is split."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import ContractError, InputError, Refused
from fedark.secagg import stream as stream_module
from fedark.secagg import vector as vector_module
from fedark.secagg.stream import BLOCK, LONGEST, SPARE, Keystream, Masks
from fedark.secagg.terms import Lane, Layout, SessionTerms
from fedark.secagg.vector import Contribution, MaskedSum, RoundSum, apply_masks, l2_norm, mask


def names(count):
    return tuple(f"p{i:05d}" for i in range(count))


@settings(max_examples=60)
@given(
    bits=st.integers(2, 24),
    cohort=st.integers(3, 2048),
    noise=st.one_of(st.just(0), st.integers(1, 1 << 29)),
    sign=st.sampled_from([-1, 1]),
    toward=st.sampled_from([-1, 1]),
)
def test_the_extremes_of_any_cohort_and_width_do_not_overflow(bits, cohort, noise, sign, toward):
    """A value at +-M with noise at +-K, the same or the other way, from the whole cohort."""
    # The clip is far off, so that every value may be extreme within the norm bound of a noised
    # layout too.
    layout = Layout("x", 7, bits, 1e9, 1.0, 3, (Lane("m", 1e6),), noise)
    assert not layout.problems(cohort)
    extreme = Contribution(np.full(7, sign * 1e8, np.float32), 3, {"m": sign * 1e6})
    words = np.empty(layout.words(cohort), np.uint64)
    loudest = (lambda start, out: out.fill(toward * noise)) if noise else None
    mask(words, layout, cohort, extreme, [], noise=loudest, threads=1)
    exact = words.astype(object) * cohort
    assert max(exact) < 1 << 64, "a word wrapped around"
    result = RoundSum(layout, names(cohort), cohort, exact.astype(np.uint64))
    assert (result.integers() == cohort * (sign * layout.magnitude + toward * noise)).all()
    assert result.weight == 3 * cohort
    assert result.metrics == {"m": cohort * sign * 1e6}


def test_one_client_more_than_the_width_was_made_for_would_overflow():
    """Control: the width is just large enough."""
    layout = Layout("x", 3, 16)
    full = 2 * layout.offset
    for cohort in range(3, 2049):
        assert full * cohort < 1 << layout.width(cohort)
        assert full * cohort >= 1 << (layout.width(cohort) - 1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 25}, "bits"),
        ({"value_range": 0.0}, "value_range"),
        ({"value_range": 2.0}, "value_range"),
        ({"clip_norm": float("inf")}, "value_range"),
        ({"noise_bound": -1}, "noise_bound"),
        ({"noise_bound": (1 << 29) + 1}, "noise_bound"),
        ({"max_weight": 0}, "max_weight"),
        ({"max_weight": 1 << 62}, "max_weight"),
        ({"metrics": (Lane("a", 1e30, 1e-3),)}, "overflow"),
        ({"metrics": (Lane("a", 1.0), Lane("a", 2.0))}, "share one name"),
        ({"length": -1}, "length"),
    ],
)
def test_a_layout_that_could_overflow_or_makes_no_sense_is_refused_with_the_policy(
    change, complaint
):
    layout = Layout(**{"name": "x", "length": 5, **change})
    with pytest.raises(ContractError, match=complaint):
        SessionTerms(bytes(48), "r", names(10), 7, 1, (layout,))


@pytest.mark.parametrize("bits", [4, 16, 20])
def test_rounding_is_unbiased(bits):
    count, draws = 2000, 400
    layout = Layout("x", count, bits, 1e9, 1.0)
    rng = np.random.default_rng(bits)
    vector = rng.uniform(-1, 1, count).astype(np.float32)
    vector[:4] = [0, 0.25 * layout.step, 1 - 0.3 * layout.step, -1 + 0.7 * layout.step]
    words = np.empty(layout.words(3), np.uint64)
    total = np.zeros(count)
    for _ in range(draws):
        mask(words, layout, 3, Contribution(vector), [], threads=1)
        got = RoundSum(layout, ("a",), 3, words).integers()
        exact = vector.astype(np.float64) / layout.step
        # single precision may move a value across a grid point by its own rounding error
        assert (np.abs(got - exact) < 1 + 1e-2).all()
        total += got - exact
    error = total / draws
    # A rounding to the nearest point would leave errors of up to half a step here: the mean of the
    # magnitudes would be 0.25.
    assert np.abs(error).max() < 6 * 0.5 / np.sqrt(draws)
    assert abs(error.mean()) < 6 * 0.5 / np.sqrt(draws * count)


@pytest.mark.parametrize("bits", [16, 22])
def test_masking_is_the_same_for_any_number_of_threads(bits):
    layout = Layout("x", 5 * BLOCK + 77, bits, 10.0, 0.5, 1, (Lane("m", 10),), 0)
    vector = np.random.default_rng(1).normal(0, 0.1, layout.length).astype(np.float32)
    streams = [(os.urandom(32), i % 2 == 0) for i in range(5)]
    seed = os.urandom(32)
    results = []
    for threads in (1, 2, 3, 7):
        words = np.empty(layout.words(9), np.uint64)
        mask(
            words,
            layout,
            9,
            Contribution(vector, 1, {"m": 3}),
            streams,
            threads=threads,
            rounding_seed=seed,
        )
        results.append(words)
        again = words.copy()
        apply_masks(again, [(key, not added) for key, added in streams], threads)
        assert RoundSum(layout, ("a",), 9, again).metrics == {"m": 3}
        assert np.array_equal(
            RoundSum(layout, ("a",), 9, again).total(threads),
            RoundSum(layout, ("a",), 9, again).total(1),
        )
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_a_stream_is_the_same_however_it_is_cut():
    key = os.urandom(32)
    whole = Keystream(key).words(3 * BLOCK)
    buffer = np.empty(BLOCK + SPARE, np.uint64)
    for index in (2, 0, 1):
        for count in (BLOCK, 100, 1):
            part = Keystream(key).block(index, buffer, count)
            assert np.array_equal(part, whole[index * BLOCK : index * BLOCK + count])
    assert np.unique(whole).size == whole.size, "no block repeats another"


@pytest.mark.parametrize("words", [1, 5, 1000, BLOCK, LONGEST])
@pytest.mark.parametrize("index", [0, 7, (1 << 64) * 3 + 5])
def test_both_ways_to_a_stream_give_the_same_bits(words, index):
    key, nonce, got = os.urandom(32), index.to_bytes(12, "big"), []
    for way in (stream_module._Gcm, stream_module._Ctr):
        buffer, cursor = np.empty(words + SPARE, np.uint64), way(key)
        cursor.begin(stream_module._counter_of(index))
        cursor.fill(*cursor.views(buffer))
        got.append(buffer[:words].tobytes())
    plain = (
        Cipher(algorithms.AES256(key), modes.CTR(nonce + b"\0\0\0\2"))
        .encryptor()
        .update(bytes(8 * words))
    )
    assert got[0] == got[1] == plain


@pytest.mark.parametrize("words", [1, 100, BLOCK, BLOCK + 1, LONGEST - 3, LONGEST])
@pytest.mark.parametrize("way", ["_Gcm", "_Ctr"])
@pytest.mark.parametrize("alone", [True, False])
def test_masks_are_the_same_however_their_blocks_are_cut(words, way, alone, monkeypatch):
    expected = np.zeros(words, np.uint64)
    keys, buffer = [os.urandom(32) for _ in range(3)], np.empty(LONGEST + SPARE, np.uint64)
    for key, sign in zip(keys, (1, -1, 1), strict=True):
        expected += np.uint64(sign % (1 << 64)) * Keystream(key).block(5, buffer, words)
    monkeypatch.setattr(stream_module, "_fastest", lambda: getattr(stream_module, way))
    masks, target = (
        Masks([(key, key != keys[1]) for key in keys], LONGEST, alone=alone),
        np.zeros(words, np.uint64),
    )
    masks.apply(np.zeros(LONGEST, np.uint64), 4)
    masks.apply(target, 5)
    assert np.array_equal(target, expected)


def test_no_stream_repeats_under_a_target_that_is_longer_than_its_block(monkeypatch):
    monkeypatch.setattr(stream_module, "_fastest", lambda: stream_module._Gcm)
    with pytest.raises(ValueError, match="Nonce"):
        Masks([(bytes(32), True)], 8, alone=True).apply(np.zeros(16, np.uint64), 0)
    monkeypatch.setattr(stream_module, "_fastest", lambda: stream_module._Ctr)
    target = np.zeros(16, np.uint64)
    Masks([(bytes(32), True)], 8, alone=True).apply(target, 0)
    assert np.unique(target).size == 16


@pytest.mark.parametrize("way", ["_Gcm", "_Ctr"])
def test_threads_that_share_a_stream_get_the_blocks_that_they_ask_for(way, monkeypatch):
    monkeypatch.setattr(stream_module, "_fastest", lambda: getattr(stream_module, way))
    stream, key = Keystream(bytes(32)), bytes(32)
    expected = {
        index: Keystream(key).block(index, np.empty(2000 + SPARE, np.uint64), 2000).copy()
        for index in range(8)
    }

    def ask(index):
        buffer = np.empty(2000 + SPARE, np.uint64)
        return all(
            np.array_equal(stream.block(index, buffer, 2000), expected[index]) for _ in range(200)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(8)))


def test_longer_vectors_are_cut_into_longer_blocks_and_never_into_few():
    sizes = [
        stream_module.block_of(words)
        for words in (0, 1, 300_000, 1 << 20, (1 << 21) - 1, 1 << 21, 1 << 32)
    ]
    assert sizes == [BLOCK, BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK, LONGEST, LONGEST]


@pytest.mark.parametrize("length", [10, 3 * BLOCK, 5 * LONGEST + 3])
def test_a_sum_that_is_opened_block_by_block_is_the_sum_that_is_written_down(length):
    layout = Layout("x", length, metrics=(Lane("m", 100, 1),), max_weight=9)
    rng = np.random.default_rng(length)
    keys = [os.urandom(32) for _ in range(3)]
    uploads = []
    for i, key in enumerate(keys):
        uploads.append(np.empty(layout.words(3), np.uint64))
        vector = rng.normal(0, 0.01, length).astype(np.float32)
        mask(uploads[-1], layout, 3, Contribution(vector, i + 1, {"m": i}), [(key, True)])
    opened = RoundSum(
        layout, ("a", "b", "c"), 3, MaskedSum(uploads, [(key, False) for key in keys])
    )
    opened.check()
    assert opened.weight == 6
    assert opened.metrics == {"m": 3}
    mean = opened.mean()
    whole = RoundSum(layout, ("a", "b", "c"), 3, opened.words)
    assert (whole.weight, whole.metrics) == (6, {"m": 3})
    assert np.array_equal(mean, whole.mean(1))
    assert np.array_equal(mean, whole.mean()), "what is decoded is left as it was"
    buffer = np.empty(length, np.float32)
    assert opened.mean(buffer=buffer) is buffer
    assert np.array_equal(buffer, mean)
    for wrong in (np.empty(length + 1, np.float32), np.empty(length, np.float64)):
        with pytest.raises(InputError, match="buffer"):
            opened.mean(buffer=wrong)


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 8 words, of 16 in vectors of 100 words and more: everything that a long vector has,
    in a short one.
    """
    monkeypatch.setattr(vector_module, "block_of", lambda words: 8 if words < 100 else 16)
    monkeypatch.setattr(vector_module, "_PIECE_BYTES", 16)


@pytest.mark.parametrize("bits", [5, 16, 20])
@pytest.mark.parametrize("lanes", [0, 1, 19])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_vector_of_many_blocks_is_summed_like_a_short_one(short_blocks, bits, lanes, threads):
    rng = np.random.default_rng(bits)
    for words in (1, 7, 8, 9, 80, 99, 100, 101, 160):
        layout = Layout(
            "x", 1, bits, 1e6, 1.0, metrics=tuple(Lane(f"m{i}", 100, 1) for i in range(lanes))
        )
        length = max(1, words - 1 - lanes) * layout.per_word(3) - int(rng.integers(0, 2))
        layout = replace(layout, length=length)
        keys, uploads, exact = [os.urandom(32) for _ in range(3)], [], np.zeros(length)
        for key in keys:
            grid = rng.integers(-layout.magnitude, layout.magnitude + 1, length)
            exact += grid
            uploads.append(np.empty(layout.words(3), np.uint64))
            vector = (grid * layout.step).astype(np.float32)
            metrics = {f"m{i}": float(i) for i in range(lanes)}
            mask(
                uploads[-1],
                layout,
                3,
                Contribution(vector, metrics=metrics),
                [(key, True)],
                threads=threads,
            )
        opened = RoundSum(
            layout, ("a", "b", "c"), 3, MaskedSum(uploads, [(key, False) for key in keys])
        )
        opened.check()
        assert opened.metrics == {f"m{i}": 3.0 * i for i in range(lanes)}
        # A value may lie a little below its grid point and be rounded down.
        assert np.abs(opened.total(threads) / layout.step - exact).max() < 3.01
        assert np.array_equal(
            opened.total(threads), RoundSum(layout, ("a", "b", "c"), 3, opened.words).total(1)
        )
        blocks = range(0, layout.words(3), vector_module.block_of(layout.words(3)))
        zeros = np.zeros(layout.words(3), np.uint64)
        apply_masks(zeros, [(keys[0], True)], threads)
        alone = [
            Keystream(keys[0]).block(i, np.empty(18, np.uint64), 16)[:16].copy()
            for i, _ in enumerate(blocks)
        ]
        width = vector_module.block_of(layout.words(3))
        assert np.array_equal(
            zeros, np.concatenate([block[:width] for block in alone])[: zeros.size]
        )


def test_a_masked_sum_is_not_copied(short_blocks):
    with pytest.raises(TypeError, match="neither copied nor stored"):
        pickle.dumps(
            RoundSum(
                Layout("x", 1), ("a",), 3, MaskedSum([np.zeros(2, np.uint64)], [(bytes(32), True)])
            )
        )


@pytest.mark.parametrize("bits", [16, 20])
def test_the_largest_values_of_any_scale_stay_within_their_fields(bits):
    layout = Layout("x", 6, bits, 1e30, 1e-30)
    vector = np.array([3e29, -3e29, 0, 1e-30, -1e-30, 1e-45], np.float32)
    words = np.empty(layout.words(3), np.uint64)
    mask(words, layout, 3, Contribution(vector), [])
    limit = layout.magnitude
    assert RoundSum(layout, ("a",), 3, words).integers()[:5].tolist() == [
        limit,
        -limit,
        0,
        limit,
        -limit,
    ]


def test_two_rounding_planes_never_share_draws():
    layout = Layout("x", 4 * BLOCK, 2, 1e9, 1.0)
    vector = np.full(layout.length, 0.5, np.float32)
    words = np.empty(layout.words(3), np.uint64)
    mask(words, layout, 3, Contribution(vector), [], threads=1)
    got = RoundSum(layout, ("a",), 3, words).integers()
    planes = [
        got[i : i + layout.vector_words(3)] for i in range(0, got.size, layout.vector_words(3))
    ]
    for one in range(3):
        for other in range(one + 1, 3):
            size = min(planes[one].size, planes[other].size)
            agree = np.mean(planes[one][:size] == planes[other][:size])
            assert abs(agree - 0.5) < 6 * 0.5 / np.sqrt(size)


def test_noise_is_added_before_the_mask_and_every_value_gets_its_own():
    layout = Layout("x", 3 * BLOCK + 5, 16, 10.0, 1.0, 1, (), 500)
    seen = np.zeros(layout.length, np.int64)

    def ramp(start, out):
        seen[start : start + out.size] += 1
        out[:] = (np.arange(start, start + out.size) % 1001) - 500

    words = np.empty(layout.words(5), np.uint64)
    mask(
        words,
        layout,
        5,
        Contribution(np.zeros(layout.length, np.float32)),
        [],
        noise=ramp,
        threads=2,
    )
    assert (seen == 1).all()
    assert (
        RoundSum(layout, ("a",), 5, words).integers() == (np.arange(layout.length) % 1001) - 500
    ).all()


@pytest.mark.parametrize("level", [501, -501])
def test_noise_beyond_its_bound_is_refused_and_never_wraps(level):
    layout = Layout("x", 10, 16, 10.0, 1.0, 1, (), 500)
    words = np.empty(layout.words(5), np.uint64)
    with pytest.raises(Refused, match="noise"):
        mask(
            words,
            layout,
            5,
            Contribution(np.zeros(10, np.float32)),
            [],
            noise=lambda start, out: out.fill(level),
            threads=1,
        )


def test_a_contract_with_noise_gets_none_without_it_and_one_without_gets_none_with_it():
    for bound, noise in ((500, None), (0, lambda start, out: out.fill(0))):
        layout = Layout("x", 10, 16, 10.0, 1.0, 1, (), bound)
        with pytest.raises(InputError, match="noise"):
            mask(
                np.empty(layout.words(5), np.uint64),
                layout,
                5,
                Contribution(np.zeros(10, np.float32)),
                [],
                noise=noise,
            )


def test_a_noised_vector_keeps_its_integer_norm_bound_although_rounding_inflates_norms():
    def norm(layout, noise):
        words = np.empty(layout.words(3), np.uint64)
        mask(words, layout, 3, Contribution(vector), [], noise=noise, threads=1)
        return np.linalg.norm(RoundSum(layout, ("a",), 3, words).integers())

    # Every value half-way between two grid points, and a clip that just admits them: the worst
    # case.
    clip = np.sqrt(4000) / 2 / 15
    noised, free = Layout("x", 4000, 5, clip, 1.0, 1, (), 5), Layout("x", 4000, 5, clip, 1.0)
    vector = np.full(4000, 0.5 * free.step, np.float32)
    assert (
        max(norm(noised, lambda start, out: out.fill(0)) for _ in range(300)) <= noised.integer_norm
    )
    assert max(norm(free, None) for _ in range(1000)) > noised.integer_norm, (
        "control: unchecked rounding exceeds the bound"
    )


def test_masked_words_are_uniform_whatever_the_input():
    layout = Layout("x", 30_000, 16, 1e9, 1.0)
    for vector in (np.zeros(30_000, np.float32), np.ones(30_000, np.float32)):
        words = np.empty(layout.words(10), np.uint64)
        mask(words, layout, 10, Contribution(vector), [(os.urandom(32), True)], threads=1)
        bits = np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1)
        assert np.abs(bits.mean(axis=0) - 0.5).max() < 6 * 0.5 / np.sqrt(words.size)


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_uploads_wrap_modulo_2_to_the_64_for_any_number_of_threads_and_streams(threads):
    rng = np.random.default_rng(5)
    uploads = [rng.integers(0, 1 << 64, 2 * BLOCK + 9, dtype=np.uint64) for _ in range(4)]
    keys = [os.urandom(32) for _ in range(600)]
    total = np.full(2 * BLOCK + 9, (1 << 64) - 1, np.uint64)
    apply_masks(total, [(key, i % 2 == 0) for i, key in enumerate(keys)], threads, uploads)
    apply_masks(total, [(key, i % 2 == 1) for i, key in enumerate(keys)], threads)
    expected = sum(upload.astype(object) for upload in uploads) - 1
    assert (total.astype(object) == expected % (1 << 64)).all()


def test_a_helper_that_cannot_be_started_costs_this_vector_and_no_later_one(monkeypatch):
    """Found in review: a thread of the shared pool waited for ever for pieces that nobody would
    bring.
    """
    layout = Layout("x", 20 * BLOCK)
    vector, streams, seed = np.ones(layout.length, np.float32), [(bytes(32), True)], bytes(32)
    alone, shared = (np.empty(layout.words(1), np.uint64) for _ in range(2))
    mask(alone, layout, 1, Contribution(vector), streams, threads=1, rounding_seed=seed)
    monkeypatch.setattr(vector_module, "threads_available", lambda: 3)
    vector_module._pool.cache_clear()
    start, calls = threading.Thread.start, iter([True, False])

    def fail_at_second(thread):
        if not next(calls, True):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_at_second)
        with contextlib.suppress(RuntimeError):
            mask(shared, layout, 1, Contribution(vector), streams, threads=3, rounding_seed=seed)
    for _ in range(5):
        mask(shared, layout, 1, Contribution(vector), streams, threads=3, rounding_seed=seed)
        assert np.array_equal(alone, shared)
    vector_module._pool().shutdown(wait=True)  # ends, since no thread waits
    vector_module._pool.cache_clear()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_piece_that_cannot_be_masked_is_an_error_and_never_passed_over(monkeypatch, threads):
    def broken(self, target, index):
        raise IndexError("of masking itself")

    monkeypatch.setattr(vector_module.Masks, "apply", broken)
    layout = Layout("x", 20 * BLOCK)
    with pytest.raises(IndexError, match="masking itself"):
        mask(
            np.empty(layout.words(1), np.uint64),
            layout,
            1,
            Contribution(np.ones(layout.length, np.float32)),
            [],
            threads=threads,
        )


@pytest.mark.parametrize("power", [-100, -90, -80, -70, -60, 0, 60, 63])
def test_the_clip_holds_at_every_magnitude(power):
    """Found in review: squares below 2^-149 are 0 in single precision, and such a vector stayed as
    long as it was.
    """
    clip = 2.0**power
    layout = Layout("x", 1000, 16, clip, clip)
    words = np.empty(layout.words(3), np.uint64)
    mask(words, layout, 3, Contribution(np.full(1000, clip, np.float32)), [])
    length = np.linalg.norm(RoundSum(layout, ("a",), 3, words).integers()) * layout.step
    assert length / clip == pytest.approx(1, abs=1e-2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 2e-22, 1e-19, 1.0, 1e19, 1e30, 3e38])
def test_a_norm_is_right_at_every_magnitude_and_warns_of_nothing(size):
    vector = np.zeros(3 * BLOCK + 5, np.float32)
    vector[::7] = size
    assert l2_norm(vector) / float(np.linalg.norm(vector.astype(np.float64))) == pytest.approx(
        1, abs=1e-6
    )
    vector[0] = 1.0
    assert l2_norm(vector) / float(np.linalg.norm(vector.astype(np.float64))) == pytest.approx(
        1, abs=1e-6
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_norm_of_what_is_not_finite_is_not_finite(value):
    vector = np.full(BLOCK + 5, 3e38, np.float32)
    vector[-1] = value
    assert not np.isfinite(l2_norm(vector))
