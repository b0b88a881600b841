"""The compiled filter decides exactly as the policy says: a small machine runs it against the
policy's own meaning.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedark.sandbox.bpf import ALLOW, KILL, Arg, SyscallPolicy, SyscallRule, compile_policy, errno
from fedark.sandbox.syscalls import AUDIT_ARCH, NUMBERS

ALL = (1 << 64) - 1


def run(
    program: bytes, number: int, arguments: tuple[int, ...], architecture: int = AUDIT_ARCH
) -> int:
    """Classic BPF as the kernel runs it (linux/filter.h), for the instructions that seccomp admits
    here.
    """
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments)
    register, place, steps = 0, 0, 0
    while True:
        code, jump_true, jump_false, operand = struct.unpack_from("<HBBI", program, 8 * place)
        place, steps = place + 1, steps + 1
        assert steps < 5000
        match code:
            case 0x20:
                assert operand % 4 == 0
                (register,) = struct.unpack_from("<I", data, operand)
            case 0x54:
                register &= operand
            case 0x15:
                place += jump_true if register == operand else jump_false
            case 0x35:
                place += jump_true if register >= operand else jump_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(f"instruction {code:#x}")


def meaning(policy: SyscallPolicy, number: int, arguments: tuple[int, ...]) -> int:
    """What the policy says, without any compiling."""
    for rule in policy.rules:
        if number in {NUMBERS[name] for name in rule.calls} and all(
            arguments[arg.index] & arg.mask == arg.value for arg in rule.when
        ):
            return rule.verdict
    return policy.default


names = st.sampled_from(["read", "write", "openat", "clone", "clone3", "mmap", "ioctl"])
verdicts = st.sampled_from([ALLOW, errno(1), errno(38), KILL])
values = st.one_of(
    st.integers(0, 3), st.sampled_from([1 << 31, 1 << 32, (1 << 32) + 1, ALL]), st.integers(0, ALL)
)


@st.composite
def conditions(draw: st.DrawFn) -> Arg:
    mask = draw(st.one_of(st.just(ALL), values.filter(bool)))
    return Arg(draw(st.integers(0, 5)), draw(values) & mask, mask)


rules = st.builds(
    SyscallRule,
    verdicts,
    st.lists(names, min_size=1, max_size=4).map(tuple),
    st.lists(conditions(), max_size=6).map(tuple),
)
policies = st.builds(
    SyscallPolicy, st.just("any"), verdicts, st.lists(rules, max_size=12).map(tuple)
)


@given(
    policies,
    st.one_of(names.map(NUMBERS.__getitem__), st.integers(0, 500)),
    st.tuples(*[values] * 6),
)
@example(
    SyscallPolicy("any", ALLOW, (SyscallRule(errno(1), ("read",), (Arg(0, 1 << 32, ALL),)),)),
    0,
    (0, 0, 0, 0, 0, 0),
)
def test_a_compiled_policy_decides_as_it_says(
    policy: SyscallPolicy, number: int, arguments: tuple[int, ...]
) -> None:
    assert run(compile_policy(policy), number, arguments) == meaning(policy, number, arguments)


@given(policies, st.integers(0, ALL >> 32), st.tuples(*[values] * 6))
def test_another_architectures_call_is_killed_whatever_its_number(
    policy: SyscallPolicy, number: int, arguments: tuple[int, ...]
) -> None:
    for foreign in (0x4000_0003, 0xC000_00B7, AUDIT_ARCH ^ 1):
        assert run(compile_policy(policy), number, arguments, foreign) == KILL


@given(policies, st.integers(0x4000_0000, 0xFFFF_FFFF), st.tuples(*[values] * 6))
def test_an_x32_call_is_killed_even_where_its_twin_is_allowed(
    policy: SyscallPolicy, number: int, arguments: tuple[int, ...]
) -> None:
    assert run(compile_policy(policy), number, arguments) == KILL


def test_both_halves_of_an_argument_are_compared() -> None:
    program = compile_policy(
        SyscallPolicy("halves", errno(1), (SyscallRule(ALLOW, ("read",), (Arg(1, 7),)),))
    )
    assert run(program, 0, (0, 7, 0, 0, 0, 0)) == ALLOW
    assert run(program, 0, (0, 7 | 1 << 32, 0, 0, 0, 0)) == errno(1)
    assert run(program, 0, (7, 0, 0, 0, 0, 0)) == errno(1)


def test_the_first_rule_that_matches_decides() -> None:
    program = compile_policy(
        SyscallPolicy(
            "order",
            KILL,
            (SyscallRule(errno(2), ("read",), (Arg(0, 1),)), SyscallRule(ALLOW, ("read",))),
        )
    )
    assert run(program, 0, (1, 0, 0, 0, 0, 0)) == errno(2)
    assert run(program, 0, (2, 0, 0, 0, 0, 0)) == ALLOW
    assert run(program, 1, (1, 0, 0, 0, 0, 0)) == KILL


def test_a_condition_that_can_never_hold_and_an_unknown_call_are_refused() -> None:
    with pytest.raises(ValueError, match="never hold"):
        Arg(0, 2, mask=1)
    with pytest.raises(ValueError, match="out of range"):
        Arg(6, 0)
    with pytest.raises(KeyError):
        compile_policy(SyscallPolicy("typo", ALLOW, (SyscallRule(KILL, ("exceve",)),)))


def test_a_policy_over_the_kernels_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        compile_policy(SyscallPolicy("long", ALLOW, (SyscallRule(ALLOW, tuple(NUMBERS) * 20),)))


@given(policies, policies)
def test_two_policies_have_one_digest_only_if_they_are_equal(
    one: SyscallPolicy, other: SyscallPolicy
) -> None:
    assert (one.digest() == other.digest()) == (one == other)


def test_what_differs_between_processes_is_not_in_the_digest() -> None:
    def policy(pid: int) -> SyscallPolicy:
        return SyscallPolicy(
            "own",
            KILL,
            (
                SyscallRule(
                    ALLOW, ("tgkill",), (Arg(0, pid, 0xFFFF_FFFF, symbol="own process id"),)
                ),
            ),
        )

    assert policy(1).digest() == policy(77).digest()
    assert run(compile_policy(policy(77)), NUMBERS["tgkill"], (77, 0, 0, 0, 0, 0)) == ALLOW
    assert run(compile_policy(policy(77)), NUMBERS["tgkill"], (1, 0, 0, 0, 0, 0)) == KILL
