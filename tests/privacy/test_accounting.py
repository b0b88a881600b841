"""Accounting: agrees with published values and with Google's accountant, and never reports less
than is true.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from fedark.foundation import canonical
from fedark.foundation.errors import InputError, ProtocolError
from fedark.privacy import accounting
from fedark.privacy.accounting import (
    Budget,
    Event,
    Guarantee,
    Spend,
    cost,
    epsilon,
    noise_multiplier,
    rdp,
)

DELTA = 1e-5
SUBSAMPLED = [
    (1.53, 0.1, 60),
    (3.44, 0.1, 60),
    (1.0, 0.01, 500),
    (0.8, 0.05, 50),
    (20.0, 0.5, 100),
    (2.0, 0.9, 30),
    (0.4, 0.5, 3),
]


def single(*parameters):
    return Spend((Event(*parameters),))


def peer(pld, events, delta=DELTA):
    """Google's epsilon, an upper bound by the method of dots."""
    total = None
    for noise, rate, steps in events:
        one = pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=2e-4, use_connect_dots=True
        ).self_compose(steps)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


@pytest.mark.parametrize(
    ("noise", "renyi", "prv", "published"),
    [(1.53, 2.995, 2.683, 2.673), (3.44, 0.997, 0.911, 0.901)],
)
def test_published_values_are_met(noise, renyi, prv, published):
    """Rate 0.1, 60 rounds, delta 1e-5. The published PRV value includes an error term of 0.01, ours
    one of 0.001.
    """
    event = Event(noise, 0.1, 60)
    assert accounting._from_rdp(rdp([event]), DELTA) == pytest.approx(renyi, abs=2e-3)
    assert accounting._numerical((event,), DELTA, added=False, error=0.01)[0] == pytest.approx(
        prv, abs=1e-3
    )
    assert epsilon(noise, 0.1, 60, DELTA) == pytest.approx(published, abs=2e-3)


@pytest.mark.parametrize("parameters", SUBSAMPLED)
def test_epsilon_is_googles_and_not_below_it(pld, parameters):
    ours, theirs = epsilon(*parameters, DELTA), peer(pld, [parameters])
    assert theirs - 1e-4 <= ours <= theirs + 3e-3


@pytest.mark.parametrize("parameters", SUBSAMPLED)
def test_both_directions_are_counted(pld, parameters):
    """Ours of the added direction against Google's, which Opacus has not; the removed one is the
    larger in every case.
    """
    noise, rate, steps = parameters
    added = accounting._numerical((Event(*parameters),), DELTA, added=True)[0]
    one = pld.from_gaussian_mechanism(
        noise, sampling_prob=rate, value_discretization_interval=2e-4, use_connect_dots=True
    )
    theirs = one._pmf_add.self_compose(steps).get_epsilon_for_delta(DELTA)
    assert theirs - 1e-4 <= added <= theirs + 3e-3
    assert added <= epsilon(*parameters, DELTA) + 1e-9


def test_different_jobs_compose_as_google_composes_them(pld):
    jobs = [(1.5, 0.1, 40), (3.0, 0.05, 100), (6.0, 1.0, 5)]
    ours, accountant = cost([single(*job) for job in jobs], DELTA)
    assert accountant == "PRV (Opacus)"
    assert peer(pld, jobs) - 1e-4 <= ours <= peer(pld, jobs) + 5e-3
    assert ours < sum(epsilon(*job, DELTA / 3) for job in jobs)


def test_releases_of_everything_are_exactly_gaussian(pld):
    ours, accountant = cost([single(8.8, 1.0, 40), single(20.0, 1.0, 10)], DELTA)
    assert accountant == "exact Gaussian"
    # 40 and 10 releases are one of the summed squared signal.
    assert ours == pytest.approx(
        peer(pld, [(1 / math.sqrt(40 / 8.8**2 + 10 / 400), 1.0, 1)]), abs=1e-3
    )


def test_renyi_divergences_are_googles(dp_accounting):
    """At integer orders: at others Google reports an upper bound, and the integral below is the
    judge.
    """
    from dp_accounting.rdp import rdp_privacy_accountant as theirs

    whole = [order for order in accounting.ORDERS if order == int(order)]
    accountant = theirs.RdpAccountant(whole)
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.53))
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, 60))
    ours = rdp([Event(1.53, 0.1, 60)])[[accounting.ORDERS.index(order) for order in whole]]
    assert len(whole) > 60
    assert np.allclose(ours, accountant._rdp, rtol=1e-6)


@pytest.mark.parametrize(("noise", "rate"), [(1.53, 0.1), (0.8, 0.05), (3.0, 0.5)])
def test_renyi_divergences_are_the_integrals_that_define_them(noise, rate):
    x = np.linspace(-50, 100, 300_001)
    base = (
        -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + math.log(x[1] - x[0])
    )
    loss = np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2)))
    ours = rdp([Event(noise, rate, 1)])
    for order in (1.1, 1.5, 2.5, 4, 6.1, 10.9, 12):
        terms = base + order * loss
        exact = (terms.max() + math.log(np.exp(terms - terms.max()).sum())) / (order - 1)
        assert ours[accounting.ORDERS.index(order)] == pytest.approx(exact, rel=1e-6)


def test_where_numerical_composition_fails_the_renyi_bound_stands(monkeypatch, pld):
    def fails(*_, **__):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.")

    accounting._composed.cache_clear()
    monkeypatch.setattr(accounting, "_numerical", fails)
    value, accountant = cost([single(1.53, 0.1, 60)], DELTA)
    accounting._composed.cache_clear()
    assert accountant == "Renyi (Opacus)"
    assert value == pytest.approx(2.995, abs=2e-3)
    assert value > peer(pld, [(1.53, 0.1, 60)])


def test_noise_that_protects_nothing_has_a_huge_epsilon_not_an_error():
    assert epsilon(0.05, 0.5, 1000, DELTA) > 1e4


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(1.0, 0.1, 100), (2.0, 0.1, 30), (6.0, 0.1, 4), (3.0, 1, 40), (0.2, 0.01, 10)],
)
def test_solved_noise_keeps_the_target_and_no_less_noise_would(target, rate, steps):
    noise = noise_multiplier(target, rate, steps, DELTA)
    assert epsilon(noise, rate, steps, DELTA) <= target
    assert epsilon(noise * (1 - 1e-3), rate, steps, DELTA) > target


def test_a_target_that_nothing_reaches_is_refused():
    with pytest.raises(InputError):
        noise_multiplier(1e-9, 1.0, 10**6, 1e-12)
    with pytest.raises(InputError):
        noise_multiplier(-1.0, 0.1, 10, DELTA)


def test_epsilon_falls_with_noise_and_delta_and_rises_with_rate_and_steps():
    def falling(values):
        return all(left > right for left, right in itertools.pairwise(values))

    assert falling([epsilon(noise, 0.1, 60, DELTA) for noise in (1.5, 1.52, 3.0)])
    assert falling([epsilon(1.5, 0.1, 60, delta) for delta in (1e-8, 1e-5, 1e-4)])
    assert falling([epsilon(1.5, rate, 60, DELTA) for rate in (1, 0.11, 0.1, 0.01)])
    assert falling([epsilon(1.5, 0.1, steps, DELTA) for steps in (61, 60, 10, 1)])


def test_a_rate_is_never_rounded_down():
    assert Fraction(accounting.upward(Fraction(1, 3))) >= Fraction(1, 3)
    assert Fraction(accounting.upward(Fraction(1, 10))) >= Fraction(1, 10)
    assert accounting.upward(Fraction(1)) == 1.0


def test_what_the_gaussian_analysis_leaves_out_is_paid_for():
    plain = cost([single(1.5, 0.1, 60)], DELTA)[0]
    event = (Event(1.5, 0.1, 60),)
    assert cost([Spend(event, delta=DELTA / 2)], DELTA)[0] == pytest.approx(
        cost([single(1.5, 0.1, 60)], DELTA / 2)[0], abs=1e-4
    )
    assert cost([Spend(event, divergence=0.1)], DELTA)[0] > plain + 0.2
    assert cost([Spend(event, delta=DELTA)], DELTA)[0] == math.inf
    assert cost([Spend(event, distance=DELTA)], DELTA)[0] == math.inf
    assert cost([], DELTA)[0] == 0


def test_a_customers_cost_counts_twice_for_its_record_and_units_do_not_mix():
    customer = Spend((Event(4.0, 1.0, 10),), "customer")
    assert customer.of_record() == single(2.0, 1.0, 10)
    assert single(2.0, 1.0, 10).of_record() == single(2.0, 1.0, 10)
    with pytest.raises(InputError):
        cost([customer, single(2.0, 1.0, 10)], DELTA)


def test_spends_survive_their_canonical_form_and_nothing_else_is_read():
    spend = Spend((Event(1.5, 0.1, 60), Event(2.0, 1.0, 3)), "customer", 1e-9, 1e-20, 1e-25)
    value = canonical.decode(canonical.encode(spend.to_dict()))
    assert Spend.from_dict(value) == spend
    for key, wrong in [
        ("events", [[1.5, 0.1]]),
        ("events", [[-1.0, 0.1, 2]]),
        ("unit", "file"),
        ("delta", -1.0),
        ("distance", None),
    ]:
        with pytest.raises(ProtocolError):
            Spend.from_dict({**value, key: wrong})
    with pytest.raises(ProtocolError):
        Spend.from_dict({**value, "more": 1})


def test_a_guarantee_is_json_even_if_it_guarantees_nothing():
    value = Guarantee(
        math.inf, DELTA, "record", "the server", "example-local", "none", ("one",)
    ).to_dict()
    assert json.loads(json.dumps(value, allow_nan=False))["epsilon"] is None


@pytest.mark.parametrize(
    "wrong", [(0.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, 0), (math.nan, 0.1, 1)]
)
def test_events_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError):
        Event(*wrong)


def test_a_budget_is_finite():
    for wrong in ((math.inf, DELTA), (0.0, DELTA), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(InputError):
            Budget(*wrong)


def test_what_an_enclave_draws_with_needs_neither_torch_nor_opacus_nor_scipy():
    code = """
import sys
from fractions import Fraction
import numpy as np
import fedark.privacy.ledger
from fedark.privacy.mechanisms import Mechanism
from fedark.privacy.sampling import poisson_sample
from fedark.secagg.terms import Layout
made = Mechanism.example_local(
    Layout("x", 9, 16, 8.0, 8.0), record_norm=1.0, noise_multiplier=1.0, rate=Fraction(1, 10),
    steps=3, delta=1e-5
)
made.noise()(0, np.empty(9, np.int32))
poisson_sample(10, made.rate)
sys.exit(", ".join({"torch", "opacus", "scipy"} & sys.modules.keys()) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
