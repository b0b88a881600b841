"""Privacy accounting: what a sequence of Gaussian releases costs, and how much noise a target
needs.

The unit of everything here is an `Event`: `steps` adaptive releases of a Poisson-subsampled
Gaussian mechanism. A `Spend` is a list of events with what the Gaussian analysis leaves out; spends
add up, over rounds, jobs and years, and only a sum of spends is turned into one epsilon: numbers of
different jobs are never added.

Every epsilon is an upper bound for add/remove adjacency: the numerical composition of privacy
random variables (Gopi, Lee, Wutschitz, 2021) by Opacus, in both directions, error term included;
the exact curve where nothing is subsampled (Balle, Wang, 2018); and Renyi composition with the
conversion of Balle et al. (2020), theorem 21, where it is tighter or the first fails. Opacus brings
torch with it, so it is imported at first use.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedark.foundation.errors import InputError, ProtocolError
from fedark.privacy.kinds import Unit

__all__ = [
    "Budget",
    "Event",
    "Guarantee",
    "Spend",
    "Unit",
    "View",
    "cost",
    "epsilon",
    "noise_multiplier",
    "rdp",
    "reachable",
]

View = Literal["adapter", "colluders"]

ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *range(11, 65),
    *(72, 80, 96, 112, 128, 160, 192, 256, 384, 512),
)
"""Renyi orders that are tried."""

# Of epsilon, in the numerical composition; doubled while the grid would have more points than this:
_ERROR = 1e-3
_MAX_GRID = 1 << 22
_TOLERANCE = 2e-4  # of a solved noise multiplier, relative
_LEAST_NOISE, _MOST_NOISE = 0.02, 1e6
_TOO_MUCH = 50.0  # epsilon beyond which the Renyi bound is good enough: the grid would be huge
_COMPOSING = threading.Lock()
_MARGIN = 1e-6  # share of delta that the total variation distance of a sampler may use up


@dataclass(frozen=True, order=True)
class Event:
    """Adaptive releases of a clipped sum over a fresh Poisson sample, each with Gaussian noise of
    its own.

    Attributes:
        noise_multiplier: standard deviation of the noise over the L2 sensitivity.
        rate: probability that one record is in one sample; 1 if nothing is sampled.
        steps: number of releases.
    """

    noise_multiplier: float
    rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 < self.noise_multiplier < math.inf and 0 < self.rate <= 1 and self.steps >= 1):
            raise InputError(
                "A release needs noise above 0, a sampling rate in (0, 1] and at least one step."
            )


@dataclass(frozen=True)
class Budget:
    """The most that may ever be spent of one record (or, for a customer-level job, of the
    customer).

    Attributes:
        epsilon: of all jobs together.
        delta: at which that epsilon is computed.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise InputError(
                "A privacy budget needs a positive, finite epsilon and a delta between 0 and 1."
            )


@dataclass(frozen=True)
class Guarantee:
    """An (epsilon, delta) guarantee and what it rests on.

    Attributes:
        unit: what is protected: adding or removing one record, or one customer's whole
            contribution.
        view: against whom.
        mechanism: what made the noise.
        accountant: which analysis gave epsilon.
        assumptions: without any one of them the numbers mean nothing.
    """

    epsilon: float
    delta: float
    unit: Unit
    view: str
    mechanism: str
    accountant: str
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For a report: JSON types only; an unbounded epsilon is None."""
        bounded = self.epsilon if math.isfinite(self.epsilon) else None
        return {**asdict(self), "epsilon": bounded, "assumptions": list(self.assumptions)}


@dataclass(frozen=True)
class Spend:
    """What a job costs, exactly enough to be composed with any other.

    Attributes:
        events: the Gaussian releases.
        unit: whose presence the sensitivity refers to.
        delta: probability that a release falls outside the Gaussian analysis (an unlucky rounding);
            adds up.
        divergence: bound on |log ratio| between what is released and a post-processed Gaussian;
            adds up.
        distance: bound on the total variation between the noise that is drawn and the noise that is
            analysed; adds up.
    """

    events: tuple[Event, ...]
    unit: Unit = "record"
    delta: float = 0.0
    divergence: float = 0.0
    distance: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit) or not all(
            0 <= part < math.inf for part in (self.delta, self.divergence, self.distance)
        ):
            raise InputError("A privacy spend is malformed.")

    def of_record(self) -> Spend:
        """The same job's cost to one record: a record that comes or goes moves a customer's vector
        at most twice its norm.
        """
        if self.unit == "record":
            return self
        halved = tuple(
            Event(event.noise_multiplier / 2, event.rate, event.steps) for event in self.events
        )
        return Spend(halved, "record", self.delta, self.divergence, self.distance)

    def to_dict(self) -> dict[str, Any]:
        """Canonical CBOR types."""
        events = [
            [float(event.noise_multiplier), float(event.rate), event.steps] for event in self.events
        ]
        parts = {
            "delta": float(self.delta),
            "divergence": float(self.divergence),
            "distance": float(self.distance),
        }
        return {"events": events, "unit": self.unit, **parts}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Spend:
        """The inverse of `to_dict`.

        Raises:
            ProtocolError: `value` is nothing that it gives.
        """
        try:
            events = tuple(Event(*event) for event in value["events"])
            spend = cls(
                events, value["unit"], value["delta"], value["divergence"], value["distance"]
            )
            if spend.to_dict() == value and all(type(event.steps) is int for event in events):
                return spend
        except (InputError, KeyError, TypeError, ValueError):
            pass
        raise ProtocolError("A privacy spend is malformed.")


def cost(spends: Iterable[Spend], delta: float) -> tuple[float, str]:
    """Epsilon of all `spends` together at `delta`, and the accountant that gave it; infinite if
    nothing can be said.

    With divergence k: P(S) <= e^k G(S) <= e^k (e^eps G'(S) + d) <= e^(2k + eps) P'(S) + e^k d. With
    distance v, on either side: v + e^eps v more of delta.
    """
    spends = tuple(spends)
    units = {spend.unit for spend in spends}
    if len(units) > 1:
        raise InputError("Costs to records and costs to customers do not compose.")
    divergence, distance = (
        sum(spend.divergence for spend in spends),
        sum(spend.distance for spend in spends),
    )
    left = (delta - sum(spend.delta for spend in spends)) * math.exp(-divergence) * (1 - _MARGIN)
    events = tuple(event for spend in spends for event in spend.events)
    if not events:
        return 0.0, "nothing released"
    if left <= 0:
        return math.inf, "no accountant: delta is used up"
    with (
        _COMPOSING
    ):  # parties of one process ask for the same job at the same time: it is composed once
        value, accountant = _composed(_merged(events), left)
    value += 2 * divergence
    if value < 700 and (1 + math.exp(value)) * distance <= _MARGIN * delta:
        return value, accountant
    return math.inf, "no accountant: epsilon is beyond what the sampler's precision supports"


def epsilon(
    noise_multiplier: float, sampling_rate: float | Fraction, steps: int, delta: float
) -> float:
    """Epsilon at `delta` of `steps` releases: an upper bound, to within 0.002 where composition is
    numerical.
    """
    return cost([Spend((Event(noise_multiplier, upward(sampling_rate), steps),))], delta)[0]


def noise_multiplier(
    epsilon: float, sampling_rate: float | Fraction, steps: int, delta: float
) -> float:
    """The least noise multiplier, to a relative 0.001, whose `epsilon` is at most the one asked
    for.

    Raises:
        InputError: the target is not positive, or needs more noise than a million times the
            sensitivity.
    """
    Budget(epsilon, delta)
    rate = upward(sampling_rate)

    def renyi(noise: float) -> float:
        return _from_rdp(rdp([Event(noise, rate, steps)]), delta)

    def quick(noise: float) -> float:
        return _quick(Event(noise, rate, steps), delta)

    def bound(noise: float) -> float:
        return cost([Spend((Event(noise, rate, steps),))], delta)[0]

    # The Renyi bound is cheap and never below the truth: a noise that it accepts is enough, and not
    # far from the least.
    high = _LEAST_NOISE
    while renyi(high) > epsilon:
        high *= 1.5
        if high > _MOST_NOISE:
            raise InputError(
                "No noise reaches the target epsilon.",
                fix="Ask for a larger epsilon, a smaller rate or fewer rounds.",
            )
    high = _bisect(renyi, max(high / 1.5, _LEAST_NOISE), high, epsilon)
    low = high
    while low > _LEAST_NOISE and quick(low) <= epsilon:
        high, low = low, low * 0.85
    high = _bisect(quick, low, high, epsilon)
    # What is returned is accepted by the bound itself, never by the estimate that led here.
    while bound(high) > epsilon:
        high *= 1 + _TOLERANCE
    return high


def reachable(epsilon: float, sampling_rate: float | Fraction, steps: int, delta: float) -> bool:
    """Whether any noise that `noise_multiplier` looks at has an epsilon as small as this."""
    events = [Event(_MOST_NOISE, upward(sampling_rate), steps)]
    return _from_rdp(rdp(events), delta) <= epsilon


def _bisect(spent: Callable[[float], float], low: float, high: float, target: float) -> float:
    while high / low > 1 + _TOLERANCE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


def _quick(event: Event, delta: float) -> float:
    """An estimate of the bound from a coarse grid, in a tenth of the time; not a bound itself."""
    if event.rate == 1:
        return _gaussian(math.sqrt(event.steps) / event.noise_multiplier, delta)
    try:
        upper, error = _numerical((event,), delta, added=False, error=16 * _ERROR)
        return upper - error + _ERROR
    except (RuntimeError, ValueError, ArithmeticError):
        return _from_rdp(rdp([event]), delta)


def upward(rate: float | Fraction) -> float:
    """`rate` as a float, never below it."""
    value = float(rate)
    return value if Fraction(value) >= rate else math.nextafter(value, 2.0)


def rdp(events: Sequence[Event]) -> NDArray[np.float64]:
    """The composed Renyi divergences at `ORDERS` (Mironov, Talwar, Zhang, 2019)."""
    total = np.zeros(len(ORDERS))
    for event in events:
        total += event.steps * _rdp_of_one(event.noise_multiplier, event.rate)
    return total


@lru_cache(maxsize=4096)
def _rdp_of_one(noise: float, rate: float) -> NDArray[np.float64]:
    if rate == 1:
        return np.array(ORDERS) / (2 * noise**2)
    from opacus.accountants.analysis.rdp import compute_rdp

    curve = []
    for order in ORDERS:
        try:
            # Opacus ends its series at terms of exp(-30).
            value = float(
                compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=float(order))
            ) * (1 + 1e-7)
        except (ValueError, OverflowError):
            value = math.inf
        curve.append(value if value >= 0 else math.inf)
    return np.array(curve)


def _from_rdp(curve: NDArray[np.float64], delta: float) -> float:
    orders = np.array(ORDERS)
    values = curve + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(np.nanmin(values)))


def _merged(events: Iterable[Event]) -> tuple[Event, ...]:
    """Equal releases counted together, in one order: a smaller problem, and one key for it in the
    cache.
    """
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.rate)
        counts[key] = counts.get(key, 0) + event.steps
    return tuple(sorted(Event(noise, rate, steps) for (noise, rate), steps in counts.items()))


@lru_cache(maxsize=1024)
def _composed(events: tuple[Event, ...], delta: float) -> tuple[float, str]:
    if all(event.rate == 1 for event in events):
        return (
            _gaussian(
                math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in events)), delta
            ),
            "exact Gaussian",
        )
    bounds = [(_from_rdp(rdp(events), delta), "Renyi (Opacus)")]
    with contextlib.suppress(RuntimeError, ValueError, ArithmeticError):  # the Renyi bound stands
        bounds.append(
            (
                max(_numerical(events, delta, added=added)[0] for added in (False, True)),
                "PRV (Opacus)",
            )
        )
    return min(bounds)


def _gaussian(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism with sensitivity / deviation `mu`: Balle, Wang (2018),
    theorem 8.
    """
    from scipy.special import log_ndtr

    def spent(value: float) -> float:
        return math.exp(log_ndtr(mu / 2 - value / mu)) - math.exp(
            value + log_ndtr(-mu / 2 - value / mu)
        )

    low, high = 0.0, 1.0
    if spent(0.0) <= delta:
        return 0.0
    while spent(high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def _numerical(
    events: tuple[Event, ...], delta: float, *, added: bool, error: float = _ERROR
) -> tuple[float, float]:
    """An upper bound on epsilon by composition on a grid, for a record removed or added; and the
    error that is part of it.

    Raises:
        RuntimeError, ValueError, ArithmeticError: the grid does not hold the distribution.
    """
    from opacus.accountants.analysis import prv

    # With no sampling both directions are the Gaussian's, and the other's formula has a pole there.
    losses: list[Any] = [
        (
            _AddedLoss(event)
            if added or event.rate == 1
            else prv.PoissonSubsampledGaussianPRV(event.rate, event.noise_multiplier)
        )
        for event in events
    ]
    steps = [event.steps for event in events]
    delta_error = delta / 1000
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        while True:
            reach = prv.compute_safe_domain_size(losses, steps, error, delta_error)
            mesh = error / math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
            if 2 * reach / mesh <= _MAX_GRID:
                break
            error *= 2
            if error > 0.5:
                raise ValueError("the losses are spread too far for a grid")
        domain = prv.Domain.create_aligned(-reach, reach, mesh)
        discrete = [
            prv.discretize(
                prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain
            )
            for loss in losses
        ]
        upper = prv.compose_heterogeneous(discrete, steps).compute_epsilon(
            delta, delta_error, error
        )[2]
    if not math.isfinite(upper):
        raise ArithmeticError("the composition has no finite epsilon")
    return max(0.0, float(upper)), error


class _AddedLoss:
    """The privacy loss when a record is added: log(Q / P) for x from Q = N(0, s^2) and P = (1 - q)
    Q + q N(1, s^2).

    Opacus has the other direction only. The loss falls with x, and is t at x = s^2 log((e^-t - 1 +
    q) / q) + 1/2.
    """

    def __init__(self, event: Event) -> None:
        self.noise_multiplier, self.sample_rate = event.noise_multiplier, event.rate

    def cdf(self, t: Any) -> Any:
        """P(loss <= t)."""
        from scipy.special import erfc

        q, s = self.sample_rate, self.noise_multiplier
        inside = np.exp(-np.asarray(t, np.float64)) - (1 - q)
        x = s**2 * np.log(np.where(inside > 0, inside, 1.0) / q) + 0.5
        return np.where(inside > 0, erfc(x / (math.sqrt(2) * s)) / 2, 1.0)
