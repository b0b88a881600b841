"""Reference values of the sandbox's own policies: what this installation's launcher may install, on
any kernel.

The code that builds the policies is measured, so these add one thing: evidence says which of them
was installed, and whoever appraises it can admit fewer, such as no kernel without landlock.
"""

from __future__ import annotations

from typing import cast

from fedark.attestation.terms import Policies, SandboxMode, SandboxPolicies
from fedark.sandbox import known_policies

__all__ = ["reference_policies"]


def reference_policies(minimum: SandboxMode = "landlock") -> Policies:
    """Sandbox mode -> reference values, for every mode from `minimum` on; mode "none" has none."""
    found = {
        mode: SandboxPolicies(
            seccomp=tuple(digest.hex() for digest in calls),
            landlock=tuple(digest.hex() for digest in files),
        )
        for mode, (calls, files) in known_policies(minimum).items()
    }
    return cast(Policies, found)
