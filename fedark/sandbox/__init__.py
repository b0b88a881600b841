"""Confine a process so that what runs in it can reach nothing but its channel.

Two modes, the stronger first: "namespaces" (a world of its own, and landlock inside it where the
kernel has it) and "landlock" (for containers that forbid namespaces). Where neither exists the
answer is SandboxUnavailable, never less confinement. The mode and the digests of both policies are
claims in the enclave's evidence, so a contract can demand the stronger one.

What remains, in both modes: a user who may trace any process (root of the host) reads the enclave's
memory, and timing and shared caches are not hidden. Only hardware that encrypts memory helps there.
"""

from __future__ import annotations

from fedark.sandbox.confine import Mode, Setup, enter, known_policies, lock, policy_digests
from fedark.sandbox.namespaces import SCRATCH, Mount
from fedark.sandbox.survey import Support, survey
from fedark.sandbox.witness import missing

__all__ = [
    "SCRATCH",
    "Mode",
    "Mount",
    "Setup",
    "Support",
    "enter",
    "known_policies",
    "lock",
    "missing",
    "policy_digests",
    "survey",
]
