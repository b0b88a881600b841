"""Takes out of a text what may be a secret: private keys, labelled tokens, long runs of key-like
characters.

The second line of defence: nothing of fedark writes a key, a weight or a record into a log in the
first place. Flower's logs and texts of other programs pass through here before anybody is shown
them.
"""

from __future__ import annotations

import re

__all__ = ["redact"]

_PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_LABEL = r"(?:token|secret|password|passwd|api[-_]?key|authorization|bearer)"
_LABELLED = re.compile(rf"(?i)\b({_LABEL}[\"']?(?:\s*[=:]\s*|\s+)(?:bearer\s+|basic\s+)?)(\S+)")
_LONG = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{40,}")


def redact(text: str) -> str:
    """`text` without what may be a secret: private keys, labelled tokens, runs of 40 or more
    key-like characters.
    """

    def long_run(match: re.Match[str]) -> str:
        run = match.group()
        is_path = "/" in run and not set("+=") & set(run) and max(map(len, run.split("/"))) < 32
        return run if is_path else f"{run[:6]}[...]"

    return _LONG.sub(long_run, _LABELLED.sub(r"\1[...]", _PEM.sub("[private key]", text)))
