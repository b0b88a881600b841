"""A compiler from a readable seccomp policy to the classic BPF program that the kernel runs
(seccomp(2)).

A policy is an ordered list of rules; the first that matches decides, and the policy's default
decides where none does. Two checks stand before every rule and cannot be left out: a system call of
another architecture (the 32-bit entry of x86) and a call of the x32 ABI kill the process, because
their numbers mean other calls.

A jump in classic BPF reaches 255 instructions forward and a wrong one silently becomes another
verdict. So the compiler makes only jumps that leave the one rule that they belong to, and reloads
the call number behind every rule that used the register. Arguments are 64 bits and BPF's register
is 32: each comparison checks both halves.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from fedark.sandbox.syscalls import AUDIT_ARCH, NUMBERS

__all__ = ["ALLOW", "KILL", "Arg", "SyscallPolicy", "SyscallRule", "compile_policy", "errno"]

KILL = 0x8000_0000
ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_X32_BIT = 0x4000_0000

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6] (little-endian
# halves).
_NR, _ARCH, _ARGS = 0, 4, 16
_LOAD, _AND, _JEQ, _JGE, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_MAX_INSTRUCTIONS = 4096
_ALL_BITS = (1 << 64) - 1


def errno(number: int) -> int:
    """The verdict "the call does nothing and returns this error number"."""
    if not 0 < number < 4096:
        raise ValueError("an error number is between 1 and 4095")
    return _ERRNO | number


@dataclass(frozen=True)
class Arg:
    """A condition on argument `index` (0 to 5): `argument & mask == value`, over 64 bits.

    `symbol` stands for a value that differs from process to process (its own id), so that the
    policy's digest does not.
    """

    index: int
    value: int
    mask: int = _ALL_BITS
    symbol: str = ""

    def __post_init__(self) -> None:
        if (
            not 0 <= self.index <= 5
            or not 0 <= self.value <= _ALL_BITS
            or not 0 < self.mask <= _ALL_BITS
        ):
            raise ValueError("an argument condition is out of range")
        if self.value & ~self.mask:
            raise ValueError("an argument condition can never hold")

    def describe(self) -> list[Any]:
        return [self.index, self.mask, self.symbol or self.value]


@dataclass(frozen=True)
class SyscallRule:
    """Any of `calls`, with all of `when`, gets `verdict`."""

    verdict: int
    calls: tuple[str, ...]
    when: tuple[Arg, ...] = ()


@dataclass(frozen=True)
class SyscallPolicy:
    """Ordered rules and what happens to a call that none of them names."""

    name: str
    default: int
    rules: tuple[SyscallRule, ...]

    def digest(self) -> bytes:
        """SHA-384 of the policy as data (rules, numbers, conditions), 48 bytes: the same on every
        machine.
        """
        text = repr(
            [
                "fedark/seccomp/1",
                self.name,
                AUDIT_ARCH,
                self.default,
                [
                    [
                        rule.verdict,
                        [[c, NUMBERS[c]] for c in rule.calls],
                        [a.describe() for a in rule.when],
                    ]
                    for rule in self.rules
                ],
            ]
        )
        return hashlib.sha384(text.encode("ascii")).digest()


def compile_policy(policy: SyscallPolicy) -> bytes:
    """The program as an array of struct sock_filter, 8 bytes an instruction.

    Raises:
        KeyError: a rule names an unknown system call.
        ValueError: the program is too long for the kernel.
    """
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JEQ, AUDIT_ARCH, skip_true=1),
        _instruction(_RETURN, KILL),
        _instruction(_LOAD, _NR),
        _instruction(_JGE, _X32_BIT, skip_false=1),
        _instruction(_RETURN, KILL),
    ]
    for rule in policy.rules:
        for call in rule.calls:
            program += _rule(NUMBERS[call], rule)
    program.append(_instruction(_RETURN, policy.default))
    if len(program) > _MAX_INSTRUCTIONS:
        raise ValueError(
            f"a filter of {len(program)} instructions is over the kernel's limit of"
            f" {_MAX_INSTRUCTIONS}"
        )
    return b"".join(program)


def _rule(number: int, rule: SyscallRule) -> list[bytes]:
    """Instructions for one call of one rule; entered, and left, with the call number in the
    register.
    """
    if not rule.when:
        return [_instruction(_JEQ, number, skip_false=1), _instruction(_RETURN, rule.verdict)]
    # (load, mask, compare) for each half of each condition; then the verdict; then the reload where
    # a failed compare lands.
    length = 6 * len(rule.when) + 2
    body: list[bytes] = []
    for condition in rule.when:
        offset = _ARGS + 8 * condition.index
        for half, shift in ((offset + 4, 32), (offset, 0)):
            mask, value = (
                (condition.mask >> shift) & 0xFFFF_FFFF,
                (condition.value >> shift) & 0xFFFF_FFFF,
            )
            body += [_instruction(_LOAD, half), _instruction(_AND, mask)]
            body.append(_instruction(_JEQ, value, skip_false=length - 1 - (len(body) + 1)))
    body += [_instruction(_RETURN, rule.verdict), _instruction(_LOAD, _NR)]
    return [_instruction(_JEQ, number, skip_false=len(body)), *body]


def _instruction(code: int, operand: int, *, skip_true: int = 0, skip_false: int = 0) -> bytes:
    if not (0 <= skip_true <= 255 and 0 <= skip_false <= 255):
        raise ValueError("a jump is too far for classic BPF")
    return struct.pack("<HBBI", code, skip_true, skip_false, operand)
