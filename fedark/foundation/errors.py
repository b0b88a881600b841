"""Every error that fedark raises on purpose.

    FedarkError
    ├── InputError            what a person gave us is wrong: nothing was started
    │   ├── ContractError     a job file or contract, with every problem at once
    │   ├── DataError         a data file, with file and line
    │   └── ModelError        a base model directory, package or adapter folder
    ├── Refused               a security check said no: nothing secret was given out
    │   ├── EvidenceRefused   attestation evidence, with every reason
    │   ├── BudgetExceeded    a job would spend more privacy than a data set has left
    │   ├── ReleaseRefused    a weight key was not released or not accepted
    │   ├── SealBroken        sealed bytes are not what was sealed
    │   └── LogRefused        a transparency log, a head of it or a proof does not hold
    │       └── LogForked     its owner signed two histories of it
    ├── ProtocolError         a message is malformed, out of order or from a stranger
    ├── SandboxUnavailable    this machine cannot confine an enclave as asked
    ├── EnclaveFailed         an enclave process died or reported a fault
    └── FederationError       the deployment: a port in use, a party that failed, a deadline
        └── StorageError      a disk that is full or cannot be written

An error says three things: what happened, what was kept safe, what to do. None of them ever holds a
secret: no key, no weight, no customer record. Texts that come from another party pass through
`printable` first.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BudgetExceeded",
    "ContractError",
    "DataError",
    "EnclaveFailed",
    "EvidenceRefused",
    "FedarkError",
    "FederationError",
    "InputError",
    "LogForked",
    "LogRefused",
    "ModelError",
    "ProtocolError",
    "Refused",
    "ReleaseRefused",
    "SandboxUnavailable",
    "SealBroken",
    "StorageError",
    "printable",
    "restore",
]


class FedarkError(Exception):
    """What happened, what was kept safe, what to do.

    Args:
        what: one sentence, what happened.
        safe: what was kept safe or left untouched.
        fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, safe: str = "", fix: str = "") -> None:
        self.what = what
        self.safe = safe
        self.fix = fix
        super().__init__("\n".join(part for part in (what, safe, fix) if part))

    @property
    def told(self) -> str:
        """What happened and what to do about it, for a list of several problems."""
        return "\n    ".join(part for part in (self.what, self.fix) if part)


class InputError(FedarkError):
    """What a person gave us is wrong; nothing was started."""


class ContractError(InputError):
    """A job file or contract with every problem found in it.

    Args:
        source: the file, or the party, that it came from.
        problems: one line each.
    """

    def __init__(
        self,
        source: str,
        problems: Iterable[str],
        *,
        safe: str = "Nothing was started.",
        fix: str = "",
    ) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__(
            "\n".join([head, *(f"  - {problem}" for problem in self.problems)]), safe=safe, fix=fix
        )


class DataError(InputError):
    """A data file is unusable. Names file and line, never the content of a record."""

    def __init__(self, file: str, line: int | None, what: str, *, fix: str = "") -> None:
        self.file = file
        self.line = line
        where = f"{file}, line {line}" if line is not None else file
        super().__init__(
            f"{where}: {what}", safe="The data was not opened to any enclave.", fix=fix
        )


class ModelError(InputError):
    """A base model, its bundle or an adapter folder is unusable."""


class Refused(FedarkError):
    """A security check said no. Nothing secret was given out.

    Attributes:
        logged: index of the refusal in the transparency log of who refused, where it is logged.
        proof: what that log says to who was refused (`fedark.translog.update`), unverified; empty
            for nothing.
    """

    logged: int | None = None
    proof: bytes = b""


class EvidenceRefused(Refused):
    """Attestation evidence was refused, with every reason found.

    Attributes:
        answered: it answered a nonce that was waiting for an answer, and used it up.
    """

    answered: bool = False

    def __init__(
        self,
        subject: str,
        reasons: Iterable[str],
        *,
        safe: str = "No weight key and no data was given to it.",
    ) -> None:
        self.reasons = tuple(reasons)
        lines = "\n".join(f"  - {reason}" for reason in self.reasons)
        super().__init__(f"Evidence of {subject} was refused:\n{lines}", safe=safe)


class ReleaseRefused(Refused):
    """A weight key was not released, or what was released is not for this enclave."""


class SealBroken(Refused):
    """Sealed bytes were altered, truncated, re-ordered, or sealed under another key."""


class LogRefused(Refused):
    """A log, a tree head or a proof is not what it must be. Nothing was concluded from it."""


class LogForked(LogRefused):
    """The owner of a log signed two histories of it, or unsaid a part of one.

    Args:
        what: which log, and what does not fit.
        kept: the two statements that do not fit, as they were received; whoever has the owner's
            public key can check them. They do not cross to another process: who found them keeps
            them in a file.
    """

    kept: tuple[bytes, ...] = ()

    def __init__(
        self, what: str, *, kept: tuple[bytes, ...] = (), safe: str = "", fix: str = ""
    ) -> None:
        self.kept = kept
        super().__init__(
            what,
            safe=safe or "Nothing was released, opened or stored on the strength of it.",
            fix=fix
            or "Take part in nothing under this key until its owner has explained it; keep both"
            " heads: they are the proof.",
        )


class ProtocolError(FedarkError):
    """A message is malformed, out of order, replayed, or from a stranger."""


class SandboxUnavailable(FedarkError):
    """This machine cannot confine an enclave as asked; the enclave was not started."""


class EnclaveFailed(FedarkError):
    """An enclave process died or reported a fault."""


class FederationError(FedarkError):
    """The deployment failed: a port in use, a party that failed, a deadline that passed."""


class StorageError(FederationError):
    """A disk is full or cannot be written; the file that stood before still stands."""


def restore(
    code: str, what: str, *, safe: str = "", fix: str = "", reasons: Iterable[str] = ()
) -> FedarkError:
    """The error that another process reported: its class, if it is one of these, and its texts,
    made safe to show.
    """
    kind = globals()[code] if code in __all__ else None
    if not (isinstance(kind, type) and issubclass(kind, FedarkError)):
        kind = FederationError
    error = kind.__new__(kind)
    FedarkError.__init__(error, printable(what, 4000), safe=printable(safe), fix=printable(fix))
    for name in ("reasons", "problems"):
        setattr(error, name, tuple(printable(reason) for reason in reasons))
    return error


def printable(text: str, limit: int = 300) -> str:
    """`text` from another party, made safe to show: control characters but the line end replaced,
    at most `limit` characters.
    """
    clean = "".join(
        char if char.isprintable() or char == "\n" else "?" for char in text[: limit + 1]
    )
    return clean if len(clean) <= limit else clean[:limit] + "..."


class BudgetExceeded(Refused):
    """A job would spend more privacy than is left: nothing was charged, and training does not
    start.
    """
