"""What a masked session is bound to: the roster, the thresholds, and the layout of every vector
that is summed.

All of it comes from the signed contract and none of it from the server: the digest of a
`SessionTerms` is part of every session identifier, so a client whose server speaks of another
threshold, width or roster derives other keys and nothing opens.

A `Layout` proves at construction that no sum can overflow, for any cohort up to the whole roster: a
client's field is an integer in [0, 2 (M + K)], with M = 2**(bits - 1) - 1 the largest rounded value
and K the noise bound, so the sum of n of them is at most 2 n (M + K) < 2**width; fields of one word
do not carry into each other, and the topmost stays below 2**64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from fedark.foundation import canonical
from fedark.foundation.errors import ContractError

__all__ = ["MAX_COHORT", "Layout", "Lane", "SessionTerms"]

MAX_COHORT = 2048
_MAX_LENGTH = 1 << 32
_MAX_SUM = 1 << 63
# With at most 24 bits a field then stays below 2**31, the width of the integers that it is made in.
_MAX_NOISE = 1 << 29


@dataclass(frozen=True)
class Lane:
    """A number that travels beside the vector, inside the masked sum: a count, a loss, a number of
    correct answers.

    Attributes:
        name: its key in `Contribution.metrics` and `RoundSum.metrics`.
        limit: a client's value lies in [-limit, limit]; anything else is refused before it is
            uploaded.
        resolution: the value is rounded to a multiple of this; 1 for a count.
    """

    name: str
    limit: float
    resolution: float = 1.0

    @property
    def bound(self) -> int:
        """Largest magnitude of the rounded integer."""
        return round(self.limit / self.resolution)


@dataclass(frozen=True)
class Layout:
    """One kind of masked vector.

    Attributes:
        name: such as "minilm/update" or "minilm/evaluate".
        length: number of values d; 0 for metrics alone.
        bits: width b of one rounded value, 2 to 24; the grid has 2**b - 1 points.
        clip_norm: L2 norm C that a client's vector is clipped to.
        value_range: values are clamped to [-B, B]; B = C never clamps, a smaller B gives a finer
            grid.
        max_weight: a client's weight is an integer in 1..max_weight; its vector is scaled by weight
            / max_weight, so that the sum carries weight * vector.
        metrics: numbers that are summed beside it, exactly.
        noise_bound: largest magnitude K, in grid steps, of the integer noise that a privacy
            mechanism adds; 0: none is.
    """

    name: str
    length: int
    bits: int = 16
    clip_norm: float = 1.0
    value_range: float = 1.0
    max_weight: int = 1
    metrics: tuple[Lane, ...] = ()
    noise_bound: int = 0

    @property
    def magnitude(self) -> int:
        """M: the largest magnitude of a rounded value."""
        return (1 << (self.bits - 1)) - 1

    @property
    def offset(self) -> int:
        """M + K, added to make every field non-negative."""
        return self.magnitude + self.noise_bound

    @property
    def step(self) -> float:
        """The width of the grid, in units of the vector (at full weight)."""
        return self.value_range / self.magnitude

    def width(self, cohort: int) -> int:
        """Bits of a field that holds any sum of `cohort` clients."""
        return (2 * self.offset * cohort).bit_length()

    def per_word(self, cohort: int) -> int:
        """Fields that share one 64-bit word."""
        return 64 // self.width(cohort)

    def vector_words(self, cohort: int) -> int:
        """Words of the packed vector, without the lanes."""
        return -(-self.length // self.per_word(cohort))

    @property
    def lanes(self) -> int:
        """Words of their own: the weight and one for each metric."""
        return 1 + len(self.metrics)

    def words(self, cohort: int) -> int:
        """64-bit words of one masked vector."""
        return self.vector_words(cohort) + self.lanes

    @property
    def integer_norm(self) -> float:
        """Largest L2 norm of the rounded vector, in grid steps: the sensitivity that a noise
        mechanism is calibrated to.

        Rounding inflates the norm; a rounding that exceeds this is drawn again (Kairouz, Liu,
        Steinke, "The Distributed Discrete Gaussian Mechanism", 2021, equation 2 with beta =
        exp(-1/2)).
        """
        norm, size = self.clip_norm / self.step, self.length
        return math.sqrt(
            min((norm + math.sqrt(size)) ** 2, norm**2 + size / 4 + norm + math.sqrt(size) / 2)
        )

    def problems(self, cohort: int) -> list[str]:
        """Everything that is wrong with it for up to `cohort` clients."""
        where = f"layout {self.name!r}"
        found = []
        if not 0 <= self.length <= _MAX_LENGTH:
            found.append(f"{where}: length is not in 0..2^32")
        if not 2 <= self.bits <= 24:
            found.append(f"{where}: bits is not in 2..24")
        if not (math.isfinite(self.clip_norm) and 2.0**-100 <= self.value_range <= self.clip_norm):
            found.append(f"{where}: 2^-100 <= value_range <= clip_norm does not hold")
        if not 0 <= self.noise_bound <= _MAX_NOISE:
            found.append(f"{where}: noise_bound is not in 0..2^29")
        if not 1 <= self.max_weight < _MAX_SUM // cohort:
            found.append(f"{where}: max_weight is not in 1..2^63/{cohort}")
        if len({m.name for m in self.metrics}) != len(self.metrics):
            found.append(f"{where}: two metrics share one name")
        for metric in self.metrics:
            if not (
                math.isfinite(metric.limit)
                and math.isfinite(metric.resolution)
                and metric.limit > 0 < metric.resolution
            ):
                found.append(
                    f"{where}: metric {metric.name!r} has no positive limit and resolution"
                )
            elif metric.limit / metric.resolution * 2 * cohort >= _MAX_SUM:
                found.append(f"{where}: the sum of metric {metric.name!r} can overflow 63 bits")
        if not found and self.width(cohort) > 64:
            found.append(f"{where}: a sum of {cohort} clients does not fit into 64 bits")
        return found


@dataclass(frozen=True)
class SessionTerms:
    """The terms of one masked session.

    Attributes:
        contract_digest: SHA-384 of the signed contract, 48 bytes.
        run_id: the run under that contract.
        roster: every customer of the contract, sorted: nobody else can ever take part.
        minimum: fewest clients that a member takes for the survivors of a round. With agreement no
            sum covers fewer; without it a lying server may get one of
            `fedark.secagg.topology.smallest_sum`.
        colluders: how many clients may work with the server without learning more than the sum of
            the others.
        layouts: every kind of vector that may be summed.
        agreement: ask for a signed agreement on the survivors (a third trip) in every round; the
            topology may ask for it anyway.
        rounds: the last admissible round number.
    """

    contract_digest: bytes
    run_id: str
    roster: tuple[str, ...]
    minimum: int
    colluders: int
    layouts: tuple[Layout, ...]
    agreement: bool = True
    rounds: int = 10_000

    def __post_init__(self) -> None:
        size = len(self.roster)
        found = []
        if list(self.roster) != sorted(set(self.roster)):
            found.append("the roster is not sorted and free of duplicates")
        if not 3 <= size <= MAX_COHORT:
            found.append(
                f"a masked session has 3 to {MAX_COHORT} customers, not {size}: below, the sum"
                " itself tells too much"
            )
        if len(self.contract_digest) != 48:
            found.append("the contract digest has not 48 bytes")
        if not 3 <= self.minimum <= size:
            found.append(
                f"the minimum cohort {self.minimum} is not in 3..{size}: a sum of fewer tells too"
                " much"
            )
        if self.colluders < 0 or self.minimum - self.colluders < 2:
            found.append(
                "a sum must cover at least two clients that do not collude: minimum - colluders"
                " >= 2"
            )
        if not self.layouts or len({layout.name for layout in self.layouts}) != len(self.layouts):
            found.append("the layouts are missing or share one name")
        if not 1 <= self.rounds < 1 << 32:
            found.append("rounds is not in 1..2^32")
        for layout in self.layouts:
            found += layout.problems(max(size, 1))
        if found:
            raise ContractError("secure aggregation policy", found)

    @cached_property
    def by_name(self) -> Mapping[str, Layout]:
        """The layouts by name."""
        return {layout.name: layout for layout in self.layouts}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(canonical.encode(["fedark/secagg/2/policy", asdict(self)])).digest()
