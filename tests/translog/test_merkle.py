"""The tree and its proofs, against the published reference tree and against the RFC's definitions
written down anew.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedark.foundation.errors import LogRefused
from fedark.translog.merkle import EMPTY_ROOT, Tree, leaf_hash, verify_consistency, verify_inclusion

# The reference tree of Certificate Transparency (RFC 6962): eight entries, the root at every size,
# and proofs.
ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
}
CONSISTENCY = {
    (1, 8): INCLUSION[0, 8],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def tree_of(entries: list[bytes]) -> Tree:
    tree = Tree()
    for data in entries:
        tree.append(leaf_hash(data))
    return tree


# -- RFC 9162, 2.1.1, 2.1.3.1 and 2.1.4.1 as they are written, over slices of the entries


def split(size: int) -> int:
    k = 1
    while 2 * k < size:
        k *= 2
    return k


def mth(d: list[bytes]) -> bytes:
    if len(d) < 2:
        return hashlib.sha256(b"\x00" + d[0] if d else b"").digest()
    k = split(len(d))
    return hashlib.sha256(b"\x01" + mth(d[:k]) + mth(d[k:])).digest()


def path(m: int, d: list[bytes]) -> list[bytes]:
    if len(d) == 1:
        return []
    k = split(len(d))
    return [*path(m, d[:k]), mth(d[k:])] if m < k else [*path(m - k, d[k:]), mth(d[:k])]


def subproof(m: int, d: list[bytes], whole: bool) -> list[bytes]:
    if m == len(d):
        return [] if whole else [mth(d)]
    k = split(len(d))
    if m <= k:
        return [*subproof(m, d[:k], whole), mth(d[k:])]
    return [*subproof(m - k, d[k:], False), mth(d[:k])]


# -- vectors


@pytest.mark.parametrize("size", range(9))
def test_roots_are_those_of_the_reference_tree(size: int) -> None:
    assert tree_of(ENTRIES[:size]).root().hex() == ROOTS[size]
    assert tree_of(ENTRIES).root(size).hex() == ROOTS[size]
    assert mth(ENTRIES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size"), INCLUSION)
def test_inclusion_proofs_are_those_of_the_reference_tree(index: int, size: int) -> None:
    proof = tree_of(ENTRIES).inclusion(index, size)
    assert [node.hex() for node in proof] == INCLUSION[index, size]
    verify_inclusion(leaf_hash(ENTRIES[index]), index, size, proof, bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("first", "second"), CONSISTENCY)
def test_consistency_proofs_are_those_of_the_reference_tree(first: int, second: int) -> None:
    proof = tree_of(ENTRIES).consistency(first, second)
    assert [node.hex() for node in proof] == CONSISTENCY[first, second]
    verify_consistency(
        first, bytes.fromhex(ROOTS[first]), second, bytes.fromhex(ROOTS[second]), proof
    )


# -- properties


@settings(max_examples=60)
@given(data=st.data(), size=st.integers(1, 300))
def test_roots_and_proofs_of_any_size_are_the_rfcs_and_verify(
    data: st.DataObject, size: int
) -> None:
    entries = [number.to_bytes(2, "big") for number in range(size)]
    tree = tree_of(entries)
    part = data.draw(st.integers(1, size))
    index = data.draw(st.integers(0, part - 1))
    first = data.draw(st.integers(1, part))
    root = tree.root(part)
    assert root == mth(entries[:part])
    proof = tree.inclusion(index, part)
    assert list(proof) == path(index, entries[:part])
    verify_inclusion(leaf_hash(entries[index]), index, part, proof, root)
    steps = tree.consistency(first, part)
    assert list(steps) == subproof(first, entries[:part], True)
    verify_consistency(first, tree.root(first), part, root, steps)


@pytest.mark.parametrize("size", range(1, 34))
def test_every_entry_and_every_pair_of_sizes_has_a_proof_and_none_stands_for_another(
    size: int,
) -> None:
    tree = tree_of([bytes([number]) for number in range(size)])
    for index in range(size):
        proof = tree.inclusion(index, size)
        for claimed in range(size):
            if claimed == index:
                verify_inclusion(tree.leaf(index), index, size, proof, tree.root(size))
                continue
            with pytest.raises(LogRefused):
                verify_inclusion(tree.leaf(index), claimed, size, proof, tree.root(size))
            with pytest.raises(LogRefused):
                verify_inclusion(tree.leaf(claimed), index, size, proof, tree.root(size))
    for first in range(1, size):
        proof = tree.consistency(first, size)
        verify_consistency(first, tree.root(first), size, tree.root(size), proof)
        for other in range(1, size):
            if other != first:
                with pytest.raises(LogRefused):
                    verify_consistency(first, tree.root(other), size, tree.root(size), proof)


@settings(max_examples=150)
@given(data=st.data())
def test_a_proof_with_any_bit_changed_or_any_node_added_or_dropped_proves_nothing(
    data: st.DataObject,
) -> None:
    size = data.draw(st.integers(2, 70))
    tree = tree_of([bytes([number]) for number in range(size)])
    index, first = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size - 1))
    for proof, check in (
        (
            tree.inclusion(index, size),
            lambda p: verify_inclusion(tree.leaf(index), index, size, p, tree.root()),
        ),
        (
            tree.consistency(first, size),
            lambda p: verify_consistency(first, tree.root(first), size, tree.root(), p),
        ),
    ):
        check(proof)
        at = data.draw(st.integers(0, len(proof) - 1))
        node = bytearray(proof[at])
        node[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
        for changed in (
            [*proof[:at], bytes(node), *proof[at + 1 :]],
            [*proof[:at], *proof[at + 1 :]],
            [*proof[:at], bytes(32), *proof[at:]],
            [*proof, proof[-1]],
            [*proof[:at], proof[at][:-1], *proof[at + 1 :]],
            [bytes(32)] * 65,
        ):
            with pytest.raises(LogRefused):
                check(changed)


@settings(max_examples=300)
@given(
    numbers=st.tuples(st.integers(-2, 1 << 70), st.integers(-2, 1 << 70)),
    nodes=st.lists(st.binary(min_size=32, max_size=32) | st.binary(max_size=40), max_size=70),
)
def test_proofs_of_a_stranger_are_refused_and_never_crash_or_hang(
    numbers: tuple[int, int], nodes: list[bytes]
) -> None:
    with pytest.raises(LogRefused):
        verify_inclusion(bytes(32), numbers[0], numbers[1], nodes, b"r" * 32)
    with pytest.raises(LogRefused):
        verify_consistency(numbers[0], b"a" * 32, numbers[1], b"b" * 32, nodes)


def test_an_entry_cannot_pass_for_a_node() -> None:
    tree = tree_of([b"a", b"b"])
    fake = tree.leaf(0) + tree.leaf(1)  # as an entry, its plain hash would be the root's
    with pytest.raises(LogRefused):
        verify_inclusion(leaf_hash(fake), 0, 1, [], tree.root())


def test_every_tree_goes_on_from_the_empty_one_and_from_itself_without_a_proof() -> None:
    tree = tree_of([b"a", b"b", b"c"])
    assert tree.consistency(0, 3) == tree.consistency(3, 3) == ()
    verify_consistency(0, EMPTY_ROOT, 3, tree.root(), [])
    verify_consistency(3, tree.root(), 3, tree.root(), [])
    for first, root in ((0, tree.root()), (3, EMPTY_ROOT), (4, tree.root())):
        with pytest.raises(LogRefused):
            verify_consistency(first, root, 3, tree.root(), [])


@settings(max_examples=50)
@given(sizes=st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_a_tree_that_forgets_its_end_is_the_tree_that_never_had_it(sizes: tuple[int, int]) -> None:
    keep, forget = sizes
    entries = [bytes([number]) for number in range(keep + forget)]
    tree = tree_of(entries)
    tree.truncate(keep)
    assert (len(tree), tree.root()) == (keep, tree_of(entries[:keep]).root())
    tree.append(leaf_hash(b"new"))
    assert tree.root() == mth([*entries[:keep], b"new"])


@pytest.mark.parametrize(
    "ask",
    [("root", 4), ("root", -1), ("inclusion", 3, 3), ("inclusion", 0, 4), ("consistency", 2, 4)],
)
def test_a_proof_for_more_than_there_is_is_not_given(ask: tuple[Any, ...]) -> None:
    tree = tree_of([b"a", b"b", b"c"])
    with pytest.raises(LogRefused):
        getattr(tree, ask[0])(*ask[1:])
