"""The masked sum is the plain sum, for any cohort, width, drop and return, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import InputError, ProtocolError, Refused
from fedark.secagg import Contribution, Lane
from fedark.secagg import server as server_module

EXAMPLES = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def on_grid(lab_, seed):
    """Values that rounding leaves alone, and their integers."""
    top = min(lab_.layout.magnitude, 3000)
    integers = np.random.default_rng(seed).integers(-top, top + 1, lab_.length)
    return (integers * lab_.layout.step).astype(np.float32), integers


def grid(bits):
    """A value range whose step is a power of two, so that every grid point is a float32."""
    return ((1 << (bits - 1)) - 1) * 2.0**-12


@EXAMPLES
@given(data=st.data())
def test_the_survivors_sum_is_exact_or_there_is_none_when_clients_drop_at_any_stage_and_return(
    lab, data
):
    bits = data.draw(st.integers(2, 24), "bits")
    session = lab(
        size=data.draw(st.integers(3, 8), "n"),
        length=data.draw(st.integers(0, 70), "d"),
        bits=bits,
        value_range=grid(bits),
        agreement=data.draw(st.booleans(), "agreement"),
        metrics=(Lane("examples", 10_000),),
        threads=data.draw(st.sampled_from([1, 2]), "threads"),
    )
    anyone = st.sets(st.sampled_from(session.parties), max_size=3)
    for number in range(data.draw(st.integers(1, 3), "rounds")):
        absent, lost, silent = (data.draw(anyone, what) for what in ("absent", "lost", "silent"))
        present = [p for p in session.parties if p not in absent]
        if len(present) < session.terms.minimum:
            continue
        values = {p: on_grid(session, 100 * number + i) for i, p in enumerate(present)}
        contributions = {
            p: Contribution(v[0], metrics={"examples": 10 + i})
            for i, (p, v) in enumerate(values.items())
        }
        survivors = [p for p in present if p not in lost]
        answering = set(session.parties) - silent - absent
        enough = (
            len(survivors) >= session.terms.minimum
            and len(answering) >= session.directory.topology.threshold
        )
        if not enough:
            with pytest.raises((Refused, ProtocolError)):
                session.run(contributions, lost, silent | absent)
            continue
        result = session.run(contributions, lost, silent | absent)
        assert result.survivors == tuple(survivors)
        assert (result.integers() == sum(values[p][1] for p in survivors)).all()
        assert result.weight == len(survivors)
        assert result.metrics == {"examples": sum(10 + present.index(p) for p in survivors)}


def test_a_client_that_drops_returns_in_a_later_round(lab):
    session = lab(size=5, minimum=3)
    everybody, without = session.parties, session.parties[1:]
    assert session.run(session.inputs(everybody), lost=["c0000"]).survivors == tuple(without)
    assert session.run(session.inputs(without), silent=["c0000"]).survivors == tuple(without)
    assert session.run(session.inputs(everybody)).survivors == tuple(everybody)


def test_weights_make_a_weighted_mean_and_are_seen_as_a_sum_only(lab):
    session = lab(size=4, max_weight=1000, length=500, value_range=2.0)
    weights = [1000, 500, 250, 3]
    inputs = {
        p: Contribution(session.vector(i), weight=weights[i]) for i, p in enumerate(session.parties)
    }
    result = session.run(inputs)
    expected = sum(w * session.vector(i) for i, w in enumerate(weights)) / sum(weights)
    assert result.weight == sum(weights)
    assert np.abs(result.mean() - expected).max() < 4 * session.layout.step * 1000 / sum(weights)


def test_metrics_travel_in_the_masked_sum_without_a_vector(lab):
    session = lab(size=4)
    current = session.open(layout="m/evaluate")
    nothing = np.empty(0, np.float32)
    inputs = {
        p: Contribution(nothing, metrics={"correct": 10 * i, "loss": 1.5 - i})
        for i, p in enumerate(session.parties)
    }
    session.upload(current, inputs)
    assert session.unmask(current).metrics == {"correct": 60.0, "loss": 0.0}


def test_a_vector_is_clipped_to_the_norm_before_it_is_summed(lab):
    session = lab(size=3, length=100, clip_norm=1.0, value_range=1.0)
    inputs = {p: Contribution(np.full(100, 5.0, np.float32)) for p in session.parties}
    assert np.linalg.norm(session.run(inputs).mean()) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("minimum", "ring"), [(72, True), (60, False)])
def test_a_large_cohort_sums_over_a_sparse_graph_with_an_agreed_survivor_set(lab, minimum, ring):
    session = lab(
        size=90 if ring else 120, length=30, value_range=grid(16), minimum=minimum, colluders=3
    )
    topology = session.directory.topology
    assert not topology.complete
    assert (topology.degree_floor == 0) == ring
    assert topology.agreement
    values = {p: on_grid(session, i) for i, p in enumerate(session.parties)}
    lost = session.parties[5:80:20]
    result = session.run(
        {p: Contribution(v[0]) for p, v in values.items()}, lost=lost, silent=session.parties[3::30]
    )
    assert (result.integers() == sum(values[p][1] for p in session.parties if p not in lost)).all()


@pytest.mark.parametrize("pending", [0, 4000, 1 << 28])
@pytest.mark.parametrize("streams", [0, 512])
def test_uploads_are_summed_in_any_number_of_batches(lab, monkeypatch, pending, streams):
    monkeypatch.setattr(server_module, "_PENDING_BYTES", pending)
    monkeypatch.setattr(server_module, "MOST_STREAMS", streams)
    session = lab(size=7, minimum=4, length=300, value_range=grid(16))
    values = {p: on_grid(session, i) for i, p in enumerate(session.parties)}
    result = session.run(
        {p: Contribution(v[0]) for p, v in values.items()}, lost=session.parties[2:4]
    )
    assert (
        result.integers()
        == sum(values[p][1] for p in session.parties if p not in session.parties[2:4])
    ).all()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_clients_sum_with_a_tenth_of_them_gone(lab):
    session = lab(size=1000, length=2000, minimum=850, colluders=20, value_range=grid(16))
    values = {p: on_grid(session, i) for i, p in enumerate(session.parties)}
    lost = session.parties[::10]
    result = session.run({p: Contribution(v[0]) for p, v in values.items()}, lost=lost, silent=lost)
    assert (result.integers() == sum(values[p][1] for p in session.parties if p not in lost)).all()


BAD = {
    "not a number": lambda v: np.where(np.arange(v.size) == 3, np.nan, v),
    "infinite": lambda v: np.where(np.arange(v.size) == 3, np.inf, v),
    "too long": lambda v: np.append(v, np.float32(0)),
    "too short": lambda v: v[:-1],
    "double precision": lambda v: v.astype(np.float64),
    "integers": lambda v: v.astype(np.int32),
    "a matrix": lambda v: v.reshape(2, -1),
    "not contiguous": lambda v: np.repeat(v, 2)[::2],
}


@pytest.mark.parametrize("kind", BAD)
def test_a_vector_that_is_not_what_the_layout_says_is_refused_before_the_round_is_spent(lab, kind):
    session = lab(size=3)
    session.open()
    good = session.vector(1)
    bad = BAD[kind](good)
    client = session.clients["c0000"]
    with pytest.raises(InputError, match="m/update"):
        client.upload(
            Contribution(
                bad
                if kind in ("double precision", "integers")
                else bad.astype(np.float32, copy=False)
            )
        )
    client.upload(Contribution(good))


@pytest.mark.parametrize("weight", [0, -1, 11, 2.0, True])
def test_a_weight_out_of_range_is_refused(lab, weight):
    session = lab(size=3, max_weight=10)
    session.open()
    with pytest.raises(InputError, match="weight"):
        session.clients["c0000"].upload(Contribution(session.vector(1), weight=weight))


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"loss": 11.0},
        {"loss": 1.0, "extra": 1.0},
    ],
)
def test_metrics_that_are_not_finite_not_in_range_or_not_expected_are_refused(lab, metrics):
    session = lab(size=3, metrics=(Lane("loss", 10.0, 0.5),))
    session.open()
    with pytest.raises(InputError, match=r"[Ll]ane"):
        session.clients["c0000"].upload(Contribution(session.vector(1), metrics=metrics))
