"""What this machine offers to confine a process, and what is missing where it offers too little.

Namespaces are probed by building one in a short-lived process: the answer of any single setting is
not reliable (a user namespace may be granted without the right to mount in it, or only mounting be
forbidden).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import SandboxUnavailable
from fedark.sandbox import landlock, seccomp
from fedark.sandbox.confine import Mode

__all__ = ["Support", "survey"]

_PROBES = 3
_PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from fedark.sandbox.survey import probe
probe()
"""


@dataclass(frozen=True)
class Support:
    """What was found.

    Attributes:
        namespaces: "" if a private root with namespaces can be built; otherwise what stood in the
            way.
        landlock: its ABI, 0 for none.
        seccomp: system call filters exist, and this is a machine whose call numbers we know.
    """

    namespaces: str
    landlock: int
    seccomp: bool

    def mode(self, minimum: str = "landlock") -> Mode:
        """The strongest mode, if it is at least `minimum`.

        Raises:
            SandboxUnavailable: it is not; says what is missing and how to mend it.
        """
        if self.seccomp and not self.namespaces:
            return "namespaces"
        if self.seccomp and self.landlock and minimum == "landlock":
            return "landlock"
        missing = []
        if not self.seccomp:
            missing.append(
                f"system call filters on x86-64 Linux (this is {sys.platform} on"
                f" {os.uname().machine})"
            )
        if self.namespaces:
            missing.append(f"namespaces ({self.namespaces})")
        if not self.landlock and minimum == "landlock":
            missing.append("landlock (a kernel from 5.13 with landlock among its security modules)")
        raise SandboxUnavailable(
            f"This machine cannot confine an enclave (at least {minimum!r} is demanded); missing:"
            f" {'; '.join(missing)}.",
            safe="No enclave was started.",
            fix=(
                "Allow namespaces (kernel.unprivileged_userns_clone=1, user.max_user_namespaces >"
                " 0, AppArmor's apparmor_restrict_unprivileged_userns=0, or run as root), or use a"
                " kernel that has landlock."
            ),
        )


@functools.cache
def survey() -> Support:
    """Probe this machine; the answer is kept for the life of the process."""
    known = sys.platform == "linux" and os.uname().machine == "x86_64"
    if not known:
        return Support("not x86-64 Linux", 0, False)
    return Support(_namespaces(), landlock.abi(), seccomp.available())


def _namespaces() -> str:
    for _ in range(_PROBES):
        missing, sure = _probed()
        if sure:
            break
    return missing


def _probed() -> tuple[str, bool]:
    """What stands in the way, "" for nothing; and whether the machine said so, and not somebody who
    killed the probe.
    """
    import subprocess  # here, because this module is loaded in enclaves too, which need neither
    import tempfile

    package = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", _PROBE, str(package)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                env={},
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the probe did not run: {type(error).__name__}", isinstance(error, OSError)
        output.seek(0)
        text = output.read(300).decode("utf-8", "replace").strip()
    killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    return (
        "" if done.returncode == 0 else text or f"the probe ended with {done.returncode}",
        not killed,
    )


def probe() -> None:
    """Body of the probing process: build a root with one file in it, and print what stood in the
    way.
    """
    from fedark.sandbox import confine
    from fedark.sandbox.namespaces import Mount

    try:
        confine.enter(
            confine.Setup(
                mode="namespaces",
                landlock=0,
                host=os.getppid(),
                channel=os.dup(0),
                roots=(Mount.of(__file__),),
                listed=(),
                memory_bytes=1 << 30,
                scratch_bytes=1 << 16,
            )
        )
    except SandboxUnavailable as error:
        print(error.what)
        sys.exit(1)
