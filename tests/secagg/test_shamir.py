"""Sharing: any t shares recover, fewer say nothing, and wrong ones are noticed."""

from __future__ import annotations

import math
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import ProtocolError
from fedark.secagg import shamir


def secrets(count):
    return np.frombuffer(os.urandom(32 * count), np.uint8).reshape(count, 32)


@settings(max_examples=60)
@given(count=st.integers(1, 40), data=st.data())
def test_any_threshold_of_the_shares_recovers_every_secret(count, data):
    threshold = data.draw(st.integers(1, count))
    members = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    hidden = secrets(data.draw(st.integers(1, 5)))
    shares = shamir.split(hidden, threshold, count)
    assert shares.shape == (count, len(hidden), shamir.SHARE_BYTES)
    assert np.array_equal(shamir.combine(members, shares[[m - 1 for m in members]]), hidden)


def test_extreme_digits_survive():
    hidden = np.array([[0] * 32, [255] * 32, [0, 255] * 16], np.uint8)
    for _ in range(50):
        assert np.array_equal(shamir.combine([3, 1], shamir.split(hidden, 2, 3)[[2, 0]]), hidden)


def test_a_field_element_beyond_16_bits_keeps_its_17th_bit():
    values = np.array([[[shamir.PRIME - 1, 0, 1, 65535] * 4]], np.int64)
    assert np.array_equal(shamir._unpack(shamir._pack(values)), values)


def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret():
    """Chi-square over the field's digits of t - 1 shares, for two opposite secrets; 256 coarse
    bins, 255 degrees of freedom.
    """
    count, draws = 5, 4000
    for byte in (0, 255):
        hidden = np.full((draws, 32), byte, np.uint8)
        seen = shamir._unpack(shamir.split(hidden, 3, count))[:2]
        for member in range(2):
            bins = np.bincount((seen[member].reshape(-1) % 65536) >> 8, minlength=256)
            expected = bins.sum() / 256
            assert ((bins - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)
        # ... and jointly: the sum and difference of two shares.
        for joint in ((seen[0] + seen[1]), (2 * seen[0] - seen[1])):
            bins = np.bincount(((joint % shamir.PRIME) % 65536).reshape(-1) >> 8, minlength=256)
            assert ((bins - bins.sum() / 256) ** 2 / (bins.sum() / 256)).sum() < 255 + 6 * np.sqrt(
                2 * 255
            )


def test_control_a_threshold_of_shares_is_not_uniform_in_combination():
    hidden = np.zeros((500, 32), np.uint8)
    shares = shamir._unpack(shamir.split(hidden, 2, 2))
    assert ((2 * shares[0] - shares[1]) % shamir.PRIME == 0).all()


def test_any_guess_of_the_secret_fits_fewer_shares_than_the_threshold():
    """Perfect secrecy, exactly: for every secret digit there is one polynomial through t - 1 given
    shares.
    """
    rng = random.Random(1)
    points, values = [1, 4], [rng.randrange(shamir.PRIME) for _ in range(2)]
    for guess in (0, 1, 65535, rng.randrange(65536)):
        weights = shamir._lagrange([0, *points], [9])[0].astype(int).tolist()
        completed = (
            sum(w * v for w, v in zip(weights, (guess, *values), strict=True)) % shamir.PRIME
        )
        back = shamir._lagrange([*points, 9], [0])[0].astype(int).tolist()
        assert (
            sum(w * v for w, v in zip(back, (*values, completed), strict=True)) % shamir.PRIME
            == guess
        )


def test_a_wrong_share_is_off_the_polynomial():
    shares = shamir.split(secrets(2), 3, 6)
    shares[4, 1, 7] ^= 1
    assert shamir.agreeing([1, 2, 3], shares[:3], [4, 5, 6], shares[3:]).tolist() == [
        True,
        False,
        True,
    ]


def test_weights_are_those_of_exact_arithmetic():
    members, points = random.Random(2).sample(range(1, 2049), 40), [0, 3000, 65536]
    for point, row in zip(
        points, shamir._lagrange(members, points).astype(int).tolist(), strict=True
    ):
        for mine, weight in zip(members, row, strict=True):
            others = [other for other in members if other != mine]
            whole = math.prod(point - other for other in others) * pow(
                math.prod(mine - other for other in others), -1, shamir.PRIME
            )
            assert weight == whole % shamir.PRIME


def test_any_bytes_are_taken_for_shares_so_that_no_member_can_stop_the_recovery():
    shares = shamir.split(secrets(1), 2, 3)
    for noise in (bytes([255]) * 34, os.urandom(34)):
        shares[0, 0] = np.frombuffer(noise, np.uint8)
        assert shamir.combine([1, 2], shares[:2]).shape == (1, 32)


@pytest.mark.parametrize("members", [[1, 1], [0, 2]])
def test_a_member_that_stands_twice_or_is_the_secret_itself_is_refused(members):
    shares = shamir.split(secrets(1), 2, 3)
    with pytest.raises(ProtocolError, match="twice"):
        shamir.combine(members, shares[:2])


def test_coefficients_are_uniform_in_the_field():
    draws = shamir._uniform(400_000)
    assert draws.max() <= shamir.PRIME - 1
    bins = np.bincount(draws * 256 // shamir.PRIME, minlength=256)
    expected = draws.size / 256
    assert ((bins - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)


def test_sharing_costs_the_same_for_a_vector_of_any_length():
    """Only seeds are shared: the upload of a long vector carries no more than that of a short one,
    beside its words.
    """
    assert shamir.split(secrets(1), 3, 5).nbytes == 5 * shamir.SHARE_BYTES
