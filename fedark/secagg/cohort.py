"""Sizes and orders that both sides of a round derive alike: which secrets a client shares, and how
long its messages are.
"""

from __future__ import annotations

import numpy as np

from fedark.secagg.directory import Directory
from fedark.secagg.shamir import SHARE_BYTES
from fedark.secagg.terms import Layout

__all__ = ["BLOB_OVERHEAD", "SALT_BYTES", "Cohort", "reply_limit", "request_limit", "upload_limit"]

SALT_BYTES = 16
_TAG_BYTES = 16
BLOB_OVERHEAD = SALT_BYTES + _TAG_BYTES
_HEADER = 2048


class Cohort:
    """The participants of one round, and what follows from them and the session's topology.

    Attributes:
        members: indices in the directory, ascending.
    """

    def __init__(self, directory: Directory, members: list[int]) -> None:
        self.members = members
        self._topology = directory.topology
        self._present = np.zeros(len(directory.parties), np.bool_)
        self._present[members] = True
        self._rank = np.cumsum(self._present) - 1

    def __contains__(self, index: int) -> bool:
        return bool(self._present[index])

    def __len__(self) -> int:
        return len(self.members)

    def slots(self, index: int) -> list[int]:
        """The participants that `index` masks with, ascending: its secrets are b, then one for each
        of them.
        """
        if self._topology.complete:
            return [v for v in self.members if v != index]
        near = self._topology.neighbours(index)
        found: list[int] = near[self._present[near]].tolist()
        return found

    def secrets(self, index: int) -> int:
        """How many secrets `index` shares."""
        if self._topology.complete:
            return 1 + len(self.members) - (index in self)
        return 1 + len(self.slots(index))

    def blob_bytes(self, index: int) -> int:
        """Length of what `index` seals for one member."""
        return BLOB_OVERHEAD + self.secrets(index) * SHARE_BYTES

    def sealed_bytes(self, index: int) -> int:
        """Length of what `index` seals for the whole committee (without itself)."""
        committee = self._topology.committee
        return (len(committee) - (index in committee)) * self.blob_bytes(index)

    def without(self, survivors: list[int]) -> list[int]:
        """The participants that are gone, ascending."""
        kept = set(survivors)
        return [v for v in self.members if v not in kept]

    def released(self, index: int, gone: list[int]) -> list[int]:
        """Positions, among the secrets of survivor `index`, of those that members release: b, and s
        for each one gone.
        """
        if self._topology.complete:
            return [0] + [1 + int(self._rank[v]) - (v > index) for v in gone]
        near, lost = self._topology.neighbours(index), np.zeros_like(self._present)
        lost[gone] = True
        positions: list[int] = (1 + np.flatnonzero(lost[near[self._present[near]]])).tolist()
        return [0, *positions]


def upload_limit(directory: Directory, layout: Layout, cohort: int) -> int:
    """No upload is longer."""
    size, committee = len(directory.parties), len(directory.topology.committee)
    return (
        _HEADER
        + 32 * size
        + committee * (BLOB_OVERHEAD + size * SHARE_BYTES)
        + 8 * layout.words(cohort)
    )


def request_limit(directory: Directory) -> int:
    """No message of a server to a client is longer."""
    size = len(directory.parties)
    return _HEADER + size * (16 + 80 + BLOB_OVERHEAD + size * SHARE_BYTES)


def reply_limit(directory: Directory) -> int:
    """No reply of a member is longer."""
    size = len(directory.parties)
    return _HEADER + size * (8 + size * SHARE_BYTES)
